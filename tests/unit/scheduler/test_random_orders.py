"""Random orders of events: no slot is ever leaked, no job ends twice, fences only grow, nothing is kept of what is over."""

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.effects import EndSession, JobEnded, SendCancel, SendOffer, TellCaller
from gpumesh_scheduler.domain.job import Job, JobState
from gpumesh_scheduler.domain.nouns import Limits, NodeBreachError
from gpumesh_scheduler.domain.session import Session, Try
from tests.unit.scheduler.books import CALLER, Books

NODES = ("n1", "n2", "n3")
SEQS = st.sampled_from((0, 1, 1, 1, 2))


class Orders(RuleBasedStateMachine):
    """Three nodes that come, go, answer, fall silent or lie; jobs that come, are cancelled and come again."""

    def __init__(self) -> None:
        super().__init__()
        limits = Limits(
            accept_s=2.0, first_token_s=10.0, queue_s=15.0, digest_grace_s=3.0, lost_s=25.0, window_grace_bytes=100
        )
        self.books = Books(limits)
        self.number = 0
        self.attempts: Counter[int] = Counter()
        # What nodes still hold: tries that they were offered and have not ended, by node and id of the session.
        self.held: list[Try] = []
        self.read = 0

    # ---- helpers -------------------------------------------------------------------------------------------------------------

    def job(self, index: int) -> Job | None:
        jobs = list(self.books.board.jobs.values())
        return jobs[index % len(jobs)] if jobs else None

    def try_(self, index: int) -> Try | None:
        return self.held[index % len(self.held)] if self.held else None

    def session(self, index: int) -> Session | None:
        sessions = list(self.books.roster.sessions.values())
        return sessions[index % len(sessions)] if sessions else None

    def from_node(self, attempt: Try, act: Any) -> None:
        """What a node sends; a breach ends its session."""
        books = self.books
        if books.roster.sessions.get(attempt.session.node_id) is not attempt.session:
            return
        try:
            act()
        except NodeBreachError:
            books.close(attempt.session, Reason.NODE_PROTOCOL_ERROR)

    def drop(self, attempt: Try) -> None:
        if attempt in self.held:
            self.held.remove(attempt)

    # ---- events --------------------------------------------------------------------------------------------------------------

    @rule(new=st.booleans(), index=st.integers(0, 5), streaming=st.booleans(), tries=st.integers(0, 2))
    def submit(self, new: bool, index: int, streaming: bool, tries: int) -> None:
        if new or not self.number:
            self.number += 1
        number = self.number if new else 1 + index % self.number
        self.attempts[number] += 1
        try:
            self.books.submit(
                number, self.attempts[number], streaming=streaming, tries_used=tries, deadline_s=40.0, window_bytes=1000
            )
        except MeshError:
            return

    @rule(name=st.sampled_from(NODES), slots=st.integers(1, 2))
    def connect(self, name: str, slots: int) -> None:
        self.books.node(name, slots=slots)

    @rule(index=st.integers(0, 5), reason=st.sampled_from((Reason.NODE_LOST, Reason.NODE_DRAINING)))
    def disconnect(self, index: int, reason: Reason) -> None:
        if (session := self.session(index)) is not None:
            self.books.close(session, reason)

    @rule(index=st.integers(0, 5))
    def goodbye(self, index: int) -> None:
        if (session := self.session(index)) is not None:
            self.books.roster.goodbye(session)

    @rule(index=st.integers(0, 9))
    def accept(self, index: int) -> None:
        if (attempt := self.try_(index)) is not None:
            board, now = self.books.board, self.books.now
            self.from_node(attempt, lambda: board.accept(attempt.session, attempt.job_id, attempt.fence, now))

    @rule(index=st.integers(0, 9))
    def reject(self, index: int) -> None:
        if (attempt := self.try_(index)) is not None:
            books = self.books
            self.from_node(
                attempt,
                lambda: books.note(
                    books.board.reject(attempt.session, attempt.job_id, attempt.fence, Reason.NODE_REJECTED, books.now)
                ),
            )
            self.drop(attempt)

    @rule(index=st.integers(0, 9), seq=SEQS, content=st.booleans(), size=st.sampled_from((300, 900)))
    def frame(self, index: int, seq: int, content: bool, size: int) -> None:
        if (attempt := self.try_(index)) is None or (job := self.books.board.jobs.get(attempt.job_id)) is None:
            return
        now, wanted = self.books.now, seq + job.frames
        self.from_node(attempt, lambda: job.frame(attempt.session, attempt.fence, wanted, content, size, wanted, now))

    @rule(index=st.integers(0, 9), wrong=st.sampled_from((0, 0, 0, 1)))
    def done(self, index: int, wrong: int) -> None:
        if (attempt := self.try_(index)) is None:
            return
        books, job = self.books, self.books.board.jobs.get(attempt.job_id)
        seq = (job.frames if job is not None else 0) + wrong
        self.from_node(
            attempt,
            lambda: books.note(
                books.board.done(attempt.session, attempt.job_id, attempt.fence, seq, seq, books.now)[2]
            ),
        )
        self.drop(attempt)

    @rule(index=st.integers(0, 9), retryable=st.booleans())
    def error(self, index: int, retryable: bool) -> None:
        if (attempt := self.try_(index)) is None:
            return
        books, job = self.books, self.books.board.jobs.get(attempt.job_id)
        seq = job.frames if job is not None else 0
        self.from_node(
            attempt,
            lambda: books.note(
                books.board.error(
                    attempt.session, attempt.job_id, attempt.fence, seq, Reason.ENGINE_ERROR, retryable, books.now
                )[2]
            ),
        )
        self.drop(attempt)

    @rule(index=st.integers(0, 9))
    def cancel_ack(self, index: int) -> None:
        if (attempt := self.try_(index)) is not None:
            self.from_node(attempt, lambda: self.books.ack(attempt))
            self.drop(attempt)

    @rule(index=st.integers(0, 9))
    def cancel(self, index: int) -> None:
        if (job := self.job(index)) is not None:
            self.books.cancel(job, Reason.CLIENT_GONE)

    @rule(index=st.integers(0, 9), size=st.integers(0, 3000))
    def window(self, index: int, size: int) -> None:
        if (job := self.job(index)) is not None:
            job.window(job.fence, size, 0, self.books.now)

    @rule(index=st.integers(0, 5), forget=st.booleans(), draining=st.booleans())
    def heartbeat(self, index: int, forget: bool, draining: bool) -> None:
        if (session := self.session(index)) is None:
            return
        running = [] if forget else [(a.job_id, a.fence) for a in self.held if a.session is session]
        self.books.note(self.books.roster.heard(session, self.books.now))
        self.books.heartbeat(session, slots=2, running=running, draining=draining)

    @rule(seconds=st.sampled_from((0.1, 1.0, 2.5, 11.0, 30.0)))
    def time_passes(self, seconds: float) -> None:
        self.books.later(seconds)
        self.books.note(self.books.roster.sweep(self.books.now))

    @precondition(lambda self: self.number > 3)
    @rule()
    def caller_dies(self) -> None:
        self.books.note(self.books.board.caller_lost(CALLER, self.books.now))

    # ---- what must hold --------------------------------------------------------------------------------------------------------

    @invariant()
    def offers_reach_nodes(self) -> None:
        """Takes in what was sent since the last look: the nodes' side of the books."""
        effects = self.books.effects
        for effect in effects[self.read :]:
            if isinstance(effect, SendOffer):
                self.held.append(effect.attempt)
            elif isinstance(effect, EndSession):
                self.held = [attempt for attempt in self.held if attempt.session is not effect.session]
        self.read = len(effects)

    @invariant()
    def slots_are_held_by_exactly_the_tries(self) -> None:
        for session in self.books.roster.sessions.values():
            held = Counter(id(attempt.seat) for attempt in session.tries.values())
            cost = Counter[int]()
            for attempt in session.tries.values():
                cost[id(attempt.seat)] += attempt.cost
            for seat in session.seats.values():
                assert seat.used == held.pop(id(seat), 0)
                assert seat.outstanding_tokens == cost[id(seat)]
                assert (seat.position >= 0) == (seat.block is None)
            assert not held, "a try holds a seat that its session does not have"

    @invariant()
    def a_job_that_runs_holds_its_try_and_one_that_waits_is_queued(self) -> None:
        board = self.books.board
        waiting = [job for key in board.queue.models() for job in board.queue.waiting(key)]
        assert len(waiting) == len(set(map(id, waiting)))
        assert {id(job) for job in waiting} == {id(job) for job in board.jobs.values() if job.state is JobState.QUEUED}
        for job in board.jobs.values():
            assert job.state is not JobState.ENDED
            if job.state is not JobState.QUEUED:
                assert job.current is not None
                assert job.current.session.tries[job.id, job.fence] is job.current
                assert not job.current.cancelled

    @invariant()
    def a_job_ends_once(self) -> None:
        ended = Counter(id(effect.job) for effect in self.books.of(JobEnded))
        told = Counter(id(effect.job) for effect in self.books.of(TellCaller))
        assert all(count == 1 for count in ended.values())
        assert all(count == 1 for count in told.values())

    @invariant()
    def fences_only_grow_and_tries_are_bounded(self) -> None:
        last: dict[bytes, int] = {}
        tries = Counter[tuple[bytes, int]]()
        for effect in self.books.of(SendOffer):
            attempt = effect.attempt
            assert attempt.fence > last.get(attempt.job_id, 0)
            last[attempt.job_id] = attempt.fence
            tries[attempt.job_id, attempt.fence >> 16] += 1
        assert all(count <= self.books.limits.tries for count in tries.values())

    @invariant()
    def payload_is_kept_only_for_jobs_that_may_need_it(self) -> None:
        board = self.books.board
        # "{}" each; the board itself releases at the end, the rim at the first content.
        assert board.budget.used_bytes == 2 * len(board.jobs)

    @invariant()
    def every_try_that_was_taken_away_was_cancelled_at_its_node(self) -> None:
        cancelled = {(id(effect.session), effect.job_id, effect.fence) for effect in self.books.of(SendCancel)}
        for session in self.books.roster.sessions.values():
            for key, attempt in session.tries.items():
                job = self.books.board.jobs.get(key[0])
                if job is None or job.current is not attempt:
                    assert (id(session), *key) in cancelled

    def teardown(self) -> None:
        """Everything goes: nothing is left."""
        books = self.books
        for session in list(books.roster.sessions.values()):
            books.close(session, Reason.NODE_LOST)
        books.note(books.board.caller_lost(CALLER, books.now))
        assert not books.board.jobs
        assert not books.board.pools.pools
        assert not books.board.queue.models()
        assert books.board.budget.used_bytes == 0
        books.later(10_000.0)
        assert len(books.board.wheel) == 0


TestOrders = Orders.TestCase
TestOrders.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
