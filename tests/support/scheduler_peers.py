"""A whole scheduler in this process on free ports, between programmable peers of every kind, over real TLS."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc.aio

from gpumesh.common.v1.job_pb2 import (
    JobOutcome,
    Modality,
    Model,
    ModelBuild,
    SealedTicket,
    Segment,
    Ticket,
    Usage,
)
from gpumesh.common.v1.link_pb2 import Failure, Item, ItemFlag, ItemKind, Window
from gpumesh.metering.v1.settlement_service_pb2 import SegmentPay, Settle, Settled, SettlementWelcome
from gpumesh.metering.v1.settlement_service_pb2_grpc import add_SettlementServiceServicer_to_server
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
from gpumesh.registry.v1.directory_service_pb2 import Directory, DirectoryWelcome
from gpumesh.registry.v1.directory_service_pb2_grpc import add_DirectoryServiceServicer_to_server
from gpumesh.scheduler.v1.dispatch_service_pb2 import Delivered, DispatchHello, Submit
from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.identity import Role, node_uri
from gpumesh_runtime.link import LinkClient, LinkOptions, LinkServer, fence, new_id
from gpumesh_runtime.metrics import REGISTRY
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.sealing import KeyRing, create_file
from gpumesh_scheduler.config import SchedulerSettings
from gpumesh_scheduler.service import Service
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
T = TypeVar("T")


def ticket(ring: KeyRing, service: Service, job_id: bytes, **fields: Any) -> bytes:
    """A sealed ticket for that scheduler: attempt 1, good for 10 s, settled within an hour; `fields` change it."""
    body = Ticket(
        job_id=job_id,
        account_id="acct_1",
        key_id="key1",
        model_id=MODEL,
        model_revision=REVISION,
        scheduler_id=service.desk.scheduler_id,
        scheduler_boot_id=service.desk.boot_id,
        max_output_tokens=100,
        input_tokens_estimate=20,
        modality=Modality.MODALITY_CHAT,
        attempt=1,
        hold_nano_usd=1_000_000,
    )
    body.submit_by_time.FromNanoseconds(time.time_ns() + fields.pop("submit_in_s", 10) * 1_000_000_000)
    body.settle_by_time.FromNanoseconds(time.time_ns() + 3_600_000_000_000)
    for name, value in fields.items():
        setattr(body, name, value)
    encoded = body.SerializeToString()
    key_id, mac = ring.seal(b"gpumesh-ticket-v1", encoded)
    return SealedTicket(key_id=key_id, body=encoded, mac=mac).SerializeToString()


def frame_body(text: str = "hello") -> bytes:
    """A Frame with one delta."""
    return Frame(deltas=[Delta(text=text)]).SerializeToString()


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
        mesh: "Mesh",
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

    def __init__(self, mesh: "Mesh", address: str = "") -> None:
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

    def __init__(self, mesh: "Mesh") -> None:
        tls = mesh.certificates.role(Role.ROUTER)
        method = "/gpumesh.scheduler.v1.CapacityService/WatchCapacity"
        super().__init__(
            lambda me: LinkClient(mesh.address, method, credentials=tls, hello=lambda: b"", receiver=me, options=QUICK)
        )


class _Served:
    """A link service of a fake: everything that comes is recorded."""

    def __init__(self, welcome: bytes, act: Callable[[Any, Item], None] | None = None) -> None:
        self.seen = Recorder(act)
        self.links = LinkServer(self.seen, lambda hello, peer: welcome)

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        """Serves one link."""
        await self.links.serve(request_iterator, context)


class FakeMetering(_Served):
    """Answers Settle with a charge of 1000 nano-USD, 800 of them for each segment's try, unless told to be `silent`."""

    def __init__(self) -> None:
        super().__init__(SettlementWelcome(metering_id="m").SerializeToString(), self._act)
        self.silent = False
        self.reason = ""
        self.effects: set[bytes] = set()

    def _act(self, link: Any, item: Item) -> None:
        if item.kind == SETTLE and not self.silent:
            settle = Settle.FromString(item.body)
            self.effects.add(item.id)
            settled = Settled(
                reason=self.reason, pays=[SegmentPay(fence=s.segment.fence, pay_nano_usd=800) for s in settle.segments]
            )
            settled.charge.amount_nano_usd = 1000
            link.send_new(ItemKind.ITEM_KIND_SETTLED, id=item.id, body=settled.SerializeToString())

    async def settle(self, job_id: bytes, number: int = 1) -> Settle:
        """Waits for the number-th Settle of a job."""

        def found() -> list[Item]:
            return [item for item in self.seen.of_kind(SETTLE) if item.id == job_id]

        await self.seen.until(lambda: len(found()) >= number)
        return Settle.FromString(found()[number - 1].body)

    def count(self, job_id: bytes) -> int:
        """How often a job's Settle came."""
        return sum(item.id == job_id for item in self.seen.of_kind(SETTLE))


class FakeRegistry(_Served):
    """Sends its catalogue to whoever connects."""

    def __init__(self) -> None:
        super().__init__(DirectoryWelcome(registry_id="r").SerializeToString())

    def push(self, **fields: Any) -> None:
        """An update to everyone."""
        for link in self.links.links:
            link.send_new(UPDATE, body=Directory(**fields).SerializeToString())

    def catalogue(self, *model_ids: str) -> None:
        """The catalogue, whole."""
        self.push(models=[Model(model_id=model_id) for model_id in model_ids], catalogue_whole=True)


@dataclass
class Mesh:
    """A scheduler and its surroundings. Peers made through it are ended with it."""

    certificates: Certificates
    ring: KeyRing
    service: Service
    metering: FakeMetering
    registry: FakeRegistry
    metering_server: Server
    drains: list[str] = field(default_factory=list)
    _clients: list[Client] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return f"127.0.0.1:{self.service.port}"

    def ticket(self, job_id: bytes, **fields: Any) -> bytes:
        """A sealed ticket for this scheduler."""
        return ticket(self.ring, self.service, job_id, **fields)

    async def _begin(self, client: Any) -> Any:
        self._clients.append(client)
        await client.up()
        return client

    async def node(self, node_id: str = "n1", **fields: Any) -> FakeNode:
        """A node that is connected."""
        node = await self._begin(FakeNode(self, node_id, **fields))
        assert isinstance(node, FakeNode)
        await self.until(lambda: node_id in self.service.desk.roster.sessions)
        return node

    async def refused_node(self, node_id: str, reason: Reason, **fields: Any) -> MeshError:
        """A node that tries to connect, until it has been refused for that reason."""
        node = FakeNode(self, node_id, **fields)
        self._clients.append(node)
        await self.until(lambda: node.client.last_error is not None and node.client.last_error.reason is reason)
        assert node.client.last_error is not None
        return node.client.last_error

    async def caller(self, **fields: Any) -> FakeCaller:
        """A caller that is connected."""
        caller = await self._begin(FakeCaller(self, **fields))
        assert isinstance(caller, FakeCaller)
        return caller

    async def watcher(self) -> Watcher:
        """A router that watches."""
        watcher = await self._begin(Watcher(self))
        assert isinstance(watcher, Watcher)
        return watcher

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Waits for something inside the scheduler."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)

    def slots_taken(self) -> int:
        """Slots that tries hold, over all nodes."""
        return sum(
            seat.used for session in self.service.desk.roster.sessions.values() for seat in session.seats.values()
        )

    async def close(self) -> None:
        """Ends the peers."""
        await asyncio.gather(*(client.kill() for client in self._clients))


def metric(name: str, **labels: str) -> float:
    """A metric's value now."""
    found = REGISTRY._metrics[name]
    cell = found.labels(*(labels[label] for label in found.label_names))
    return float(getattr(cell, "value", 0.0))


@asynccontextmanager
async def running_mesh(folder: Path, **settings: Any) -> AsyncIterator[Mesh]:
    """A scheduler that runs, with metering and registry. Settings change its configuration; the timers are short by default."""
    certificates = Certificates(folder / "ca")
    create_file(folder / "ring.json")
    metering, registry = FakeMetering(), FakeRegistry()
    metering_server = Server("metering", "127.0.0.1:0", certificates.role(Role.METERING))
    metering_server.add(metering, add_SettlementServiceServicer_to_server)
    registry_server = Server("registry", "127.0.0.1:0", certificates.role(Role.REGISTRY))
    registry_server.add(_Directory(registry), add_DirectoryServiceServicer_to_server)
    await metering_server.start()
    await registry_server.start()
    tls = certificates.role(Role.SCHEDULER)
    values: dict[str, Any] = {
        "listen_address": "127.0.0.1:0",
        "key_ring": folder / "ring.json",
        "metering_address": f"127.0.0.1:{metering_server.port}",
        "registry_address": f"127.0.0.1:{registry_server.port}",
        "tls_cert": tls.cert_file,
        "tls_key": tls.key_file,
        "tls_ca": tls.ca_file,
        "delivered_wait_s": 0.2,
        "cancelled_wait_s": 0.4,
        "caller_wait_s": 0.3,
        "receipt_wait_s": 0.1,
        "drain_s": 5.0,
    } | settings
    drains: list[str] = []
    service = Service(SchedulerSettings.read(**values), lambda: drains.append("operator"))
    await service.start()
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(work) for work in (service.run_timers(), *(client.run() for client in service.clients))]
    mesh = Mesh(certificates, KeyRing(folder / "ring.json"), service, metering, registry, metering_server, drains)
    try:
        await asyncio.gather(*(client.up(10) for client in service.clients))
        yield mesh
    finally:
        await mesh.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(service.server.stop(0), metering_server.stop(0), registry_server.stop(0))
        await asyncio.gather(*service.desk._tasks, return_exceptions=True)


class _Directory:
    """The registry's servicer: GetTokenizer is not asked of it here."""

    def __init__(self, registry: FakeRegistry) -> None:
        self.Connect = registry.Connect

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """None."""
        for nothing in list[Any]():
            yield nothing


def operator_channel(mesh: Mesh) -> grpc.aio.Channel:
    """As a person connects."""
    return grpc.aio.secure_channel(mesh.address, mesh.certificates.role(Role.OPERATOR).channel_credentials())
