"""Words that the cores share. Instants are seconds of one monotonic clock unless a name says otherwise."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

# (catalogue id, revision): a node with another revision of the model may not serve the job.
ModelKey = tuple[str, str]

_TRY_BITS: Final = 16
TRY_MASK: Final = (1 << _TRY_BITS) - 1


def fence_of(attempt: int, try_: int) -> int:
    """attempt << 16 | try: the caller numbers attempts from 1, the scheduler tries from 1; the later wins."""
    return attempt << _TRY_BITS | try_


def attempt_of(fence: int) -> int:
    """The attempt that a fence belongs to."""
    return fence >> _TRY_BITS


class Outcome(IntEnum):
    """How a job ended. The numbers are those of gpumesh.common.v1.JobOutcome (a test compares them)."""

    COMPLETED = 1
    CANCELLED = 2
    FAILED = 3


class NodeBreachError(Exception):
    """A node broke the session's protocol: its session ends, and nothing else does. The text names the rule, never content."""


class Build(NamedTuple):
    """A model as it is computed on a node."""

    model_id: str
    revision: str
    quantisation: str = ""
    engine_name: str = ""
    engine_version: str = ""

    @property
    def key(self) -> ModelKey:
        """What jobs ask for."""
        return (self.model_id, self.revision)


class Usage(NamedTuple):
    """Tokens of one job."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    reasoning_tokens: int = 0


class Party(NamedTuple):
    """Who served a try, and how."""

    provider_id: str
    node_id: str
    build: Build


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as a node reports it. features and modalities are the wire's numbers."""

    build: Build
    slots: int
    context_tokens: int = 0
    features: frozenset[int] = frozenset()
    modalities: frozenset[int] = frozenset()
    ready: bool = True


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What a node reports with Hello and with each heartbeat. running: (job id, fence) of what runs there."""

    models: tuple[ServedModel, ...] = ()
    running: frozenset[tuple[bytes, int]] = frozenset()
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and times of the cores, seconds and bytes; config.py says what each is for."""

    accept_s: float = 2.0
    first_token_s: float = 120.0
    stall_s: float = 20.0
    stall_factor: float = 20.0
    queue_s: float = 30.0
    tries: int = 3
    suspect_s: float = 15.0
    lost_s: float = 25.0
    digest_grace_s: float = 10.0
    # Before its certificate ends a session gets nothing new: what runs has this long to finish.
    reauthenticate_s: float = 120.0
    max_queued_per_model: int = 10_000
    max_sessions: int = 20_000
    max_payload_bytes: int = 8 * 1024 * 1024
    max_payload_total_bytes: int = 256 * 1024 * 1024
    default_window_bytes: int = 256 * 1024
    max_window_bytes: int = 4 * 1024 * 1024
    # One frame of 64 KiB and its overhead: a node may send a frame that begins inside its window.
    window_grace_bytes: int = 64 * 1024 + 256
    max_deadline_s: float = 3600.0
    max_strays: int = 1000
    retry_after_s: float = 5.0


class Terms(NamedTuple):
    """What an admitted job asks for. Times relative to now are already instants."""

    job_id: bytes
    attempt: int
    model: ModelKey
    modality: int
    features: frozenset[int]
    max_output_tokens: int
    input_tokens_estimate: int
    streaming: bool
    deadline_at: float
    window_bytes: int
    tries_used: int = 0
    excluded: frozenset[str] = frozenset()
    traceparent: str = ""
    # SealedTicket as it came; goes into Settle.
    ticket: bytes = b""
    # Claims after this are refused, wall clock, nanoseconds since 1970.
    settle_by_ns: int = 0
    prefix_token_ids: tuple[int, ...] = ()

    @property
    def cost(self) -> int:
        """Tokens that it may take: what choice and capacity count as outstanding."""
        return self.input_tokens_estimate + self.max_output_tokens
