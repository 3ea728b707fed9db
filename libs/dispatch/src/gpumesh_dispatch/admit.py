"""Where admissions come from: a router over a link. The router's own front door gives its desk in place of this."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.router.v1.admission_service_pb2 import Admission, AdmissionHello, AdmitRequest, Catalogue, Release
from gpumesh_dispatch.grants import Grants, key_of
from gpumesh_dispatch.job import ADMIT_FOR_S
from gpumesh_dispatch.request import Admitted, JobRequest
from gpumesh_runtime.errors import MeshError, Reason, Unavailable
from gpumesh_runtime.link import Link, LinkClient, LinkDown, LinkEnd, LinkOptions, LinkProtocolError
from gpumesh_runtime.tls import TlsIdentity

_RELEASE: Final = ItemKind.ITEM_KIND_RELEASE
_UPDATE: Final = int(ItemKind.ITEM_KIND_UPDATE)
METHOD: Final = "/gpumesh.router.v1.AdmissionService/Connect"
_OPTIONS: Final = LinkOptions(reconnect_min_s=0.05, reconnect_max_s=0.5)

Answer = Callable[[Admission | MeshError], None]


class Admitter(Protocol):
    """Decides whether and where a job may run."""

    def admit(self, wire: AdmitRequest, answer: Answer) -> None:
        """Calls `answer` exactly once, perhaps before it returns, with the admission or why not."""

    def admit_here(self, request: JobRequest, attempt: int) -> Admitted | None:
        """An admission under a grant that this process has; None: ask."""

    def release(self, job_id: bytes, charge_nano_usd: int) -> None:
        """The job is over for its client: its hold, less the charge, is free. Repetition is harmless."""


class _RouterConnection:
    """A link to one router."""

    def __init__(self, owner: "LinkAdmitter", address: str, credentials: TlsIdentity | None, hello: bytes) -> None:
        self.address = address
        self.link: Link | None = None
        self.draining = False
        self._owner = owner
        self.client = LinkClient(
            address, METHOD, credentials=credentials, hello=lambda: hello, receiver=self, options=_OPTIONS
        )
        self.task: asyncio.Task[None] | None = None
        self.grants = Grants(lambda: self.link is not None, self.send_release)

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """The handshake is done."""
        del hello_or_welcome
        self.link = link
        self.draining = False
        self._owner.on_change()

    def on_item(self, link: Link, item: Item) -> None:
        """Only catalogues come unasked."""
        del link
        if item.kind == _UPDATE:
            try:
                catalogue = Catalogue.FromString(item.body)
            except DecodeError as err:
                raise LinkProtocolError("a malformed catalogue") from err
            self._owner.on_catalogue(catalogue)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """It drains: others are asked first."""
        del link, goodbye
        self.draining = True

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Calls that waited have failed with LinkDown; their jobs ask again. Grants go on until they expire."""
        del link, end
        self.link = None
        self._owner.on_change()

    def send_release(self, id_: bytes, charge_nano_usd: int, held_nano_usd: int) -> None:
        """Of a job or grant. A router that is gone has no hold to release."""
        if self.link is None:
            return
        body = Release(charge_nano_usd=charge_nano_usd, held_nano_usd=held_nano_usd).SerializeToString()
        try:
            self.link.send(Item(kind=_RELEASE, id=id_, body=body))
        except LinkDown:
            self.link = None


class LinkAdmitter:
    """Admissions from routers over links, one to each. A key's jobs go to the same router while that is up (rendezvous hashing), so that
    one router's cache and holds cover them.

    on_catalogue is called with each catalogue that a router sends, on_change when a link came up or went down.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: TlsIdentity | None,
        caller_id: str,
        on_catalogue: Callable[[Catalogue], None],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        hello = AdmissionHello(caller_id=caller_id).SerializeToString()
        self.on_catalogue = on_catalogue
        self.on_change = on_change
        self._routers = [_RouterConnection(self, address, credentials, hello) for address in addresses]
        self._admitted_by: dict[bytes, _RouterConnection] = {}

    def start(self) -> None:
        """Begins to connect; never fails."""
        loop = asyncio.get_running_loop()
        for router in self._routers:
            router.task = loop.create_task(router.client.run(), name=f"admission-link {router.address}")

    @property
    def ready(self) -> bool:
        """Whether a router can be asked now."""
        return any(router.link is not None for router in self._routers)

    async def stop(self) -> None:
        """Goodbye and the end of all links; what was released has left."""
        await asyncio.gather(*(router.client.stop() for router in self._routers))
        tasks = [router.task for router in self._routers if router.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    def admit_here(self, request: JobRequest, attempt: int) -> Admitted | None:
        """As Admitter. A grant outlives the link to its router: what was promised for two seconds holds."""
        router = self._routers[0] if len(self._routers) == 1 else self._choose(request.key_id)
        return router.grants.admit(request, attempt) if router is not None else None

    def admit(self, wire: AdmitRequest, answer: Answer) -> None:
        """As Admitter. ROUTER_UNAVAILABLE (retryable) when no router is connected."""
        router = self._choose(wire.key_id)
        link = router.link if router is not None else None
        if router is None or link is None:
            text = "The mesh cannot take requests at the moment. Try again in a second."
            answer(Unavailable(Reason.ROUTER_UNAVAILABLE, text, retryable=True, retry_after_s=1.0))
            return
        job_id, chosen = wire.job_id, router
        key = key_of(wire.model, wire.key_sha256, wire.modality)

        wanted = router.grants.wants(key)

        def on_answer(body: bytes | None, error: MeshError | None) -> None:
            if wanted:
                chosen.grants.answered(key)
            if body is None:
                answer(error or LinkDown())
                return
            try:
                admission = Admission.FromString(body)
            except DecodeError:
                answer(Unavailable(Reason.PROTOCOL_ERROR, "The router's answer could not be read."))
                return
            self._admitted_by[job_id] = chosen
            if admission.HasField("grant"):
                chosen.grants.take(key, admission)
            answer(admission)

        wire.accepts_grant = wanted
        link.ask(wire.SerializeToString(), ADMIT_FOR_S, on_answer)

    def release(self, job_id: bytes, charge_nano_usd: int) -> None:
        """As Admitter. A router that is gone has no hold to release."""
        router = self._admitted_by.pop(job_id, None)
        if router is not None:
            router.send_release(job_id, charge_nano_usd, 0)
            charge_nano_usd = 0  # an earlier attempt under a grant costs nothing
        for granting in self._routers:
            if granting.grants.release(job_id, charge_nano_usd):
                return

    def _choose(self, key_id: str) -> _RouterConnection | None:
        routers = self._routers
        if len(routers) == 1:
            return routers[0] if routers[0].link is not None else None
        up = [router for router in routers if router.link is not None]
        return max(
            (router for router in up if not router.draining),
            key=lambda router: hashlib.blake2b(f"{router.address}|{key_id}".encode(), digest_size=8).digest(),
            default=up[0] if up else None,
        )
