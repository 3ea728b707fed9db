"""The one task that writes a link's messages: wait, yield once, take what is due, write, one message in flight."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import grpc.aio

from gpumesh_runtime.link.liveness import Liveness
from gpumesh_runtime.link.receiver import LinkDown
from gpumesh_runtime.link.send_queue import NEVER, RIDES, SendQueue
from gpumesh_runtime.link.stats import LinkStats

# Above every level of a push: the writer is awake, or in a write, and looks at the queue itself.
_AWAKE: Final = 99
# No clock of a loop is finer than this.
_PAST_S: Final = 1e-6


class Writer:
    """Turns a SendQueue into messages. wake_level is the level of push from which wake() must be called."""

    def __init__(
        self,
        queue: SendQueue,
        liveness: Liveness,
        stats: LinkStats,
        write: Callable[[bytes], Awaitable[None]],
        on_broken: Callable[[], None],
    ) -> None:
        """on_broken is called once when the task ends by itself: nothing can be written any more."""
        self.wake_level = _AWAKE
        self.counts_as_beat = True  # any message is proof of life, unless heartbeats carry a body of their own
        self._queue = queue
        self._liveness = liveness
        self._stats = stats
        self._write = write
        self._on_broken = on_broken
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_began: float | None = None
        self._drain_waiters: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._idle = False

    def start(self) -> None:
        """Begins to write."""
        self._task = self._loop.create_task(self._run(), name="link-writer")

    def stop(self) -> None:
        """Ends the task; what is queued stays unwritten."""
        self._stopped = True
        self.wake_level = _AWAKE
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        for waiter in self._drain_waiters:
            if not waiter.done():
                waiter.set_exception(LinkDown())
        self._drain_waiters.clear()

    async def joined(self) -> None:
        """Waits for the task's end, after stop()."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def last_words(self, within_s: float) -> None:
        """After stop(): writes one more message, unless one was in flight (a cut message can't be followed by another)."""
        message = self._queue.take(self._loop.time())
        if self._write_began is not None or message is None:
            return
        try:
            async with asyncio.timeout(within_s):
                await self._write(message)
        except (TimeoutError, grpc.RpcError, asyncio.InvalidStateError, OSError, grpc.aio.BaseError):
            pass  # the stream is gone: there is nobody to tell

    def wake(self) -> None:
        """Ends the writer's sleep."""
        self.wake_level = _AWAKE
        self._idle = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def stalled_s(self, now: float) -> float:
        """How long the message in flight has been waiting for the other side to read."""
        return 0.0 if self._write_began is None else now - self._write_began

    async def drained(self) -> None:
        """Waits until nothing is queued or in flight. Raises LinkDown when the link ends first."""
        if self._stopped:
            raise LinkDown
        if self._idle and self._queue.empty:
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._drain_waiters.append(waiter)
        await waiter

    async def _run(self) -> None:
        queue, stats, liveness = self._queue, self._stats, self._liveness
        take, write, time, sleep = queue.take, self._write, self._loop.time, asyncio.sleep
        try:
            while True:
                if queue.empty:
                    self._resolve_drained()
                    await self._pause(RIDES)
                # Once round the loop: whoever is ready in this turn gets its items into this message (link.md rule 1).
                await sleep(0)
                now = time()
                message = take(now)
                if message is None:
                    at, level = queue.due()
                    if at > now:
                        await self._pause(level, at - now)
                    continue
                self._write_began = now
                await write(message)
                self._write_began = None
                stats.messages_out += 1
                stats.items_out += queue.taken_items
                stats.bytes_out += len(message)
                if self.counts_as_beat:
                    liveness.sent_at = now
        except (grpc.RpcError, asyncio.InvalidStateError, OSError, grpc.aio.BaseError):
            pass  # the stream is broken; on_broken says so
        finally:
            if not self._stopped:
                self._write_began = None
                self._on_broken()

    def _pause(self, level: int, seconds: float = NEVER) -> "asyncio.Future[None]":
        """A future that ends with a push of `level` or more, or after `seconds`."""
        self._waiter = waiter = self._loop.create_future()
        self.wake_level = level
        if seconds < NEVER / 2:
            # Beyond the instant: sums of floats that fall short of it would have us look again and again until the clock moves.
            self._timer = self._loop.call_later(seconds + _PAST_S, self.wake)
        return waiter

    def _resolve_drained(self) -> None:
        self._idle = True
        for drained in self._drain_waiters:
            if not drained.done():
                drained.set_result(None)
        self._drain_waiters.clear()
