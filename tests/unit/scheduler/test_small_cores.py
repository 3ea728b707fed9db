"""Tickets, payloads, timers, queue, choice, the gate: each alone."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.common.v1 import job_pb2
from gpumesh_runtime.error_types import (
    FailedPrecondition,
    InvalidArgument,
    MeshError,
    PermissionDenied,
    ResourceExhausted,
)
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.choice.filters import Block, SeatView, gate, refuses
from gpumesh_scheduler.domain.choice.pick import SAMPLE, best, candidates
from gpumesh_scheduler.domain.gate import RateGate
from gpumesh_scheduler.domain.job import Job, Verdict
from gpumesh_scheduler.domain.nouns import Build, Limits, NodeBreachError, Outcome, ServedModel, Terms
from gpumesh_scheduler.domain.payload import Payload, PayloadBudget
from gpumesh_scheduler.domain.queue import FifoQueue
from gpumesh_scheduler.domain.tickets import ReplayMemory, Ticket, check_ticket
from gpumesh_scheduler.domain.timers import Wheel
from tests.unit.scheduler.books import Books, job_id

JOB = job_id(1)
TICKET = Ticket(JOB, 1, ("m", "r"), "s1", "boot", 1_000, 2_000, 10, 10, 1, frozenset())


def test_outcomes_have_the_wires_numbers() -> None:
    assert {outcome.name: outcome.value for outcome in Outcome} == {
        name.removeprefix("JOB_OUTCOME_"): number for name, number in job_pb2.JobOutcome.items() if number
    }


# ---- tickets -------------------------------------------------------------------------------------------------------------------


def test_a_ticket_is_good_until_its_submit_by() -> None:
    check_ticket(TICKET, JOB, 1, "s1", "boot", 1_000)
    with pytest.raises(FailedPrecondition) as refusal:
        check_ticket(TICKET, JOB, 1, "s1", "boot", 1_001)
    assert (refusal.value.reason, refusal.value.retryable) == (Reason.TICKET_EXPIRED, True)


@pytest.mark.parametrize(
    ("job", "attempt", "scheduler", "boot", "retryable"),
    [
        (job_id(2), 1, "s1", "boot", False),
        (JOB, 2, "s1", "boot", False),
        (JOB, 1, "s2", "boot", True),
        (JOB, 1, "s1", "earlier", True),
    ],
)
def test_a_ticket_for_something_else_is_refused(
    job: bytes, attempt: int, scheduler: str, boot: str, retryable: bool
) -> None:
    with pytest.raises(PermissionDenied) as refusal:
        check_ticket(TICKET, job, attempt, scheduler, boot, 1)
    assert (refusal.value.reason, refusal.value.retryable) == (Reason.TICKET_INVALID, retryable)


def test_a_ticket_works_once_and_is_remembered_until_its_submit_by() -> None:
    memory = ReplayMemory()
    second = 1_000_000_000
    memory.use(JOB, 1, 7 * second, 5 * second)
    with pytest.raises(FailedPrecondition) as refusal:
        memory.use(JOB, 1, 7 * second, 7 * second)
    assert refusal.value.reason is Reason.TICKET_REPLAYED
    memory.use(JOB, 2, 6 * second + 1, 5 * second)
    memory.use(job_id(2), 1, 9 * second, 8 * second - 1)
    assert len(memory) == 2
    memory.use(job_id(3), 1, 9 * second, 8 * second)
    assert len(memory) == 2


def test_the_memory_of_tickets_is_bounded() -> None:
    memory = ReplayMemory(most=1)
    memory.use(JOB, 1, 1_000, 0)
    with pytest.raises(ResourceExhausted):
        memory.use(JOB, 2, 1_000, 0)


# ---- payload -------------------------------------------------------------------------------------------------------------------


def test_pieces_of_a_payload_must_add_up_to_what_was_announced() -> None:
    budget = PayloadBudget(100)
    payload = Payload(b"", 10, 50, budget)
    payload.add(1, b"12345", False)
    assert not payload.complete
    payload.add(2, b"67890", True)
    assert (payload.complete, b"".join(payload.pieces), budget.used_bytes) == (True, b"1234567890", 10)
    payload.release()
    payload.release()
    assert budget.used_bytes == 0


@pytest.mark.parametrize(
    ("seq", "piece", "last"),
    [(2, b"12345", False), (1, b"12345", True), (1, b"1234567890", False), (1, b"12345678901", True)],
)
def test_pieces_that_do_not_fit_are_refused(seq: int, piece: bytes, last: bool) -> None:
    payload = Payload(b"", 10, 50, PayloadBudget(100))
    with pytest.raises(InvalidArgument):
        payload.add(seq, piece, last)


def test_a_payload_has_a_bound_of_its_own_and_one_with_all_others() -> None:
    budget = PayloadBudget(10)
    with pytest.raises(MeshError) as refusal:
        Payload(b"123456", 0, 5, budget)
    assert refusal.value.reason is Reason.PAYLOAD_TOO_LARGE
    Payload(b"", 8, 8, budget)
    with pytest.raises(ResourceExhausted) as full:
        Payload(b"123", 0, 8, budget)
    assert full.value.retryable


# ---- timers, gate ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), max_size=50))
@settings(deadline=None)
def test_the_wheel_gives_back_each_key_once_never_early_and_at_most_a_tick_late(instants: list[float]) -> None:
    wheel = Wheel(0.05)
    for number, at in enumerate(instants):
        wheel.add(job_id(number), at)
    came: dict[bytes, float] = {}
    for step in range(2005):
        now = step * 0.05
        for key in wheel.due(now):
            assert key not in came
            came[key] = now
    assert len(came) == len(instants)
    assert all(at - 1e-6 <= came[job_id(number)] <= at + 0.1001 for number, at in enumerate(instants))
    assert len(wheel) == 0


def test_the_gate_lets_a_burst_through_and_then_its_rate() -> None:
    gate_ = RateGate(10.0, 2.0)
    assert [gate_.take(0.0) for _ in range(2)] == [0.0, 0.0]
    assert gate_.take(0.0) == pytest.approx(0.1)
    assert gate_.take(0.11) == 0.0


# ---- choice ----------------------------------------------------------------------------------------------------------------------


def seat(**fields: object) -> SeatView:
    values: dict[str, object] = {
        "build": Build("m", "r"),
        "slots": 2,
        "modalities": frozenset({1}),
        "context_tokens": 100,
    }
    return SeatView(ServedModel(**(values | fields)))  # type: ignore[arg-type]  # a test's shorthand


def terms(**fields: object) -> Terms:
    values: dict[str, object] = {
        "job_id": JOB,
        "attempt": 1,
        "model": ("m", "r"),
        "modality": 1,
        "features": frozenset(),
        "max_output_tokens": 10,
        "input_tokens_estimate": 10,
        "streaming": True,
        "deadline_at": 1e9,
        "window_bytes": 1000,
    }
    return Terms(**(values | fields))  # type: ignore[arg-type]  # a test's shorthand


def test_a_seat_has_one_reason_and_the_weightiest_first() -> None:
    view = seat(ready=False)
    assert gate(view, Block.SESSION_SUSPECT, False) is Block.SESSION_SUSPECT
    assert gate(view, None, False) is Block.NOT_IN_CATALOGUE
    assert gate(view, None, True) is Block.MODEL_NOT_READY
    view = seat()
    view.used = 2
    assert gate(view, None, True) is Block.NO_FREE_SLOT
    view.used = 1
    assert gate(view, None, True) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"modality": 3}, Block.MODALITY_UNSUPPORTED),
        ({"features": frozenset({1})}, Block.FEATURE_UNSUPPORTED),
        ({"input_tokens_estimate": 100}, Block.CONTEXT_TOO_SMALL),
    ],
)
def test_a_free_seat_says_why_it_cannot_serve_a_job(fields: dict[str, object], reason: Block | None) -> None:
    assert refuses(seat(), "n1", terms(**fields), frozenset()) is reason


def test_an_excluded_node_says_so() -> None:
    assert refuses(seat(), "n1", terms(), frozenset({"n1"})) is Block.NODE_EXCLUDED


def test_the_best_seat_has_fewest_outstanding_tokens_then_most_free_slots() -> None:
    loaded, small, large = seat(), seat(slots=1), seat(slots=8)
    loaded.outstanding_tokens = 5
    assert best([loaded, small, large], lambda: 0.0) is large


def test_equal_seats_are_drawn_evenly() -> None:
    seats = [seat(), seat(), seat()]
    drawn = Counter(seats.index(best(seats, lambda at=at: at / 30)) for at in range(30))  # type: ignore[misc]  # mypy does not infer this lambda
    assert drawn == {0: 10, 1: 10, 2: 10}


def test_many_seats_are_sampled() -> None:
    seats = [seat() for _ in range(100)]
    for at in (0.0, 0.5, 0.99):
        drawn = candidates(seats, lambda at=at: at)  # type: ignore[misc]  # mypy does not infer this lambda
        assert len({id(one) for one in drawn}) == len(drawn) == SAMPLE
    assert candidates(seats[:SAMPLE], lambda: 0.5) == seats[:SAMPLE]


# ---- queue, frames ---------------------------------------------------------------------------------------------------------------


def test_a_job_that_left_the_queue_comes_back_to_its_place() -> None:
    queue = FifoQueue()
    jobs = [Job(terms(job_id=job_id(n)), 1, Payload(b"x", 0, 10, PayloadBudget(100)), 0.0, Limits()) for n in range(4)]
    for job in jobs:
        queue.push(job)
    for index in (0, 2):
        queue.remove(jobs[index])
    queue.push(jobs[2])
    queue.push(jobs[0])
    assert list(queue.waiting(("m", "r"))) == jobs
    for job in jobs:
        queue.remove(job)
        queue.remove(job)
    assert queue.models() == []


def test_frames_are_judged_by_their_header() -> None:
    books = Books()
    node, other = books.node("n1"), books.node("n2")
    job = books.submit(window_bytes=1000)
    owner, stranger = (node, other) if job.current is not None and job.current.session is node else (other, node)
    fence = job.fence
    assert job.frame(owner, fence, 1, False, 300, 1, 1.0) is Verdict.RELAY
    assert job.frame(owner, fence, 1, False, 300, 1, 1.0) is Verdict.DUPLICATE
    assert job.frame(owner, fence - 1, 1, True, 300, 1, 1.0) is Verdict.STALE
    assert job.frame(owner, fence, 2, True, 300, 2, 1.0) is Verdict.COMMIT
    assert job.frame(owner, fence, 3, True, 300, 3, 1.0) is Verdict.RELAY
    for bad_owner, bad_fence, seq in (
        (owner, fence, 5),
        (owner, fence, 0),
        (owner, fence + 1, 1),
        (stranger, fence, 4),
    ):
        with pytest.raises(NodeBreachError):
            job.frame(bad_owner, bad_fence, seq, True, 300, 4, 1.0)
    assert (job.frames, job.tokens) == (3, 3)


def test_a_node_that_runs_over_the_window_breaks_the_protocol() -> None:
    books = Books(Limits(window_grace_bytes=100))
    books.node()
    job = books.submit(window_bytes=1000)
    assert books.frame(job, 1, size=5000) is Verdict.COMMIT  # one frame may always be under way, however large
    with pytest.raises(NodeBreachError):
        books.frame(job, 2, size=300)
    assert job.window(job.fence, 5000, 0, 1.0)
    books.frame(job, 2, size=300)
    books.frame(job, 3, size=800)  # within the grace
    with pytest.raises(NodeBreachError):
        books.frame(job, 4, size=300)


def test_a_window_for_another_try_is_not_passed_on_and_an_absurd_one_opens_nothing() -> None:
    books = Books()
    books.node()
    job = books.submit(window_bytes=1000)
    books.frame(job, 1, size=900)
    assert not job.window(job.fence - 1, 900, 0, 1.0)
    assert job.window(job.fence, 10**9, 10**9, 1.0)
    assert (job.consumed_bytes, job.limit_bytes) == (0, books.limits.max_window_bytes)
