"""The scheduler's pure cores between short helpers: a clock that is turned by hand, nodes and jobs by name."""

from collections.abc import Sequence
from typing import Any, TypeVar

from gpumesh_scheduler.domain.board import Board
from gpumesh_scheduler.domain.effects import Effect, Effects, JobEnded, SendCancel, SendOffer, TellCaller
from gpumesh_scheduler.domain.job import Job
from gpumesh_scheduler.domain.nouns import Build, Limits, NodeStatus, ServedModel, Terms
from gpumesh_scheduler.domain.roster import Roster
from gpumesh_scheduler.domain.session import Session, Try

BUILD = Build("tiny", "r1")
CALLER = 7
E = TypeVar("E", bound=Effect)


def job_id(number: int) -> bytes:
    """The 16-byte id of job `number`."""
    return number.to_bytes(16, "big")


class Books:
    """A board and a roster at time `now`, seconds. Every effect is kept in `effects`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.now = 100.0
        self.board = Board(self.limits, lambda: 0.0)
        self.roster = Roster(self.board, self.limits)
        self.effects: list[Effect] = []
        self._counters: dict[str, int] = {}

    def note(self, effects: Effects) -> Effects:
        """Keeps effects."""
        self.effects += effects
        return effects

    def of(self, kind: type[E]) -> list[E]:
        """Effects of one kind, in order."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

    # ---- nodes ---------------------------------------------------------------------------------------------------------------

    def status(
        self, *, slots: int = 1, ready: bool = True, running: Sequence[tuple[bytes, int]] = (), **fields: Any
    ) -> NodeStatus:
        """A report of one model."""
        draining = fields.pop("draining", False)
        return NodeStatus((ServedModel(BUILD, slots, ready=ready, **fields),), frozenset(running), draining)

    def node(self, node_id: str = "n1", **fields: Any) -> Session:
        """A session that opens."""
        counter = self._counters[node_id] = self._counters.get(node_id, 0) + 1
        session = Session(self.roster.new_id(), node_id, "acme", counter, self.now)
        self.roster.check(node_id, counter)
        self.note(self.roster.open(session, self.status(**fields), self.now))
        return session

    def heartbeat(self, session: Session, **fields: Any) -> None:
        """A report of a session."""
        self.note(self.roster.status(session, self.status(**fields), self.now))

    def close(self, session: Session, reason: Any) -> None:
        """A session's link ends."""
        self.note(self.roster.closed(session, reason, self.now))

    # ---- jobs ----------------------------------------------------------------------------------------------------------------

    def submit(self, number: int = 1, attempt: int = 1, **fields: Any) -> Job:
        """A job comes in with 10 + 10 tokens and an hour."""
        terms = Terms(
            job_id=job_id(number),
            attempt=attempt,
            model=fields.pop("model", BUILD.key),
            modality=1,
            features=fields.pop("features", frozenset()),
            max_output_tokens=10,
            input_tokens_estimate=10,
            streaming=fields.pop("streaming", True),
            deadline_at=self.now + fields.pop("deadline_s", 3600.0),
            window_bytes=fields.pop("window_bytes", 256 * 1024),
            **fields,
        )
        payload = self.board.admit(terms, b"{}", 0)
        self.note(self.board.submit(terms, payload, CALLER, self.now))
        return self.board.jobs.get(terms.job_id) or self.of(JobEnded)[-1].job

    def accept(self, job: Job) -> None:
        """Its node takes it."""
        assert job.current is not None
        self.board.accept(job.current.session, job.id, job.fence, self.now)

    def frame(
        self, job: Job, seq: int, *, content: bool = True, size: int = 300, fence: int | None = None, tokens: int = 0
    ) -> Any:
        """A frame from its node."""
        assert job.current is not None
        return job.frame(
            job.current.session, job.fence if fence is None else fence, seq, content, size, tokens or seq, self.now
        )

    def done(self, job: Job, seq: int) -> None:
        """Its node is done."""
        assert job.current is not None
        _, _, effects = self.board.done(job.current.session, job.id, job.fence, seq, seq, self.now)
        self.note(effects)

    def error(self, job: Job, seq: int, reason: Any, *, retryable: bool = True) -> Any:
        """Its node fails."""
        assert job.current is not None
        verdict, _, effects = self.board.error(job.current.session, job.id, job.fence, seq, reason, retryable, self.now)
        self.note(effects)
        return verdict

    def cancel(self, job: Job, reason: Any) -> None:
        """Its caller gives up."""
        self.note(self.board.cancel(job.id, 0, reason, 0, self.now))

    def ack(self, attempt: Try) -> None:
        """A node has stopped a try."""
        _, effects = self.board.cancel_ack(attempt.session, attempt.job_id, attempt.fence, self.now)
        self.note(effects)

    def later(self, seconds: float) -> None:
        """Time passes, and timers with it."""
        self.now += seconds
        self.note(self.board.tick(self.now))

    # ---- what came of it -------------------------------------------------------------------------------------------------------

    def offers(self) -> list[tuple[str, int]]:
        """(node, fence) of all offers."""
        return [(effect.attempt.session.node_id, effect.attempt.fence) for effect in self.of(SendOffer)]

    def cancels(self) -> list[tuple[str, str]]:
        """(node, reason) of all cancels."""
        return [(effect.session.node_id, effect.reason.value) for effect in self.of(SendCancel)]

    def errors(self) -> list[str]:
        """Reasons of all errors to callers."""
        return [effect.error.reason.value for effect in self.of(TellCaller)]

    def ends(self) -> list[str]:
        """Outcomes of all jobs."""
        return [effect.outcome.name for effect in self.of(JobEnded)]
