"""The rim of the caller's half: jobs over links. One object per running job, no task and no queue: everything is a callback.

Dispatcher.run(request, sink) asks for admission, submits, checks and hands on frames, places the job again where that is without risk,
and afterwards releases the hold and keeps the delivered record until metering has committed it.
"""

import asyncio
from typing import Final

from gpumesh.common.v1.link_pb2 import Failure, Item, ItemKind
from gpumesh.scheduler.v1.dispatch_service_pb2 import DeliveredAck
from gpumesh_dispatch.admit import Admitter
from gpumesh_dispatch.deliveries import Deliveries
from gpumesh_dispatch.request import JobRequest, Sink
from gpumesh_dispatch.running import DEFAULT_WINDOW_BYTES, Running
from gpumesh_dispatch.schedulers import SchedulerConnection, Schedulers
from gpumesh_runtime.errors import MeshError, Reason, ResourceExhausted, Unavailable, from_failure
from gpumesh_runtime.link import Link
from gpumesh_runtime.metrics import REGISTRY, gauge
from gpumesh_runtime.tls import TlsIdentity

_TICK_S: Final = 0.25
MAX_JOBS: Final = 20_000
# Payloads are kept for another attempt; all together they may not fill the memory.
MAX_PAYLOAD_BYTES: Final = 1 << 30
_FRAME: Final = int(ItemKind.ITEM_KIND_FRAME)
_DONE: Final = int(ItemKind.ITEM_KIND_DONE)
_ERROR: Final = int(ItemKind.ITEM_KIND_ERROR)
_REJECT: Final = int(ItemKind.ITEM_KIND_REJECT)
_ACK: Final = int(ItemKind.ITEM_KIND_DELIVERED_ACK)
_RUNNING: Final = gauge("gpumesh_dispatch_running_jobs", "Jobs that this caller has running").labels()
_WAITING: Final = gauge(
    "gpumesh_dispatch_unacknowledged_deliveries", "Delivered records that metering has not confirmed"
).labels()


class Dispatcher:
    """Runs jobs for one caller process (the edge, or the router's front door).

    admitter: decides whether and where. credentials: this process's certificate. caller_id: for the other side's logs.
    Not thread-safe: one event loop. start() before run(); drain() and stop() at the end.
    """

    def __init__(
        self,
        admitter: Admitter,
        credentials: TlsIdentity | None,
        caller_id: str,
        *,
        max_jobs: int = MAX_JOBS,
        window_bytes: int = DEFAULT_WINDOW_BYTES,
    ) -> None:
        self.admitter = admitter
        self.window_bytes = window_bytes
        self.schedulers = Schedulers(self, credentials, caller_id)
        self.deliveries = Deliveries(self.schedulers.any_link)
        self.jobs: dict[bytes, Running] = {}
        self.draining = False
        self._max_jobs = max_jobs
        self._payload_bytes = 0
        self._loop = asyncio.get_running_loop()
        self.time = self._loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event = asyncio.Event()
        self.deliveries.on_empty = self._look_idle
        REGISTRY.before_scrape(self._fill_gauges)

    def start(self) -> None:
        """Begins to keep time."""
        self._tick()

    def run(self, request: JobRequest, sink: Sink) -> Running:
        """Starts a job; everything else comes through `sink`, in later turns of the loop (refusals that need no network: in this one).

        Raises Unavailable (DRAINING) and ResourceExhausted (TOO_MANY_JOBS).
        """
        if self.draining:
            raise Unavailable(Reason.DRAINING, "This server is stopping. Try again.", retryable=True, retry_after_s=1.0)
        if len(self.jobs) >= self._max_jobs or self._payload_bytes > MAX_PAYLOAD_BYTES:
            raise ResourceExhausted(
                Reason.TOO_MANY_JOBS, "Too many requests are running here. Try again.", retry_after_s=1.0
            )
        running = Running(self, request, sink)
        self.jobs[request.job_id] = running
        self._payload_bytes += len(request.payload)
        running.start()
        return running

    async def drain(self, timeout_s: float) -> bool:
        """Takes nothing new and waits until all jobs are over and their records acknowledged; False when time ran out."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                while self.jobs or len(self.deliveries):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Ends what still runs and closes the links."""
        self.draining = True
        for running in list(self.jobs.values()):
            running.fail(
                Unavailable(Reason.DRAINING, "This server stopped before the answer was complete. You are not charged.")
            )
        if self._timer is not None:
            self._timer.cancel()
        await self.schedulers.stop()

    # --- called by the jobs ---------------------------------------------------------------------------------------------

    def forget(self, job_id: bytes) -> None:
        """A job is over."""
        running = self.jobs.pop(job_id, None)
        if running is not None:
            self._payload_bytes -= len(running.request.payload)
            if not self.jobs:
                self._look_idle()

    # --- called by the links --------------------------------------------------------------------------------------------

    def scheduler_item(self, connection: SchedulerConnection, link: Link, item: Item) -> None:
        """An item from a scheduler; one of a job that is over is late and dropped."""
        del connection
        kind: int = item.kind
        if kind == _ACK:
            many = DeliveredAck.FromString(item.body).job_ids
            for at in range(0, len(many), 16):
                self.deliveries.acknowledged(many[at : at + 16])
            if not many:
                self.deliveries.acknowledged(item.id)
            return
        running = self.jobs.get(item.id)
        if running is None or running.link is not link:
            return
        if kind == _FRAME:
            running.on_frame(item)
        elif kind == _DONE:
            running.on_done(item)
        elif kind == _ERROR:
            running.on_failure(item.fence, item.seq, from_failure(Failure.FromString(item.body)))
        elif kind == _REJECT:
            running.on_reject(item)

    def scheduler_up(self, connection: SchedulerConnection, link: Link) -> None:
        """A link is new: records that were sent on a dead one go out again."""
        del connection
        self.deliveries.link_up(link, self.time())

    def scheduler_down(self, connection: SchedulerConnection) -> None:
        """A link is gone: jobs without content are placed again, the others have broken off."""
        del connection
        for running in list(self.jobs.values()):
            if running.link is not None and running.link.end is not None:
                running.on_link_lost()

    def scheduler_overflow(self, link: Link, job_id: bytes) -> None:
        """What we queued for a job went over its bound; the scheduler has been told."""
        running = self.jobs.get(job_id)
        if running is not None and running.link is link:
            error: MeshError = ResourceExhausted(
                Reason.SEND_QUEUE_FULL, "The request could not be sent on fast enough. Try again.", retry_after_s=1.0
            )
            running.on_failure(0, 0, error)

    def _tick(self) -> None:
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        now = self.time()
        for running in list(self.jobs.values()):
            if now >= running.deadline:
                running.out_of_time()
        self.deliveries.tick(now)
        self.schedulers.tick(now)

    def _look_idle(self) -> None:
        if not self.jobs and not len(self.deliveries):
            self._idle.set()

    def _fill_gauges(self) -> None:
        _RUNNING.set(len(self.jobs))
        _WAITING.set(len(self.deliveries))
