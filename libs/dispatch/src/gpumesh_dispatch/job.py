"""The caller's half of a job, pure: attempts, fences, order of frames, the commit to one try, and what to do when something breaks.

States: placing (an admission is asked for) -> running (submitted) -> committed (content was delivered: this try or none) -> ended.
Time is an argument, in monotonic seconds.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import msgspec

from gpumesh_runtime.error_types import Conflict, MeshError, Unavailable
from gpumesh_runtime.reasons import Reason

# Pending admissions are asked again this long (one-request.md, "Router lost").
ADMIT_FOR_S: Final = 5.0
# A job whose scheduler was lost is placed again this long (one-request.md, "Scheduler lost").
REPLACE_FOR_S: Final = 10.0
# Between two asks. The scheduler's return must be noticed well within 1 s.
ASK_AGAIN_S: Final = 0.15
# Tries of a job over all its attempts (mechanisms.md 1).
MAX_TRIES: Final = 3
# Attempts beyond this mean that something is wrong that waiting does not mend.
MAX_ATTEMPTS: Final = 64

_TRY_BITS: Final = 16
_TRY_MASK: Final = (1 << _TRY_BITS) - 1
# The scheduler is going, gone or another boot than the ticket's: a new admission finds where the job can go, perhaps the same address.
_MOVED: Final = frozenset(
    {
        Reason.DRAINING,
        Reason.LINK_DOWN,
        Reason.SCHEDULER_UNAVAILABLE,
        Reason.TICKET_EXPIRED,
        Reason.TICKET_INVALID,
        Reason.TICKET_REPLAYED,
        Reason.UNKNOWN_JOB,
    }
)
# This scheduler cannot take it, another perhaps can.
_TRY_ANOTHER: Final = frozenset({Reason.QUEUE_FULL, Reason.NO_CAPACITY, Reason.SEND_QUEUE_FULL})


class Verdict(IntEnum):
    """What to do with a frame."""

    DELIVER = 0
    HOLD = 1  # no content yet: another try may still replace it
    DROP = 2  # duplicate, or of a try that was replaced
    GAP = 3  # frames are missing before it


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask for a new admission after `after_s` seconds."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Fail:
    """End the job with this."""

    error: MeshError


class Job(msgspec.Struct):
    """One job. `started` is when it began, monotonic seconds."""

    started: float
    attempt: int = 0
    fence: int = 0
    seq: int = 0
    tokens: int = 0
    committed: bool = False
    ended: bool = False
    stale: int = 0
    tries_before: int = 0
    scheduler_id: str = ""
    excluded: list[str] = []
    place_by: float = 0.0
    placed_at: float = 0.0
    last_error: MeshError | None = None

    def __post_init__(self) -> None:
        self.place_by = self.started + ADMIT_FOR_S

    # --- placing --------------------------------------------------------------------------------------------------------

    def next_attempt(self) -> int:
        """The number of the attempt that the next admission is for. One that was never submitted is asked for again under its number."""
        if self.attempt == 0 or self.fence:
            self.attempt += 1
            self.fence = 0
        return self.attempt

    def admitted(self, scheduler_id: str) -> Fail | None:
        """An admission came. Fail when it leads back to a scheduler that has just refused the job for want of room."""
        if scheduler_id in self.excluded and self.last_error is not None and self.last_error.reason in _TRY_ANOTHER:
            return self._fail(self.last_error)
        self.scheduler_id = scheduler_id
        return None

    def submitted(self, now: float) -> int:
        """Submit goes out; returns its fence."""
        self.placed_at = now
        self.fence = self.attempt << _TRY_BITS
        self.seq = 0
        self.tokens = 0
        return self.fence

    def refused(self, error: MeshError, now: float) -> Retry | Fail:
        """The router refused, or could not be reached."""
        if error.retryable and now + ASK_AGAIN_S < self.place_by:
            return Retry(ASK_AGAIN_S)
        return self._fail(self.last_error if self.last_error is not None and error.retryable else error)

    # --- running --------------------------------------------------------------------------------------------------------

    def frame(self, fence: int, seq: int, tokens: int, content: bool) -> Verdict:
        """A frame came: its header decides."""
        if fence != self.fence:
            if fence < self.fence or self.committed or fence >> _TRY_BITS != self.attempt:
                self.stale += 1
                return Verdict.DROP
            self.fence = fence
            self.seq = 0
            self.tokens = 0
        if seq != self.seq + 1:
            return Verdict.DROP if seq <= self.seq else Verdict.GAP
        self.seq = seq
        if tokens > self.tokens:
            self.tokens = tokens
        if self.committed:
            return Verdict.DELIVER
        if content:
            self.committed = True
            return Verdict.DELIVER
        return Verdict.HOLD

    def done(self, fence: int, seq: int, tokens: int) -> Fail | None:
        """Done came: None when the answer is whole; the caller then ends the job. See `is_stale` first."""
        if seq != (self.seq if fence == self.fence else 0):
            text = f"The answer broke off: {seq} parts were sent, {self.seq} arrived."
            return self._fail(Conflict(Reason.MISSING_FRAMES, text))
        self.fence = fence
        if tokens > self.tokens:
            self.tokens = tokens
        return None

    def is_stale(self, fence: int) -> bool:
        """Whether an end (Done, Error) belongs to a try that a later one replaced. Fence 0 and try 0 mean the attempt as a whole."""
        if self.ended or (fence and fence >> _TRY_BITS != self.attempt):
            return True
        return fence & _TRY_MASK != 0 and fence < self.fence

    def failed(self, fence: int, error: MeshError, now: float) -> Retry | Fail:
        """Error came from the scheduler for the current attempt."""
        if self.committed:
            return self._fail(_broken_off(error))
        self._count_tries(fence)
        reason = error.reason
        if reason in _MOVED:
            if reason is Reason.DRAINING:
                self._exclude()
            return self._again(error, now, ASK_AGAIN_S)
        if reason in _TRY_ANOTHER or (
            error.retryable and reason is not Reason.TRIES_EXHAUSTED and self.tries_before < MAX_TRIES
        ):
            self._exclude()
            return self._again(error, now, 0.0)
        return self._fail(error)

    def scheduler_lost(self, now: float) -> Retry | Fail:
        """The link to its scheduler broke."""
        if self.committed:
            return self._fail(
                Conflict(
                    Reason.ANSWER_INTERRUPTED,
                    "The answer broke off because a part of the mesh went away. You are not charged.",
                )
            )
        self._count_tries(self.fence)
        error = Unavailable(
            Reason.SCHEDULER_UNAVAILABLE,
            "The scheduler went away before the answer began. Try again.",
            retryable=True,
            retry_after_s=1.0,
        )
        return self._again(error, now, 0.0)

    def cannot_submit(self, now: float) -> Retry | Fail:
        """The admission's scheduler cannot be reached."""
        self._exclude()
        error = Unavailable(
            Reason.SCHEDULER_UNAVAILABLE, "No scheduler can be reached. Try again.", retryable=True, retry_after_s=1.0
        )
        return self._again(error, now, ASK_AGAIN_S)

    def end(self) -> None:
        """Cancelled or over: nothing that comes later counts."""
        self.ended = True

    def _count_tries(self, fence: int) -> None:
        self.tries_before += max(fence, self.fence) & _TRY_MASK

    def _exclude(self) -> None:
        if self.scheduler_id and self.scheduler_id not in self.excluded:
            self.excluded.append(self.scheduler_id)

    def _again(self, error: MeshError, now: float, after_s: float) -> Retry | Fail:
        """A further attempt, within REPLACE_FOR_S of the moment when the job lost its place."""
        if self.last_error is None or now - self.placed_at > REPLACE_FOR_S:
            self.place_by = now + REPLACE_FOR_S
        self.last_error = error
        if now + after_s >= self.place_by or self.attempt >= MAX_ATTEMPTS:
            return self._fail(error)
        return Retry(after_s)

    def _fail(self, error: MeshError) -> Fail:
        self.ended = True
        return Fail(error)


def _broken_off(error: MeshError) -> MeshError:
    """What a client hears after content: never "unavailable", which promises that nothing was produced and invites a blind retry."""
    if not isinstance(error, Unavailable):
        return error
    text = f"The answer broke off. {error.message} You are not charged."
    return Conflict(Reason.ANSWER_INTERRUPTED, text, metadata={"cause": error.reason.value})
