"""What the board asks its rim to do, as data. In order: the rim carries them out one after the other."""

from typing import NamedTuple

from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.job import Job
from gpumesh_scheduler.domain.nouns import Outcome
from gpumesh_scheduler.domain.session import Session, Try


class SendOffer(NamedTuple):
    """Offer the job to `attempt.session`, payload as far as it has come."""

    job: Job
    attempt: Try


class SendCancel(NamedTuple):
    """Tell a node to stop a try."""

    session: Session
    job_id: bytes
    fence: int
    reason: Reason
    delivered_tokens: int = 0


class TellCaller(NamedTuple):
    """End the job at its caller with an Error. `job.fence` and `job.frames` go with it."""

    job: Job
    error: MeshError


class JobEnded(NamedTuple):
    """The one terminal of a job. done: Done was relayed. reason: empty when it completed.

    final: no further attempt of its caller follows from this end, so it is settled from here if the caller dies.
    """

    job: Job
    outcome: Outcome
    reason: str = ""
    final: bool = True
    done: bool = False


class EndSession(NamedTuple):
    """Say Goodbye to a node and close its link; the books have already forgotten the session."""

    session: Session
    reason: Reason


class TryLost(NamedTuple):
    """A job's current try is over and the job is not: it was withdrawn, refused, or lost. For metrics and spans. reason: why."""

    attempt: Try
    reason: Reason


Effect = SendOffer | SendCancel | TellCaller | JobEnded | EndSession | TryLost
Effects = list[Effect]
