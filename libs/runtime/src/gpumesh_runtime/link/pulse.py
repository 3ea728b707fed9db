"""The timer of a link's life: beats when it is idle, notices silence. The decisions are in liveness.py."""

import asyncio
from collections.abc import Callable

from gpumesh_runtime.link.liveness import Life, Liveness
from gpumesh_runtime.link.writer import Writer


class Pulse:
    """One timer per link. body: when set, heartbeats go at their interval whatever else is sent, with this body."""

    def __init__(
        self,
        liveness: Liveness,
        writer: Writer,
        lost_s: float,
        *,
        beat: Callable[[bytes], None],
        on_suspect: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        """lost_s: how long a message in flight may wait for the other side to read."""
        self.body: Callable[[], bytes] | None = None
        self._liveness = liveness
        self._writer = writer
        self._lost_s = lost_s
        self._beat = beat
        self._on_suspect = on_suspect
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins to look at the clock."""
        self._tick()

    def stop(self) -> None:
        """Ends it."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        now = self._loop.time()
        life, beat = self._liveness.tick(now)
        if life is Life.LOST or self._writer.stalled_s(now) >= self._lost_s:
            self._on_lost()
            return
        if beat:
            self._liveness.sent_at = now
        self._writer.counts_as_beat = self.body is None
        self._timer = self._loop.call_later(self._liveness.next_tick(now), self._tick)
        # Callbacks last: an exception in one of them must not stop the ticks.
        if life is Life.SUSPECT:
            self._on_suspect()
        if beat:
            self._beat(self.body() if self.body else b"")
