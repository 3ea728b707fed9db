"""AdmissionService: one link per caller. The front door's servicer is in front_door.py."""

import functools
from collections.abc import AsyncIterator
from typing import Any, Final

from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Batch, Goodbye, Item, ItemKind
from gpumesh.router.v1 import admission_service_pb2 as admission_pb2
from gpumesh.router.v1.admission_service_pb2_grpc import AdmissionServiceServicer
from gpumesh_router.admissions import Admissions
from gpumesh_router.publisher import CataloguePublisher
from gpumesh_router.tokenizers import Tokenizers
from gpumesh_runtime.error_types import InvalidArgument, MeshError
from gpumesh_runtime.identity import Identity
from gpumesh_runtime.link import Link, LinkEnd, LinkServer
from gpumesh_runtime.reasons import Reason

_CALL: Final = int(ItemKind.ITEM_KIND_CALL)
_RELEASE: Final = int(ItemKind.ITEM_KIND_RELEASE)
_CHUNK_BYTES: Final = 256 * 1024


class AdmissionServicer(AdmissionServiceServicer):
    """Admit and Release over links; the catalogue to whoever is connected."""

    def __init__(
        self,
        admissions: Admissions,
        publisher: CataloguePublisher,
        tokenizers: Tokenizers,
        *,
        router_id: str,
        boot_id: str,
    ) -> None:
        self._admissions = admissions
        self._publisher = publisher
        self._tokenizers = tokenizers
        self._links = LinkServer(self, self._greet)
        self._welcome = admission_pb2.AdmissionWelcome(router_id=router_id, router_boot_id=boot_id).SerializeToString()

    async def Connect(  # type: ignore[override]  # grpc.aio also takes a coroutine that reads and writes through its context
        self, request_iterator: AsyncIterator[Batch], context: Any
    ) -> None:
        """Serves one caller's link until it ends."""
        await self._links.serve(request_iterator, context)

    async def Authenticate(
        self, request: admission_pb2.AuthenticateRequest, context: Any
    ) -> admission_pb2.AuthenticateResponse:
        """Tells whose a key is."""
        account_id = await self._admissions.authenticate(request.key_id, request.key_sha256)
        return admission_pb2.AuthenticateResponse(account_id=account_id)

    async def GetTokenizer(
        self, request: admission_pb2.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[admission_pb2.GetTokenizerResponse]:
        """Streams a tokenizer.json."""
        data = await self._tokenizers.get(request.tokenizer_sha256)
        for at in range(0, len(data), _CHUNK_BYTES):
            yield admission_pb2.GetTokenizerResponse(chunk=data[at : at + _CHUNK_BYTES])

    def goodbye(self, *, drain_ms: int) -> None:
        """Tells every caller to ask another router from now on."""
        self._links.goodbye(drain_ms=drain_ms)

    def _greet(self, hello: bytes, peer: Identity) -> bytes:
        admission_pb2.AdmissionHello.FromString(hello)
        return self._welcome

    def on_up(self, link: Link, body: bytes) -> None:
        """A caller connected: it gets the catalogue at once."""
        self._publisher.add(link)

    def on_item(self, link: Link, item: Item) -> None:
        """Admit and Release; anything else is the caller's error and ignored."""
        kind = item.kind
        if kind == _CALL:
            try:
                request = admission_pb2.AdmitRequest.FromString(item.body)
            except DecodeError:
                link.fail(item.id, InvalidArgument(Reason.INVALID_ARGUMENT, "The body is not an AdmitRequest."))
                return
            self._admissions.admit(request, functools.partial(_answer, link, item.id))
        elif kind == _RELEASE:
            release = admission_pb2.Release.FromString(item.body)
            self._admissions.release(item.id, release.charge_nano_usd, release.held_nano_usd)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """It asks nothing new; its releases still come."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Holds of its jobs end when released through another link or at their deadline."""
        self._publisher.remove(link)


def _answer(link: Link, call_id: bytes, outcome: admission_pb2.Admission | MeshError) -> None:
    """Sends an answer; a link that ended meanwhile drops it."""
    if isinstance(outcome, MeshError):
        link.fail(call_id, outcome)
    else:
        link.reply(call_id, outcome.SerializeToString())
