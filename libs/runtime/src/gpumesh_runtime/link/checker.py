"""Which frames of a job count, and whether its end is whole. Pure."""

from enum import Enum

from gpumesh_runtime.error_types import Conflict
from gpumesh_runtime.reasons import Reason


class FrameVerdict(Enum):
    """What to do with a frame."""

    ACCEPT = "accept"
    DUPLICATE = "duplicate"  # a replay: drop it
    STALE = "stale"  # of a try that a later one replaced: drop and count it
    GAP = "gap"  # frames are missing before it: the job cannot be whole


class MissingFrames(Conflict):
    """Done or Error names another number of frames than arrived."""

    def __init__(self, expected: int, received: int) -> None:
        super().__init__(
            Reason.MISSING_FRAMES,
            f"The answer should have {expected} frames, {received} arrived.",
            metadata={"expected": str(expected), "received": str(received)},
            retryable=False,
        )
        self.expected = expected
        self.received = received


class FrameChecker:
    """Accepts frames 1, 2, 3... of the current fence. A higher fence starts again at 1; a lower one is stale."""

    __slots__ = ("fence", "seq")

    def __init__(self, fence: int = 0, seq: int = 0) -> None:
        self.fence = fence
        self.seq = seq  # last frame accepted

    def frame(self, fence: int, seq: int) -> FrameVerdict:
        """The verdict on frame `seq` of `fence`; ACCEPT takes note of it, GAP does not."""
        if fence != self.fence:
            if fence < self.fence:
                return FrameVerdict.STALE
            self.fence = fence
            self.seq = 0
        if seq == self.seq + 1:
            self.seq = seq
            return FrameVerdict.ACCEPT
        return FrameVerdict.DUPLICATE if seq <= self.seq else FrameVerdict.GAP

    def done(self, seq: int) -> None:
        """Checks the count that Done or Error carries. Raises MissingFrames when it differs from what arrived."""
        if seq != self.seq:
            raise MissingFrames(seq, self.seq)
