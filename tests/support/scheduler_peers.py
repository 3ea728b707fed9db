"""Programmable nodes, callers and routers of a scheduler, over real TLS."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from gpumesh.common.v1.job_pb2 import (
    JobOutcome,
    Modality,
    ModelBuild,
    Segment,
    Usage,
)
from gpumesh.common.v1.link_pb2 import Failure, Item, ItemFlag, ItemKind, Window
from gpumesh.node.v1.session_pb2 import (
    Accept,
    CancelAck,
    Delta,
    Done,
    Frame,
    Hello,
    ModelState,
    Offer,
    Receipt,
    Reject,
    RunningJob,
    ServedModel,
    Status,
)
from gpumesh.scheduler.v1.dispatch_service_pb2 import Delivered, DispatchHello, Submit
from gpumesh_runtime.identity import Role, node_uri
from gpumesh_runtime.link import LinkClient, LinkOptions, fence, new_id
from tests.support.certificates import Certificates
from tests.support.links import Recorder

MODEL: Final = "tiny"
REVISION: Final = "r1"
BUILD: Final = ModelBuild(model_id=MODEL, revision=REVISION, quantisation="F16", engine_name="mock", engine_version="1")
FIRST: Final = int(ItemFlag.ITEM_FLAG_FIRST)
LAST: Final = int(ItemFlag.ITEM_FLAG_LAST)
CONTENT: Final = int(ItemFlag.ITEM_FLAG_CONTENT)
OFFER: Final = int(ItemKind.ITEM_KIND_OFFER)
FRAME: Final = int(ItemKind.ITEM_KIND_FRAME)
DONE: Final = int(ItemKind.ITEM_KIND_DONE)
ERROR: Final = int(ItemKind.ITEM_KIND_ERROR)
CANCEL: Final = int(ItemKind.ITEM_KIND_CANCEL)
WINDOW: Final = int(ItemKind.ITEM_KIND_WINDOW)
PAYLOAD: Final = int(ItemKind.ITEM_KIND_PAYLOAD)
SETTLE: Final = int(ItemKind.ITEM_KIND_SETTLE)
RECEIPT_ACK: Final = int(ItemKind.ITEM_KIND_RECEIPT_ACK)
DELIVERED_ACK: Final = int(ItemKind.ITEM_KIND_DELIVERED_ACK)
UPDATE: Final = int(ItemKind.ITEM_KIND_UPDATE)
COMPLETED: Final = JobOutcome.JOB_OUTCOME_COMPLETED
CANCELLED: Final = JobOutcome.JOB_OUTCOME_CANCELLED
FAILED: Final = JobOutcome.JOB_OUTCOME_FAILED
# Reconnects at once: tests do not wait for jitter.
QUICK: Final = LinkOptions(reconnect_min_s=0.01, reconnect_max_s=0.02, background_s=0.005)


def frame_body(text: str = "hello") -> bytes:
    """A Frame with one delta."""
    return Frame(deltas=[Delta(text=text)]).SerializeToString()


class Home(Protocol):
    """What peers need of the mesh that they are in."""

    certificates: Certificates

    @property
    def address(self) -> str:
        """Of the scheduler."""

    def ticket(self, job_id: bytes, **fields: Any) -> bytes:
        """A sealed ticket."""


class Client(Recorder):
    """One end of a LinkClient that records. `act` is called with each item."""

    def __init__(self, client: Callable[["Client"], LinkClient], act: Callable[[Item], None] | None = None) -> None:
        super().__init__((lambda _link, item: act(item)) if act else None)
        self.client = client(self)
        self._task = asyncio.get_running_loop().create_task(self.client.run())

    async def up(self) -> None:
        """Waits for the link."""
        await self.client.up(10)

    @property
    def link(self) -> Any:
        """The live link."""
        assert self.client.link is not None
        return self.client.link

    async def item(self, kind: int, job_id: bytes | None = None, number: int = 1) -> Item:
        """Waits for the number-th item of a kind (and job)."""

        def found() -> list[Item]:
            return [item for item in self.of_kind(kind) if job_id is None or item.id == job_id]

        await self.until(lambda: len(found()) >= number)
        return found()[number - 1]

    async def stop(self) -> None:
        """Ends in order."""
        await self.client.stop()
        await self._task

    async def kill(self) -> None:
        """Ends without Goodbye, as a process that dies."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class FakeNode(Client):
    """A node. By default it only records; `serve` answers each offer by itself with so many frames."""

    def __init__(
        self,
        mesh: Home,
        node_id: str,
        *,
        counter: int = 1,
        slots: int = 2,
        serve: int | None = None,
        address: str = "",
        claims: str = "",
    ) -> None:
        self.node_id = node_id
        self.slots = slots
        self.serve = serve
        self.running: list[tuple[bytes, int]] = []
        self.offers: dict[tuple[bytes, int], Offer] = {}
        self._mesh = mesh
        body = Hello(
            node_id=claims or node_id,
            session_counter=counter,
            status=self.status(),
            software_version="0.1",
            boot_id="b",
        )
        tls = mesh.certificates.uri(node_uri("acme", node_id))
        method = "/gpumesh.scheduler.v1.SessionService/Connect"
        super().__init__(
            lambda me: LinkClient(
                address or mesh.address,
                method,
                credentials=tls,
                hello=body.SerializeToString,
                receiver=me,
                options=QUICK,
            ),
            self._act,
        )

    def status(self, **fields: Any) -> Status:
        """What it serves."""
        model = ServedModel(
            build=BUILD,
            slots=self.slots,
            context_tokens=4096,
            modalities=[Modality.MODALITY_CHAT],
            state=ModelState.MODEL_STATE_READY,
        )
        running = [RunningJob(job_id=job_id, fence=fence_) for job_id, fence_ in self.running]
        return Status(models=[model], running=running, **fields)

    def heartbeat(self, **fields: Any) -> None:
        """Says it."""
        self.link.send_new(ItemKind.ITEM_KIND_HEARTBEAT, body=self.status(**fields).SerializeToString())

    def _act(self, item: Item) -> None:
        if item.kind == OFFER:
            self.offers[item.id, item.fence] = Offer.FromString(item.body)
            if self.serve is not None:
                self.answer(item, self.serve)

    def answer(self, offer: Item, frames: int = 1) -> None:
        """Accept, frames, Done."""
        self.accept(offer)
        for seq in range(1, frames + 1):
            self.frame(offer, seq)
        self.done(offer, frames)

    def send(self, kind: int, offer: Item, body: bytes = b"", **fields: Any) -> None:
        """An item of an offer's job."""
        fields.setdefault("fence", offer.fence)
        self.link.send_new(kind, id=offer.id, body=body, **fields)

    def accept(self, offer: Item) -> None:
        """Takes it."""
        self.send(ItemKind.ITEM_KIND_ACCEPT, offer, Accept().SerializeToString())

    def reject(self, offer: Item, reason: str = "NODE_REJECTED") -> None:
        """Refuses it."""
        self.send(ItemKind.ITEM_KIND_REJECT, offer, Reject(reason=reason).SerializeToString())

    def frame(
        self, offer: Item, seq: int, *, content: bool = True, body: bytes = b"", fence_: int | None = None
    ) -> None:
        """Frame number seq; one token each."""
        flags = (CONTENT if content else 0) | (FIRST if seq == 1 else 0)
        fence_ = offer.fence if fence_ is None else fence_
        self.send(FRAME, offer, body or frame_body(f"t{seq} "), fence=fence_, seq=seq, tokens=seq, flags=flags)

    def usage(self, tokens: int) -> Usage:
        """11 prompt tokens."""
        return Usage(prompt_tokens=11, completion_tokens=tokens)

    def done(self, offer: Item, frames: int) -> None:
        """The answer is complete."""
        body = Done(usage=self.usage(frames), receipt_token=self.token(offer), build=BUILD)
        self.send(DONE, offer, body.SerializeToString(), seq=frames, tokens=frames, flags=LAST)

    def error(self, offer: Item, reason: str, *, frames: int = 0, retryable: bool = True) -> None:
        """It failed."""
        body = Failure(reason=reason, message="broken", retryable=retryable).SerializeToString()
        self.send(ERROR, offer, body, seq=frames, flags=LAST)

    def cancel_ack(self, offer: Item, tokens: int = 0) -> None:
        """Stopped."""
        body = CancelAck(usage=self.usage(tokens), receipt_token=self.token(offer)).SerializeToString()
        self.send(ItemKind.ITEM_KIND_CANCEL_ACK, offer, body)

    def receipt(self, offer: Item, tokens: int, token: bytes | None = None) -> None:
        """Presents a receipt again."""
        body = Receipt(
            receipt_token=self.token(offer) if token is None else token, usage=self.usage(tokens), outcome=COMPLETED
        )
        self.send(ItemKind.ITEM_KIND_RECEIPT, offer, body.SerializeToString())

    def token(self, offer: Item) -> bytes:
        """The receipt token of an offer."""
        return Offer.FromString(offer.body).receipt_token


class FakeCaller(Client):
    """An edge."""

    def __init__(self, mesh: Home, address: str = "") -> None:
        self._mesh = mesh
        tls = mesh.certificates.role(Role.EDGE)
        hello = DispatchHello(caller_id="edge").SerializeToString()
        method = "/gpumesh.scheduler.v1.DispatchService/Connect"
        super().__init__(
            lambda me: LinkClient(
                address or mesh.address, method, credentials=tls, hello=lambda: hello, receiver=me, options=QUICK
            )
        )

    def submit(
        self,
        *,
        job_id: bytes | None = None,
        attempt: int = 1,
        sealed: bytes | None = None,
        payload: bytes = b"{}",
        **fields: Any,
    ) -> bytes:
        """Submits a job; its id. sealed: instead of a good ticket."""
        job_id = job_id or new_id()
        sealed = sealed if sealed is not None else self._mesh.ticket(job_id, attempt=attempt)
        values: dict[str, Any] = {"streaming": True, "deadline_ms": 60_000, "window_bytes": 128 * 1024} | fields
        body = Submit(ticket=sealed, payload=payload, **values).SerializeToString()
        self.link.send_new(ItemKind.ITEM_KIND_SUBMIT, id=job_id, fence=fence(attempt, 0), flags=FIRST | LAST, body=body)
        return job_id

    def piece(self, job_id: bytes, seq: int, body: bytes, *, last: bool = False) -> None:
        """A piece of payload."""
        self.link.send_new(PAYLOAD, id=job_id, fence=fence(1, 0), seq=seq, body=body, flags=LAST if last else 0)

    def window(self, frame: Item, consumed_bytes: int, limit_bytes: int = 0) -> None:
        """Grants."""
        body = Window(
            consumed_seq=frame.seq, consumed_bytes=consumed_bytes, limit_bytes=limit_bytes
        ).SerializeToString()
        self.link.send_new(WINDOW, id=frame.id, fence=frame.fence, body=body)

    def cancel(self, job_id: bytes, reason: str = "CLIENT_GONE") -> None:
        """The client is gone."""
        self.link.cancel(job_id, reason)

    def delivered(
        self,
        job_id: bytes,
        outcome: int,
        tokens: int = 0,
        *,
        fence_: int = fence(1, 1),
        tokens_of: list[bytes] | None = None,
    ) -> None:
        """Presents the delivered record."""
        record = Delivered(
            ticket=self._mesh.ticket(job_id),
            outcome=JobOutcome.ValueType(outcome),
            usage=Usage(prompt_tokens=20, completion_tokens=tokens),
            segments=[Segment(fence=fence_, start_token=0, end_token=tokens)] if tokens else [],
            receipt_tokens=tokens_of or [],
        )
        self.link.send_new(ItemKind.ITEM_KIND_DELIVERED, id=job_id, body=record.SerializeToString())

    async def failure(self, job_id: bytes) -> Failure:
        """Waits for the job's Error."""
        return Failure.FromString((await self.item(ERROR, job_id)).body)


class Watcher(Client):
    """A router."""

    def __init__(self, mesh: Home) -> None:
        tls = mesh.certificates.role(Role.ROUTER)
        method = "/gpumesh.scheduler.v1.CapacityService/WatchCapacity"
        super().__init__(
            lambda me: LinkClient(mesh.address, method, credentials=tls, hello=lambda: b"", receiver=me, options=QUICK)
        )
