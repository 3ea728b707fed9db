"""The one task that writes a link's messages: wait, yield once, take what is due, write, one message in flight."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import grpc.aio

from gpumesh_runtime.link.liveness import Liveness
from gpumesh_runtime.link.receiver import LinkDown
from gpumesh_runtime.link.send_queue import NEVER, SendQueue
from gpumesh_runtime.link.stats import LinkStats

# Above every level of a push: the writer is awake, or in a write, and looks at the queue itself.
_AWAKE: Final = 99


class Writer:
    """Turns a SendQueue into messages. wake_level is the level of push from which wake() must be called."""

    def __init__(
        self, queue: SendQueue, liveness: Liveness, stats: LinkStats, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        self.wake_level = _AWAKE
        self.counts_as_beat = True  # any message is proof of life, unless heartbeats carry a body of their own
        self._queue = queue
        self._liveness = liveness
        self._stats = stats
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
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
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def stalled_s(self, now: float) -> float:
        """How long the message in flight has been waiting for the other side to read."""
        return 0.0 if self._write_began is None else now - self._write_began

    async def drained(self) -> None:
        """Waits until nothing is queued or in flight. Raises LinkDown when the link ends first."""
        if self._stopped:
            raise LinkDown
        if self._idle and not len(self._queue):
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._drain_waiters.append(waiter)
        await waiter

    async def _run(self) -> None:
        queue, stats, liveness = self._queue, self._stats, self._liveness
        take, due, write, time = queue.take, queue.due, self._write, self._loop.time
        sleep = asyncio.sleep
        try:
            while True:
                at, level = due()
                now = time()
                if at > now:
                    await self._sleep(at, now, level)
                    continue
                # Once round the loop: whoever is ready in this turn gets its items into this message (link.md rule 1).
                await sleep(0)
                now = time()
                message = take(now)
                if message is None:
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
            # The stream is broken. The reader says how the link ended: a Goodbye may still be waiting to be read.
            self._write_began = None

    async def _sleep(self, at: float, now: float, level: int) -> None:
        if not len(self._queue):
            self._idle = True
            for drained in self._drain_waiters:
                if not drained.done():
                    drained.set_result(None)
            self._drain_waiters.clear()
        waiter = self._waiter = self._loop.create_future()
        self.wake_level = level
        timer = self._loop.call_later(at - now, self.wake) if at < NEVER else None
        try:
            await waiter
        finally:
            self._idle = False
            self.wake_level = _AWAKE
            self._waiter = None
            if timer is not None:
                timer.cancel()
