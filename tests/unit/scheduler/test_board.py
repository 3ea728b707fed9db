"""Each row of the job's life: what happens to it, to its slot, and what its caller hears."""

import pytest

from gpumesh_runtime.error_types import Conflict, MeshError, ResourceExhausted, Unavailable
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.effects import JobEnded, SendOffer, TellCaller
from gpumesh_scheduler.domain.job import JobState, Verdict
from gpumesh_scheduler.domain.nouns import Limits, NodeBreachError, fence_of
from tests.unit.scheduler.books import Books, job_id


def used(books: Books) -> int:
    return sum(seat.used for session in books.roster.sessions.values() for seat in session.seats.values())


def test_a_job_is_offered_at_once_when_a_slot_is_free() -> None:
    books = Books()
    books.node()
    job = books.submit()
    assert books.offers() == [("n1", fence_of(1, 1))]
    assert job.state == JobState.OFFERED
    assert used(books) == 1


def test_a_job_waits_when_all_slots_are_taken_and_runs_when_one_is_free() -> None:
    books = Books()
    books.node(slots=1)
    first, second = books.submit(1), books.submit(2)
    assert second.state.name == "QUEUED"
    books.accept(first)
    books.done(first, 0)
    assert second.state.name == "OFFERED"
    assert books.ends() == ["COMPLETED"]


def test_jobs_of_a_model_run_in_the_order_in_which_they_came() -> None:
    books = Books()
    jobs = [books.submit(number) for number in range(1, 4)]
    books.node(slots=1)
    for job in jobs:
        assert job.state == JobState.OFFERED
        books.done(job, 0)
    assert [effect.job for effect in books.of(SendOffer)] == jobs


def test_a_job_waits_for_the_revision_that_its_ticket_names() -> None:
    books = Books()
    books.node()
    job = books.submit(model=("tiny", "r2"))
    assert job.state == JobState.QUEUED


def test_a_rejected_offer_goes_to_another_node_with_a_higher_fence() -> None:
    books = Books()
    first, second = books.node("n1"), books.node("n2")
    job = books.submit()
    took = job.current.session if job.current else first
    books.note(books.board.reject(took, job.id, job.fence, Reason.NODE_REJECTED, books.now))
    other = second if took is first else first
    assert books.offers() == [(took.node_id, fence_of(1, 1)), (other.node_id, fence_of(1, 2))]
    assert used(books) == 1


def test_a_rejected_job_keeps_its_place_before_later_ones() -> None:
    books = Books()
    node = books.node("n1", slots=1)
    first, second = books.submit(1), books.submit(2)
    books.node("n2", slots=1)  # takes the second
    third = books.submit(3)
    books.note(books.board.reject(node, first.id, first.fence, Reason.NODE_REJECTED, books.now))
    # n1 is excluded for the first, so n1 takes the third; the first is next when n2 is free.
    assert third.state == JobState.OFFERED
    fourth = books.submit(4)
    books.done(second, 0)
    assert first.state == JobState.OFFERED
    assert fourth.state == JobState.QUEUED


def test_an_offer_that_is_not_answered_in_2_s_is_cancelled_and_tried_elsewhere() -> None:
    books = Books()
    books.node("n1")
    job = books.submit()
    books.node("n2")
    books.later(1.9)
    assert len(books.offers()) == 1
    books.later(0.2)
    assert books.cancels() == [("n1", "ACCEPT_TIMEOUT")]
    assert [node for node, _ in books.offers()] == ["n1", "n2"]
    assert job.state == JobState.OFFERED


def test_the_slot_of_a_cancelled_try_stays_taken_until_its_node_says_that_it_stopped() -> None:
    books = Books()
    books.node("n1", slots=1)
    job = books.submit()
    attempt = job.current
    assert attempt is not None
    books.cancel(job, Reason.CLIENT_GONE)
    assert books.ends() == ["CANCELLED"]
    assert used(books) == 1
    books.ack(attempt)
    assert used(books) == 0


def test_a_60_s_silent_prefill_is_no_failure_and_121_s_are() -> None:
    books = Books()
    books.node("n1")
    job = books.submit()
    books.accept(job)
    for _ in range(24):
        books.later(5.0)
    assert job.state == JobState.ACCEPTED
    books.node("n2")
    books.later(1.0)
    assert books.cancels() == [("n1", "FIRST_TOKEN_TIMEOUT")]
    assert [node for node, _ in books.offers()] == ["n1", "n2"]


def test_frames_without_content_do_not_commit_the_job_to_its_try() -> None:
    books = Books()
    first = books.node("n1")
    job = books.submit()
    books.accept(job)
    assert books.frame(job, 1, content=False) is Verdict.RELAY
    books.node("n2")
    books.close(first, Reason.NODE_LOST)
    assert [node for node, _ in books.offers()] == ["n1", "n2"]
    assert books.errors() == []


def test_a_node_lost_before_content_costs_a_try_and_the_client_sees_nothing() -> None:
    books = Books()
    first = books.node("n1")
    job = books.submit()
    books.accept(job)
    books.close(first, Reason.NODE_LOST)
    assert job.state == JobState.QUEUED
    books.node("n2")
    assert books.offers()[-1] == ("n2", fence_of(1, 2))
    assert books.ends() == []


def test_a_node_lost_after_content_ends_the_answer_with_an_error() -> None:
    books = Books()
    node = books.node("n1")
    books.node("n2")
    job = books.submit()
    session = job.current.session if job.current else node
    books.accept(job)
    assert books.frame(job, 1) is Verdict.COMMIT
    books.close(session, Reason.NODE_LOST)
    assert books.errors() == ["ANSWER_INTERRUPTED"]
    assert books.ends() == ["FAILED"]
    assert len(books.offers()) == 1


def test_three_tries_are_all_over_all_attempts() -> None:
    books = Books()
    for name in ("n1", "n2", "n3", "n4"):
        books.node(name)
    job = books.submit(tries_used=1)
    for _ in range(2):
        assert job.current is not None
        books.error(job, 0, Reason.ENGINE_ERROR)
    assert books.errors() == ["TRIES_EXHAUSTED"]
    assert books.of(TellCaller)[0].error.metadata == {"last_reason": "ENGINE_ERROR"}
    assert len({node for node, _ in books.offers()}) == 2
    assert used(books) == 0


def test_the_only_node_of_a_model_is_tried_again_since_there_is_no_other() -> None:
    books = Books()
    books.node("n1")
    job = books.submit()
    books.error(job, 0, Reason.ENGINE_ERROR)
    assert books.offers() == [("n1", fence_of(1, 1)), ("n1", fence_of(1, 2))]


def test_a_failure_that_another_node_cannot_mend_goes_to_the_caller_as_it_is() -> None:
    books = Books()
    books.node("n1")
    books.node("n2")
    job = books.submit()
    books.accept(job)
    assert books.error(job, 0, Reason.ENGINE_REJECTED, retryable=False) is Verdict.RELAY
    assert len(books.offers()) == 1
    assert books.ends() == ["FAILED"]
    assert books.of(JobEnded)[0].reason == "ENGINE_REJECTED"


def test_an_error_after_content_goes_to_the_caller_even_when_it_says_retryable() -> None:
    books = Books()
    books.node("n1")
    books.node("n2")
    job = books.submit()
    books.accept(job)
    books.frame(job, 1)
    assert books.error(job, 1, Reason.ENGINE_ERROR) is Verdict.RELAY
    assert len(books.offers()) == 1


def test_a_stream_that_is_silent_for_20_s_after_content_is_interrupted() -> None:
    books = Books()
    books.node()
    job = books.submit()
    books.accept(job)
    books.frame(job, 1)
    books.later(19.0)
    assert books.errors() == []
    books.later(1.5)
    books.later(1.0)
    assert books.errors() == ["ANSWER_INTERRUPTED"]
    assert books.cancels() == [("n1", "NODE_STALLED")]


def test_a_slow_but_steady_stream_is_given_20_median_gaps() -> None:
    books = Books()
    books.node()
    job = books.submit()
    books.accept(job)
    books.frame(job, 1)
    for seq in range(2, 40):
        books.later(4.0)
        books.frame(job, seq)
    for _ in range(10):
        books.later(5.0)
    assert books.errors() == []  # 50 s of silence, below 20 x about 4 s
    for _ in range(10):
        books.later(5.0)
    assert books.errors() == ["ANSWER_INTERRUPTED"]


def test_a_node_that_is_held_by_its_window_has_not_stalled() -> None:
    books = Books()
    books.node()
    job = books.submit(window_bytes=1000)
    books.accept(job)
    books.frame(job, 1, size=900)
    for _ in range(20):
        books.later(5.0)
    assert books.errors() == []
    assert job.window(job.fence, 900, 0, books.now)
    for _ in range(5):
        books.later(5.0)
    assert books.errors() == ["ANSWER_INTERRUPTED"]  # it may send now, and does not


def test_a_node_that_is_held_after_frames_of_many_tokens_has_not_stalled() -> None:
    books = Books()
    books.node()
    job = books.submit(window_bytes=131_072)
    books.accept(job)
    for seq in range(1, 8):  # 64 tokens in each: to node and caller these seven are a whole window
        books.frame(job, seq, size=700, tokens=64 * seq)
    for _ in range(20):
        books.later(5.0)
    assert books.errors() == []
    assert job.window(job.fence, 7 * 700, 0, books.now)
    for _ in range(5):
        books.later(5.0)
    assert books.errors() == ["ANSWER_INTERRUPTED"]


def test_an_answer_in_one_piece_is_waited_for_until_its_deadline() -> None:
    books = Books()
    books.node()
    job = books.submit(streaming=False, deadline_s=300.0)
    books.accept(job)
    for _ in range(29):
        books.later(10.0)
    assert books.errors() == []
    books.later(11.0)
    assert books.errors() == ["DEADLINE_EXCEEDED"]
    assert books.cancels() == [("n1", "DEADLINE_EXCEEDED")]


def test_a_job_without_a_node_for_its_model_fails_after_30_s_with_no_capacity() -> None:
    books = Books()
    books.submit()
    books.later(29.0)
    assert books.errors() == []
    books.later(1.1)
    error = books.of(TellCaller)[0].error
    assert (error.reason, error.retryable, error.retry_after_s) == (Reason.NO_CAPACITY, False, 5.0)


def test_a_job_whose_nodes_stay_busy_times_out_in_the_queue() -> None:
    books = Books()
    books.node(slots=1)
    books.accept(books.submit(1))
    books.submit(2)
    books.later(30.1)
    assert books.errors() == ["QUEUE_TIMEOUT"]


def test_a_deadline_ends_a_job_that_waits() -> None:
    books = Books()
    books.submit(deadline_s=3.0)
    books.later(3.1)
    assert books.errors() == ["DEADLINE_EXCEEDED"]
    assert not books.board.jobs


def test_a_cancel_of_a_queued_job_ends_it_there() -> None:
    books = Books()
    job = books.submit()
    books.cancel(job, Reason.CLIENT_GONE)
    assert books.ends() == ["CANCELLED"]
    assert books.cancels() == []
    books.node()
    assert books.offers() == []


def test_a_cancel_of_an_earlier_attempt_changes_nothing() -> None:
    books = Books()
    job = books.submit(attempt=2)
    assert books.board.cancel(job.id, fence_of(1, 0), Reason.CANCELLED, 0, books.now) == []


def test_a_later_attempt_replaces_an_earlier_one_and_an_earlier_one_is_refused() -> None:
    books = Books()
    books.node(slots=2)
    books.submit(1, attempt=1)
    second = books.submit(1, attempt=2)
    assert second.fence == fence_of(2, 1)
    assert books.cancels() == [("n1", "CANCELLED")]
    assert [effect.final for effect in books.of(JobEnded)] == [False]
    with pytest.raises(Conflict):
        books.submit(1, attempt=2)


def test_a_lost_callers_jobs_are_cancelled_at_their_nodes() -> None:
    books = Books()
    books.node()
    job = books.submit(1)
    books.accept(job)
    books.submit(2)
    books.note(books.board.caller_lost(7, books.now))
    assert books.cancels() == [("n1", "CLIENT_GONE")]
    assert books.ends() == ["FAILED", "FAILED"]
    assert [effect.final for effect in books.of(JobEnded)] == [False, False]
    assert books.errors() == []


def test_only_an_end_that_no_attempt_can_follow_is_settled_from_here() -> None:
    books = Books()
    books.node(slots=4)
    early, late, cancelled = books.submit(1), books.submit(2), books.submit(3)
    books.accept(late)
    books.frame(late, 1)
    books.error(early, 0, Reason.ENGINE_REJECTED, retryable=False)
    books.error(late, 1, Reason.ENGINE_ERROR)
    books.cancel(cancelled, Reason.CLIENT_GONE)
    assert [effect.final for effect in books.of(JobEnded)] == [False, True, True]


def test_a_done_with_another_frame_count_is_the_nodes_fault() -> None:
    books = Books()
    books.node()
    job = books.submit()
    books.accept(job)
    books.frame(job, 1)
    with pytest.raises(NodeBreachError):
        books.done(job, 2)


def test_a_drain_hands_back_what_waits_and_lets_run_what_runs() -> None:
    books = Books()
    books.node(slots=1)
    running = books.submit(1)
    books.accept(running)
    books.submit(2)
    books.note(books.board.drain())
    error = books.of(TellCaller)[0].error
    assert (error.reason, error.retryable) == (Reason.DRAINING, True)
    assert not books.of(JobEnded)[0].final
    with pytest.raises(Unavailable):
        books.submit(3)
    books.done(running, 0)
    assert not books.board.jobs


def test_a_full_queue_and_a_full_payload_store_refuse_by_name() -> None:
    books = Books(Limits(max_queued_per_model=1, max_payload_total_bytes=3))
    books.submit(1)
    with pytest.raises(ResourceExhausted) as refusal:
        books.submit(2)
    assert refusal.value.reason is Reason.QUEUE_FULL
    with pytest.raises(ResourceExhausted) as refusal:
        books.submit(3, model=("other", ""))
    assert refusal.value.reason is Reason.RESOURCE_EXHAUSTED
    books.cancel(books.board.jobs[job_id(1)], Reason.CANCELLED)
    assert books.board.budget.used_bytes == 0


def test_a_job_that_no_free_seat_suits_does_not_hold_up_those_behind_it() -> None:
    books = Books()
    needs_tools = books.submit(1, features=frozenset({1}))
    plain = books.submit(2)
    books.node(slots=1)
    assert needs_tools.state == JobState.QUEUED
    assert plain.state == JobState.OFFERED


def test_a_job_that_had_all_its_tries_elsewhere_is_refused() -> None:
    books = Books()
    books.node()
    books.submit(tries_used=3)
    assert books.errors() == ["TRIES_EXHAUSTED"]
    assert books.offers() == []


def test_a_refusal_is_always_a_mesh_error() -> None:
    books = Books(Limits(max_payload_bytes=1))
    with pytest.raises(MeshError) as refusal:
        books.submit()
    assert refusal.value.reason is Reason.PAYLOAD_TOO_LARGE
