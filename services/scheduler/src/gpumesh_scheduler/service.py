"""One scheduler, put together: cores, links, listener, timers, drain. __main__ runs it as a process; tests run it inside theirs."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Final

from gpumesh.common.v1.link_pb2 import GoodbyeReason
from gpumesh.scheduler.v1 import session_service_pb2  # noqa: F401 -- registers the service's descriptor, which holds its access option
from gpumesh.scheduler.v1.capacity_service_pb2_grpc import add_CapacityServiceServicer_to_server
from gpumesh.scheduler.v1.dispatch_service_pb2_grpc import add_DispatchServiceServicer_to_server
from gpumesh.scheduler.v1.operator_service_pb2_grpc import add_OperatorServiceServicer_to_server
from gpumesh.scheduler.v1.session_service_pb2_grpc import add_SessionServiceServicer_to_server
from gpumesh_runtime.link import SERVICE_LINK, LinkClient
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.metrics import REGISTRY
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.sealing import KeyRing
from gpumesh_scheduler import metrics
from gpumesh_scheduler.capacity import Watchers
from gpumesh_scheduler.config import SchedulerSettings, new_boot_id
from gpumesh_scheduler.desk import Desk
from gpumesh_scheduler.directory import Directory
from gpumesh_scheduler.domain.gate import RateGate
from gpumesh_scheduler.nodes import Nodes
from gpumesh_scheduler.seals import Seals
from gpumesh_scheduler.servicer import CapacityServicer, DispatchServicer, OperatorServicer, SessionServicer
from gpumesh_scheduler.settlement import Settlement

log = get_logger("gpumesh.scheduler.service")

# One task drives all timers. Jobs are looked at each tick, the rest every so many ticks.
_TICK_S: Final = 0.05
_CHANGES_EVERY: Final = 4
_SWEEP_EVERY: Final = 5
_WHOLE_EVERY: Final = 20
# What a drain leaves to settlement once the last job has ended; callers and nodes present again what is not settled by then.
_SETTLE_S: Final = 5.0


class Service:
    """One scheduler replica. Strong references to everything that must live are kept here."""

    def __init__(self, settings: SchedulerSettings, begin_drain: Callable[[], None]) -> None:
        self.settings = settings
        tls = settings.tls()
        self.desk = Desk(
            settings.limits(),
            settings.waits(),
            Seals(KeyRing(settings.key_ring)),
            scheduler_id=settings.scheduler_id,
            boot_id=new_boot_id(),
            time=asyncio.get_running_loop().time,
            wall_ns=time.time_ns,
            random=random.random,
            tick_s=_TICK_S,
        )
        gate = RateGate(settings.max_sessions_per_s, max(1.0, settings.max_sessions_per_s))
        self.nodes = Nodes(self.desk, gate, heartbeat_s=settings.heartbeat_s, addresses=settings.scheduler_addresses)
        self.settlement = Settlement(self.desk, settings.metering_address, tls)
        self.directory = Directory(self.desk, settings.registry_address, tls) if settings.registry_address else None
        self.watchers: Watchers | None = None
        self.server = Server("scheduler", settings.listen_address, tls, development=settings.development)
        self._begin_drain = begin_drain

    @property
    def clients(self) -> list[LinkClient]:
        """Links that this process opens; their run() belongs in tasks."""
        return [self.settlement.client, *([self.directory.client] if self.directory else [])]

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.port

    async def start(self) -> None:
        """Listens. Raises AddressInUseError."""
        settings, desk = self.settings, self.desk
        host = settings.listen_address.rpartition(":")[0]
        wanted = settings.advertised_address or settings.listen_address
        self.watchers = watchers = Watchers(desk, wanted)
        node_link = settings.node_link()
        self.server.add(SessionServicer(self.nodes, node_link), add_SessionServiceServicer_to_server)
        self.server.add(DispatchServicer(desk, SERVICE_LINK), add_DispatchServiceServicer_to_server)
        self.server.add(CapacityServicer(watchers, SERVICE_LINK), add_CapacityServiceServicer_to_server)
        self.server.add(OperatorServicer(desk, self.nodes, self._begin_drain), add_OperatorServiceServicer_to_server)
        await self.server.start()
        if not settings.advertised_address:
            watchers.advertise(f"{host}:{self.server.port}")
        REGISTRY.before_scrape(self._fill_gauges)
        log.info("scheduler started", boot_id=desk.boot_id, port=self.server.port)

    async def run_timers(self) -> None:
        """Drives every timer, for ever."""
        desk, watchers = self.desk, self.watchers
        assert watchers is not None
        turn = 0
        while True:
            await asyncio.sleep(_TICK_S)
            turn += 1
            now = desk.time()
            desk.apply(desk.board.tick(now))
            if turn % _SWEEP_EVERY == 0:
                self.nodes.hear()
                desk.apply(desk.roster.sweep(now))
                desk.settle(desk.reconciler.sweep(now))
                if self.settlement.client.link is not None:
                    desk.settle(desk.reconciler.unanswered(now))
            if turn % _WHOLE_EVERY == 0:
                watchers.tell_whole()
            elif turn % _CHANGES_EVERY == 0:
                watchers.tell_changes()

    async def drain(self) -> None:
        """Takes nothing new, hands back what waits, lets run what runs (drain_s at most), settles what it can, closes all links."""
        desk, limit_s = self.desk, self.settings.drain_s
        desk.apply(desk.board.drain())
        if self.watchers is not None:
            self.watchers.tell_whole()
        drain_ms = round(limit_s * 1000)
        for link in [*desk.callers.values(), *desk.nodes.values()]:
            link.goodbye(GoodbyeReason.GOODBYE_REASON_DRAIN, drain_ms)
        log.info("draining", jobs=len(desk.board.jobs))
        await self._until(lambda: not desk.board.jobs, limit_s)
        await self._until(lambda: not desk.reconciler.cases, min(_SETTLE_S, limit_s))
        log.info("drained", jobs=len(desk.board.jobs), count=len(desk.reconciler.cases))
        links = [*desk.callers.values(), *desk.nodes.values(), *(self.watchers.links if self.watchers else ())]
        await asyncio.gather(*(link.close() for link in links), *(client.stop() for client in self.clients))
        await self.server.stop(1.0)

    async def _until(self, done: Callable[[], bool], limit_s: float) -> None:
        end = self.desk.time() + limit_s
        while not done() and self.desk.time() < end:  # noqa: ASYNC110 -- once per process, and many things change what is waited for
            await asyncio.sleep(_TICK_S)

    def _fill_gauges(self) -> None:
        board, roster, reconciler = self.desk.board, self.desk.roster, self.desk.reconciler
        for name in ("ready", "suspect", "draining"):
            metrics.SESSIONS.labels(name).set(0)
        for session in roster.sessions.values():
            metrics.SESSIONS.labels(session.state.name.lower()).add(1)
        metrics.RUNNING.set(len(board.jobs))
        metrics.QUEUED.set(sum(board.queued(key) for key in board.queue.models()))
        metrics.CASES.set(len(reconciler.cases))
        metrics.CASES_DROPPED.set(reconciler.dropped)
        metrics.PAYLOAD.set(board.budget.used_bytes)
