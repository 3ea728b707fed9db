"""What one job has sent and its caller has not yet passed on: bounds how far the node runs ahead, and can be sent again."""

from collections import deque
from typing import Final, Generic, TypeVar

_Frame = TypeVar("_Frame")
# What one delta may cost where it is rendered (an SSE event's JSON around the text); measured by the prototype, see link.md 5.
EVENT_BYTES: Final = 256


class Outbox(Generic[_Frame]):
    """Frames between the node and the client's socket. limit: bytes that may be under way.

    Each frame counts as its body plus 256 bytes per delta, because the caller renders every delta as an event of its own: never less
    than the body + 256 that relays count, so a node that keeps this bound keeps theirs.
    Positions are cumulative (`consumed_seq`), so repeated and late windows are harmless.
    """

    __slots__ = ("_bytes", "_frames", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._frames: deque[tuple[int, int, _Frame]] = deque()
        self._bytes = 0

    @property
    def under_way(self) -> int:
        """Bytes under way."""
        return self._bytes

    def has_room(self, cost: int) -> bool:
        """Whether a frame of this cost may be sent now. One frame always may when nothing is under way, or none ever could."""
        return not self._frames or self._bytes + cost <= self.limit

    def sent(self, seq: int, cost: int, frame: _Frame) -> None:
        """Keeps a frame that was sent. seq: its number, one more than the last."""
        self._frames.append((seq, cost, frame))
        self._bytes += cost

    def on_window(self, consumed_seq: int, limit: int) -> None:
        """The caller has passed on all frames up to consumed_seq. limit 0: unchanged."""
        if limit:
            self.limit = limit
        frames = self._frames
        while frames and frames[0][0] <= consumed_seq:
            self._bytes -= frames.popleft()[1]

    def pending(self) -> list[_Frame]:
        """Frames that the caller has not passed on, in order: sent again on a new session, where repeats are dropped by number."""
        return [frame for _, _, frame in self._frames]


def frame_cost(body_bytes: int, deltas: int) -> int:
    """What a frame counts for: its body and what rendering adds."""
    return body_bytes + EVENT_BYTES * max(1, deltas)
