"""One job on this scheduler: one attempt of its caller, up to three tries on nodes. Pure.

QUEUED -> OFFERED -> ACCEPTED -> STREAMING -> ENDED, back to QUEUED from any of the middle ones until content has been relayed.
The machine decides; the board moves slots and queue; the rim sends.
"""

from enum import IntEnum, StrEnum
from math import inf
from typing import Final

from gpumesh_scheduler.domain.nouns import Limits, NodeBreachError, Terms, fence_of
from gpumesh_scheduler.domain.payload import Payload
from gpumesh_scheduler.domain.session import Session, Try

# What a delta counts for where it is rendered (gpumesh_node.domain.outbox.EVENT_BYTES).
_DELTA_BYTES: Final = 256


class JobState(IntEnum):
    """Where a job is."""

    QUEUED = 1
    OFFERED = 2
    ACCEPTED = 3
    STREAMING = 4
    ENDED = 5


class Verdict(IntEnum):
    """What becomes of an item from a node."""

    RELAY = 1
    # First content: relay it, and the job is committed to this try.
    COMMIT = 2
    # Dropped and counted: of a try that a later one replaced, seen before, or of a job that is over.
    STALE = 3
    DUPLICATE = 4
    LATE = 5


class Lapse(StrEnum):
    """Which timer of a job ran out."""

    QUEUE = "QUEUE"
    ACCEPT = "ACCEPT"
    FIRST_TOKEN = "FIRST_TOKEN"  # noqa: S105 -- a timer, not a password
    STALL = "STALL"
    DEADLINE = "DEADLINE"


class Job:
    """State of one job. `caller` names the link that submitted it; `wake` is the earliest instant at which the wheel will look at it."""

    __slots__ = (
        "caller",
        "committed",
        "consumed_bytes",
        "current",
        "excluded",
        "fence",
        "frames",
        "gap_s",
        "last_reason",
        "limit_bytes",
        "limits",
        "opened_at",
        "order",
        "payload",
        "progress_at",
        "queued_at",
        "relayed_bytes",
        "since",
        "state",
        "terms",
        "tokens",
        "tries",
        "try_number",
        "wake",
    )

    def __init__(self, terms: Terms, caller: int, payload: Payload, now: float, limits: Limits) -> None:
        self.terms = terms
        self.caller = caller
        self.payload = payload
        self.limits = limits
        self.state = JobState.QUEUED
        self.fence = fence_of(terms.attempt, 0)
        self.try_number = 0
        self.current: Try | None = None
        self.tries: list[Try] = []
        self.excluded = terms.excluded
        self.committed = False
        self.frames = 0
        self.tokens = 0
        self.relayed_bytes = 0
        self.consumed_bytes = 0
        self.limit_bytes = terms.window_bytes
        self.opened_at = now
        # When it entered the queue first: a requeue keeps its place and its patience.
        self.queued_at = now
        self.order = -1
        # When the present state began, and when the node last made progress.
        self.since = now
        self.progress_at = now
        self.gap_s = 0.0
        self.last_reason = ""
        self.wake = inf

    @property
    def id(self) -> bytes:
        """16 bytes."""
        return self.terms.job_id

    @property
    def tries_left(self) -> int:
        """Over all attempts."""
        return self.limits.tries - self.terms.tries_used - self.try_number

    # ---- the way to a node -------------------------------------------------------------------------------------------------

    def offered(self, attempt: Try, now: float) -> None:
        """The next try begins; everything counted by fence starts again."""
        self.state = JobState.OFFERED
        self.current = attempt
        self.tries.append(attempt)
        self.fence = attempt.fence
        self.frames = 0
        self.tokens = 0
        self.relayed_bytes = 0
        self.consumed_bytes = 0
        self.since = now
        self.progress_at = now
        self.gap_s = 0.0

    def accepted(self, now: float) -> None:
        """The node took it. A repetition changes nothing."""
        if self.state is JobState.OFFERED and self.current is not None:
            self.state = JobState.ACCEPTED
            self.current.accepted = True
            self.since = now

    def withdrawn(self, now: float) -> None:
        """The present try is over and content was not relayed: the job waits again, without the node that had it."""
        if self.current is not None:
            self.excluded |= {self.current.session.node_id}
        self.current = None
        self.state = JobState.QUEUED
        self.since = now

    def ended(self) -> None:
        """Terminal. Nothing follows."""
        self.state = JobState.ENDED
        self.current = None
        self.payload.release()

    # ---- the way back ------------------------------------------------------------------------------------------------------

    def owner(self, session: Session, fence: int) -> Verdict:
        """RELAY when `session` runs the current try `fence`; STALE for an earlier one. Raises NodeBreachError for one that it never had."""
        if fence != self.fence:
            if fence > self.fence:
                raise NodeBreachError("fence was never issued")
            return Verdict.STALE
        if self.current is None:
            return Verdict.LATE
        if self.current.session is not session:
            raise NodeBreachError("job belongs to another node")
        return Verdict.RELAY

    def frame(
        self, session: Session, fence: int, seq: int, content: bool, rendered_bytes: int, tokens: int, now: float
    ) -> Verdict:
        """Judges a frame by its header and takes note of it. Raises NodeBreachError for a gap, a foreign job or a window run over."""
        current = self.current
        if current is None or fence != self.fence or current.session is not session:
            verdict = self.owner(session, fence)
            if verdict is not Verdict.RELAY:
                return verdict
        if seq != self.frames + 1:
            if 0 < seq <= self.frames:
                return Verdict.DUPLICATE
            raise NodeBreachError("a frame is missing")
        under_way = self.relayed_bytes - self.consumed_bytes
        if under_way > 0 and under_way + rendered_bytes > self.limit_bytes + self.limits.window_grace_bytes:
            raise NodeBreachError("window exceeded")
        self.frames = seq
        self.relayed_bytes += rendered_bytes
        if tokens > self.tokens:
            self.tokens = tokens
        if self.state < JobState.STREAMING:
            # Data cannot overtake Accept on a link, but an answer is as good as an acceptance.
            self.accepted(now)
            self.state = JobState.STREAMING
        self._progress(now)
        if content and not self.committed:
            self.committed = True
            return Verdict.COMMIT
        return Verdict.RELAY

    def _progress(self, now: float) -> None:
        """A running median of the gaps between frames that costs two multiplications: each gap moves it 5 % towards itself."""
        gap = now - self.progress_at
        self.progress_at = now
        if self.committed:
            median = self.gap_s
            self.gap_s = (median * 1.05 if gap > median else median * 0.95) if median > 0.001 else max(gap, 0.001)

    def ends(self, session: Session, fence: int, seq: int) -> Verdict:
        """Judges Done or Error. Raises NodeBreachError when its count differs from the frames relayed."""
        verdict = self.owner(session, fence)
        if verdict is Verdict.RELAY and seq != self.frames:
            raise NodeBreachError("frame count differs from the frames that came")
        return verdict

    def window(self, fence: int, consumed_bytes: int, limit_bytes: int, now: float) -> bool:
        """Takes the caller's grant; False when it is of another try and must not be passed on."""
        if fence != self.fence or self.current is None:
            return False
        # The node may have been held until now: its silence counts from here.
        self.progress_at = now
        # Nothing can be consumed that was not relayed.
        if self.consumed_bytes < consumed_bytes <= self.relayed_bytes:
            self.consumed_bytes = consumed_bytes
        if limit_bytes > self.limit_bytes:
            self.limit_bytes = min(limit_bytes, self.limits.max_window_bytes)
        return True

    # ---- time --------------------------------------------------------------------------------------------------------------

    def lapse(self) -> tuple[float, Lapse]:
        """The timer that runs out first as things stand, and when."""
        deadline = self.terms.deadline_at
        at, which = self._state_lapse()
        return (at, which) if at < deadline else (deadline, Lapse.DEADLINE)

    def _state_lapse(self) -> tuple[float, Lapse]:
        limits = self.limits
        if self.state is JobState.QUEUED:
            return self.queued_at + limits.queue_s, Lapse.QUEUE
        if self.state is JobState.OFFERED:
            return self.since + limits.accept_s, Lapse.ACCEPT
        if not self.terms.streaming:
            # One frame at the end: silence says nothing before the deadline.
            return inf, Lapse.DEADLINE
        if not self.committed:
            return self.since + limits.first_token_s, Lapse.FIRST_TOKEN
        patience = max(limits.stall_s, limits.stall_factor * self.gap_s)
        under_way = self.relayed_bytes - self.consumed_bytes
        if under_way > 0:
            # Node and caller count 256 bytes for each delta; a relay sees frames only, and about one token in each delta.
            under_way += under_way * _DELTA_BYTES * self.tokens // self.relayed_bytes
        if under_way * 4 > self.limit_bytes:
            # The client reads slowly: the node may be held by its window. The caller judges slow clients; grants come by quarters.
            return inf, Lapse.STALL
        return self.progress_at + patience, Lapse.STALL
