"""The machine of one job on the node: offer, payload, accepted, running, then done, cancelled or failed. Pure; time comes in as seconds.

    RECEIVING -> WAITING -> RUNNING -> DONE | CANCELLED | FAILED
        \\__________\\__________\\_____> CANCELLED | FAILED

RECEIVING: accepted, pieces of the payload still come. WAITING: all there, no slot free yet. A job that is refused never becomes a Job.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from gpumesh_node.domain.deltas import Usage

# Bits of an item's flags (gpumesh.common.v1.ItemFlag; a test compares them).
FLAG_FIRST: Final = 1
FLAG_LAST: Final = 2
FLAG_CONTENT: Final = 4


class JobState(Enum):
    """Where a job is."""

    RECEIVING = "receiving"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Outcome(Enum):
    """How a job ended for its receipt. The numbers are those of gpumesh.common.v1.JobOutcome (a test compares them)."""

    COMPLETED = 1
    CANCELLED = 2


class JobError(Exception):
    """The scheduler's items do not fit the job: `param` says which."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Offer:
    """What a scheduler offers. job_id: 16 bytes. fence: attempt * 65536 + try. deadline_s: seconds from receipt, 0: none.

    payload_bytes: how much follows in pieces; 0 with `payload` set. payload is sensitive: never logged.
    window_bytes: how far the node may run ahead before the first Window.
    """

    job_id: bytes
    fence: int
    model_id: str
    modality: int
    max_output_tokens: int
    deadline_s: float
    streaming: bool
    traceparent: str
    receipt_token: bytes
    payload_bytes: int
    payload: bytes
    window_bytes: int
    resumes: bool

    def __repr__(self) -> str:
        return f"Offer(job_id={self.job_id.hex()}, fence={self.fence}, model_id={self.model_id!r})"


@dataclass(frozen=True, slots=True)
class Receipt:
    """A job that this node served, as it claims it. Holds no content."""

    job_id: bytes
    fence: int
    token: bytes
    outcome: Outcome
    usage: Usage


class FrameHeader(NamedTuple):
    """What relays read of a frame. tokens: cumulative."""

    seq: int
    tokens: int
    flags: int


class Job:
    """One try of one job on this node. Methods move it; a move that its state does not allow raises JobError or AssertionError (ours)."""

    __slots__ = (
        "_pieces",
        "_pieces_bytes",
        "content_sent",
        "first_output_at",
        "offer",
        "offered_at",
        "payload",
        "seq",
        "state",
        "tokens",
    )

    def __init__(self, offer: Offer, now: float) -> None:
        self.offer = offer
        self.offered_at = now
        self.first_output_at = 0.0
        self.seq = 0
        self.tokens = 0
        self.content_sent = False
        self._pieces: list[bytes] = []
        self._pieces_bytes = 0
        self.payload = offer.payload
        self.state = JobState.RECEIVING if offer.payload_bytes else JobState.WAITING

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in (JobState.DONE, JobState.CANCELLED, JobState.FAILED)

    def piece(self, seq: int, data: bytes, *, last: bool) -> bool:
        """Takes a piece of the payload, numbered from 1. Returns whether it is complete. Raises JobError on a gap, excess or lack."""
        if self.state is not JobState.RECEIVING:
            raise JobError("a payload piece came for a job that expects none")
        if seq != len(self._pieces) + 1:
            raise JobError("the payload's pieces came out of order")
        self._pieces.append(data)
        self._pieces_bytes += len(data)
        if self._pieces_bytes > self.offer.payload_bytes:
            raise JobError("the payload is longer than the offer said")
        if not last:
            return False
        if self._pieces_bytes < self.offer.payload_bytes:
            raise JobError("the payload is shorter than the offer said")
        self.payload = b"".join(self._pieces)
        self._pieces.clear()
        self.state = JobState.WAITING
        return True

    def start(self) -> bytes:
        """A slot is free: returns the payload, which the job keeps no longer."""
        assert self.state is JobState.WAITING
        self.state = JobState.RUNNING
        payload, self.payload = self.payload, b""
        return payload

    def frame(self, tokens: int, now: float, *, content: bool) -> FrameHeader:
        """The next frame's header. tokens: cumulative; it never goes back."""
        assert self.state is JobState.RUNNING
        self.seq += 1
        flags = 0
        if self.seq == 1:
            flags = FLAG_FIRST
            self.first_output_at = now
        if content:
            flags |= FLAG_CONTENT
            self.content_sent = True
        if tokens > self.tokens:
            self.tokens = tokens
        return FrameHeader(self.seq, self.tokens, flags)

    def done(self, usage: Usage) -> Receipt:
        """The answer is complete."""
        assert self.state is JobState.RUNNING
        self.state = JobState.DONE
        if usage.completion_tokens > self.tokens:
            self.tokens = usage.completion_tokens
        return self._receipt(Outcome.COMPLETED, usage)

    def cancel(self, usage: Usage) -> Receipt | None:
        """Stops it. Returns a receipt when the engine had begun: a job that never ran has nothing to claim."""
        assert not self.ended
        ran = self.state is JobState.RUNNING
        self._end(JobState.CANCELLED)
        return self._receipt(Outcome.CANCELLED, usage) if ran else None

    def fail(self) -> None:
        """It failed: nothing is claimed."""
        assert not self.ended
        self._end(JobState.FAILED)

    def _end(self, state: JobState) -> None:
        self.state = state
        self._pieces.clear()
        self.payload = b""

    def _receipt(self, outcome: Outcome, usage: Usage) -> Receipt:
        return Receipt(self.offer.job_id, self.offer.fence, self.offer.receipt_token, outcome, usage)


def spread(before: int, after: int, sizes: Sequence[int]) -> list[int]:
    """Cumulative token counts of frames that were cut from one piece of the answer: in proportion to their bytes, the last one exact."""
    if len(sizes) == 1:
        return [after]
    total, gone, counts = sum(sizes), 0, []
    for size in sizes:
        gone += size
        counts.append(before + (after - before) * gone // total)
    return counts
