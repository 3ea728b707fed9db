"""Calls that wait for their answer, with deadlines. No timer per call: one per link, set to the earliest deadline."""

import asyncio
from collections.abc import Callable

from gpumesh_runtime.error_types import DeadlineExceeded, MeshError
from gpumesh_runtime.reasons import Reason

# Called once with (body, None) or (None, error); must not block.
OnAnswer = Callable[[bytes | None, MeshError | None], None]
_Pending = tuple[float, "asyncio.Future[bytes] | None", OnAnswer | None]


class Calls:
    """Pending calls of one link by id. on_expired(id) is called for each that fails by its deadline, after it has failed."""

    __slots__ = ("_loop", "_on_expired", "_pending", "_timer", "_timer_at")

    def __init__(self, on_expired: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_expired = on_expired
        self._pending: dict[bytes, _Pending] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def __len__(self) -> int:
        return len(self._pending)

    def add(
        self, id_: bytes, timeout_s: float, future: "asyncio.Future[bytes] | None", on_answer: OnAnswer | None
    ) -> None:
        """Notes a call. Raises ValueError when the id is waiting already."""
        if id_ in self._pending:
            raise ValueError("a call of this id is waiting already")
        deadline = self._loop.time() + timeout_s
        self._pending[id_] = (deadline, future, on_answer)
        if self._timer is None or deadline < self._timer_at:
            self._set_timer(deadline)

    def answer(self, id_: bytes, body: bytes) -> bool:
        """Gives a call its answer; False when no call of that id waits."""
        pending = self._pending.pop(id_, None)
        if pending is None:
            return False
        _, future, on_answer = pending
        if future is not None:
            if not future.done():
                future.set_result(body)
        elif on_answer is not None:
            on_answer(body, None)
        return True

    def waits(self, id_: bytes) -> bool:
        """Whether a call of that id waits."""
        return id_ in self._pending

    def fail(self, id_: bytes, error: MeshError) -> bool:
        """Gives a call its error; False when no call of that id waits."""
        pending = self._pending.pop(id_, None)
        if pending is None:
            return False
        _, future, on_answer = pending
        if future is not None:
            if not future.done():
                future.set_exception(error)
        elif on_answer is not None:
            on_answer(None, error)
        return True

    def fail_all(self, error: Callable[[], MeshError]) -> None:
        """Fails all that wait, each with an error of its own, and stops the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for id_ in list(self._pending):
            self.fail(id_, error())

    def _set_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        # Not finer than 10 ms: calls whose deadlines are close together share a look.
        self._timer = self._loop.call_later(max(0.01, deadline - self._loop.time()), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = self._loop.time() + 0.001  # timers may be a rounding early
        for id_ in [id_ for id_, pending in self._pending.items() if pending[0] <= now]:
            self.fail(id_, DeadlineExceeded(Reason.DEADLINE_EXCEEDED, retryable=True))
            self._on_expired(id_)
        earliest = min((pending[0] for pending in self._pending.values()), default=None)
        if earliest is not None:
            self._set_timer(earliest)
