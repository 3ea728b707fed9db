"""Calls that wait for their answer, with deadlines. No timer per call: one per link, set to the earliest deadline."""

import asyncio
from collections.abc import Callable

from gpumesh_runtime.error_types import MeshError

# Called once with (body, None) or (None, error); must not block.
OnAnswer = Callable[[bytes | None, MeshError | None], None]
_Pending = tuple[float, "asyncio.Future[bytes] | None", OnAnswer | None]


class Calls:
    """Pending calls of one link by id."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending: dict[bytes, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def add(
        self, id_: bytes, deadline: float, future: "asyncio.Future[bytes] | None", on_answer: OnAnswer | None
    ) -> None:
        """Notes a call. Raises ValueError when the id is waiting already."""
        if id_ in self._pending:
            raise ValueError("a call of this id is waiting already")
        self._pending[id_] = (deadline, future, on_answer)

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

    def expired(self, now: float) -> list[bytes]:
        """Ids whose deadline has passed."""
        return [id_ for id_, pending in self._pending.items() if pending[0] <= now]

    def next_deadline(self) -> float | None:
        """The earliest deadline, or None."""
        return min((pending[0] for pending in self._pending.values()), default=None)

    def ids(self) -> list[bytes]:
        """All that wait."""
        return list(self._pending)
