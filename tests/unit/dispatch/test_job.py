"""The caller's half of a job, without a network: fences, order, the commit to one try, and when to place it again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh_dispatch.job import ADMIT_FOR_S, MAX_ATTEMPTS, REPLACE_FOR_S, Fail, Job, Retry, Verdict
from gpumesh_runtime.errors import MeshError, Reason

NOW = 100.0


def placed(now: float = NOW) -> Job:
    """A job whose first attempt was submitted."""
    job = Job(now)
    job.next_attempt()
    job.admitted("s0")
    job.submitted(now)
    return job


def at(job: Job, try_: int) -> int:
    """The fence of a try of the current attempt."""
    return job.attempt << 16 | try_


def error(reason: Reason, *, retryable: bool = True) -> MeshError:
    """An error of that reason."""
    return MeshError.of(reason, "because", retryable=retryable)


def test_frames_are_taken_in_order_and_once() -> None:
    job = placed()
    assert job.frame(at(job, 1), 1, 1, True) is Verdict.DELIVER
    assert job.frame(at(job, 1), 1, 1, True) is Verdict.DROP
    assert job.frame(at(job, 1), 3, 3, True) is Verdict.GAP
    assert job.frame(at(job, 1), 2, 2, True) is Verdict.DELIVER
    assert (job.seq, job.tokens) == (2, 2)


def test_a_later_try_replaces_an_earlier_one_before_content() -> None:
    job = placed()
    assert job.frame(at(job, 1), 1, 0, False) is Verdict.HOLD
    assert job.frame(at(job, 2), 1, 1, True) is Verdict.DELIVER
    assert job.frame(at(job, 1), 2, 5, True) is Verdict.DROP
    assert job.tokens == 1


def test_no_other_try_is_taken_after_content() -> None:
    job = placed()
    job.frame(at(job, 1), 1, 1, True)
    assert job.frame(at(job, 2), 1, 1, True) is Verdict.DROP
    assert job.stale == 1


def test_frames_of_an_earlier_attempt_are_dropped() -> None:
    job = placed()
    old = at(job, 1)
    job.scheduler_lost(NOW)
    job.next_attempt()
    job.submitted(NOW)
    assert job.frame(old, 1, 1, True) is Verdict.DROP
    assert job.is_stale(old)


def test_done_must_count_the_frames_that_came() -> None:
    job = placed()
    job.frame(at(job, 1), 1, 1, True)
    failed = job.done(at(job, 1), 3, 3)
    assert isinstance(failed, Fail)
    assert failed.error.reason is Reason.MISSING_FRAMES


def test_an_answer_without_frames_is_whole() -> None:
    job = placed()
    assert job.done(at(job, 1), 0, 0) is None


def test_a_lost_scheduler_before_content_means_a_new_attempt_at_once() -> None:
    job = placed()
    assert job.scheduler_lost(NOW + 1) == Retry(0.0)
    assert job.next_attempt() == 2


def test_a_lost_scheduler_after_content_ends_the_job() -> None:
    job = placed()
    job.frame(at(job, 1), 1, 1, True)
    decision = job.scheduler_lost(NOW + 1)
    assert isinstance(decision, Fail)
    assert decision.error.reason is Reason.ANSWER_INTERRUPTED


def test_admission_is_asked_again_until_its_deadline_and_then_says_why() -> None:
    job = Job(NOW)
    job.next_attempt()
    away = error(Reason.ROUTER_UNAVAILABLE)
    assert isinstance(job.refused(away, NOW), Retry)
    assert job.next_attempt() == 1, "what was never submitted keeps its number"
    assert job.refused(away, NOW + ADMIT_FOR_S) == Fail(away)


def test_a_refusal_for_good_is_not_asked_again() -> None:
    job = Job(NOW)
    job.next_attempt()
    poor = error(Reason.INSUFFICIENT_BALANCE, retryable=False)
    assert job.refused(poor, NOW) == Fail(poor)


def test_a_replaced_job_is_placed_for_ten_seconds_after_the_loss() -> None:
    job = placed()
    lost_at = NOW + 60
    job.scheduler_lost(lost_at)
    away = error(Reason.SCHEDULER_UNAVAILABLE)
    assert isinstance(job.refused(away, lost_at + REPLACE_FOR_S - 1), Retry)
    assert isinstance(job.refused(away, lost_at + REPLACE_FOR_S), Fail)


@pytest.mark.parametrize("reason", [Reason.DRAINING, Reason.TICKET_EXPIRED, Reason.TICKET_INVALID, Reason.LINK_DOWN])
def test_a_scheduler_that_moved_means_a_new_admission(reason: Reason) -> None:
    job = placed()
    assert isinstance(job.failed(at(job, 0), error(reason, retryable=False), NOW), Retry)


def test_a_full_scheduler_is_excluded_and_its_refusal_stands_when_there_is_no_other() -> None:
    job = placed()
    full = error(Reason.QUEUE_FULL, retryable=False)
    assert isinstance(job.failed(0, full, NOW), Retry)
    job.next_attempt()
    assert job.excluded == ["s0"]
    assert job.admitted("s0") == Fail(full)


def test_tries_are_counted_over_attempts() -> None:
    job = placed()
    assert isinstance(job.failed(at(job, 3), error(Reason.NODE_LOST), NOW), Fail)


def test_an_error_after_content_is_final() -> None:
    job = placed()
    job.frame(at(job, 1), 1, 1, True)
    lost = error(Reason.NODE_LOST)
    failed = job.failed(at(job, 1), lost, NOW)
    assert isinstance(failed, Fail)
    assert failed.error.reason is Reason.ANSWER_INTERRUPTED  # UNAVAILABLE would say that nothing was produced
    assert failed.error.metadata == {"cause": lost.reason.value}


def test_attempts_are_bounded() -> None:
    job = placed()
    now, decision = NOW, None
    for _ in range(MAX_ATTEMPTS + 1):
        decision = job.failed(at(job, 0), error(Reason.TICKET_EXPIRED), now)
        if isinstance(decision, Fail):
            break
        now += 0.01
        job.next_attempt()
        job.submitted(now)
    assert isinstance(decision, Fail)
    assert job.attempt <= MAX_ATTEMPTS


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.booleans()), max_size=60))
def test_what_is_delivered_is_one_try_in_order_whatever_comes(frames: list[tuple[int, int, bool]]) -> None:
    job = placed()
    delivered: list[tuple[int, int]] = []
    held: list[tuple[int, int]] = []
    for try_, seq, content in frames:
        verdict = job.frame(at(job, try_), seq, seq, content)
        if verdict in (Verdict.HOLD, Verdict.DELIVER):
            if seq == 1:
                held = []
            held.append((try_, seq))
        if verdict is Verdict.DELIVER:
            delivered += held
            held = []
    assert len({try_ for try_, _ in delivered}) <= 1
    assert [seq for _, seq in delivered] == list(range(1, len(delivered) + 1))
