"""A whole scheduler in this process on free ports, between a fake metering, a fake registry and programmable peers, over real TLS."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumesh.common.v1.job_pb2 import (
    Modality,
    Model,
    SealedTicket,
    Ticket,
)
from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh.metering.v1.settlement_service_pb2 import SegmentPay, Settle, Settled, SettlementWelcome
from gpumesh.metering.v1.settlement_service_pb2_grpc import add_SettlementServiceServicer_to_server
from gpumesh.registry.v1.directory_service_pb2 import Directory, DirectoryWelcome
from gpumesh.registry.v1.directory_service_pb2_grpc import add_DirectoryServiceServicer_to_server
from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.identity import Role
from gpumesh_runtime.link import LinkServer
from gpumesh_runtime.metrics import REGISTRY
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.sealing import KeyRing, create_file
from gpumesh_scheduler.config import SchedulerSettings
from gpumesh_scheduler.service import Service
from tests.support.certificates import Certificates
from tests.support.links import Recorder
from tests.support.scheduler_peers import MODEL, REVISION, SETTLE, UPDATE, Client, FakeCaller, FakeNode, Watcher


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


class _Served:
    """A link service of a fake: everything that comes is recorded."""

    def __init__(self, welcome: bytes, act: Callable[[Any, Item], None] | None = None) -> None:
        self.seen = Recorder(act)
        self.links = LinkServer(self.seen, lambda hello, peer: welcome)

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        """Serves one link."""
        await self.links.serve(request_iterator, context)


def _each(item: Item) -> list[tuple[bytes, bytes]]:
    """Job id and Settle of every job in a Settle item."""
    if item.id:
        return [(item.id, item.body)]
    many = Settle.FromString(item.body)
    ids = [many.job_ids[at : at + 16] for at in range(0, len(many.job_ids), 16)]
    return list(zip(ids, many.jobs, strict=True))


class FakeMetering(_Served):
    """Answers Settle with a charge of 1000 nano-USD, 800 of them for each segment's try, unless told to be `silent`."""

    def __init__(self) -> None:
        super().__init__(SettlementWelcome(metering_id="m").SerializeToString(), self._act)
        self.silent = False
        self.reason = ""
        self.effects: set[bytes] = set()
        self.came: list[tuple[bytes, bytes]] = []

    def _act(self, link: Any, item: Item) -> None:
        if item.kind != SETTLE:
            return
        for job_id, body in _each(item):
            self.came.append((job_id, body))
            if self.silent:
                continue
            self.effects.add(job_id)
            pays = [SegmentPay(fence=s.segment.fence, pay_nano_usd=800) for s in Settle.FromString(body).segments]
            settled = Settled(reason=self.reason, pays=pays)
            settled.charge.amount_nano_usd = 1000
            link.send_new(ItemKind.ITEM_KIND_SETTLED, id=job_id, body=settled.SerializeToString())

    async def settle(self, job_id: bytes, number: int = 1) -> Settle:
        """Waits for the number-th Settle of a job."""

        def found() -> list[bytes]:
            return [body for of, body in self.came if of == job_id]

        await self.seen.until(lambda: len(found()) >= number)
        return Settle.FromString(found()[number - 1])

    def count(self, job_id: bytes) -> int:
        """How often a job's Settle came."""
        return sum(of == job_id for of, _ in self.came)


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
