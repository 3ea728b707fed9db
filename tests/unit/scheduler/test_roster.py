"""Sessions of nodes: silence, replacement, drain, digests, revocation."""

import pytest

from gpumesh_runtime.error_types import Conflict, MeshError, PermissionDenied
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.choice.filters import Block
from gpumesh_scheduler.domain.effects import EndSession
from gpumesh_scheduler.domain.job import JobState
from gpumesh_scheduler.domain.nouns import Limits, NodeStatus
from gpumesh_scheduler.domain.session import Session, SessionState
from tests.unit.scheduler.books import BUILD, Books, job_id


def block(session: Session) -> Block | None:
    return session.seats[BUILD.key].block


def sweep(books: Books, seconds: float, heard: Session | None = None) -> None:
    """Time passes in steps in which everything but silence stays quiet."""
    for _ in range(round(seconds)):
        books.now += 1.0
        if heard is not None:
            books.note(books.roster.heard(heard, books.now))
        books.note(books.roster.sweep(books.now))


def test_a_silent_node_gets_no_offers_after_15_s_and_is_lost_after_25() -> None:
    books = Books()
    node = books.node()
    sweep(books, 14)
    assert node.state.name == "READY"
    sweep(books, 2)
    assert node.state.name == "SUSPECT"
    assert block(node) is Block.SESSION_SUSPECT
    assert books.submit().state is JobState.QUEUED
    sweep(books, 10)
    assert books.of(EndSession)[0].reason is Reason.NODE_LOST
    assert not books.roster.sessions


def test_a_node_that_is_heard_again_serves_at_once() -> None:
    books = Books()
    node = books.node()
    sweep(books, 20)
    job = books.submit()
    books.note(books.roster.heard(node, books.now))
    assert node.state == SessionState.READY
    assert job.state == JobState.OFFERED


def test_a_scheduler_that_stood_still_does_not_blame_its_nodes() -> None:
    books = Books()
    node = books.node()
    sweep(books, 1)
    books.now += 60.0
    books.note(books.roster.sweep(books.now))
    assert node.state == SessionState.READY


def test_the_session_with_the_higher_counter_wins_and_the_old_ones_jobs_are_tried_again() -> None:
    books = Books()
    old = books.node("n1")
    job = books.submit()
    new = books.node("n1")
    assert books.roster.sessions == {"n1": new}
    assert [(end.session, end.reason) for end in books.of(EndSession)] == [(old, Reason.SESSION_REPLACED)]
    assert job.current is not None
    assert job.current.session is new
    assert old.tries == {}


def test_a_session_with_a_lower_or_equal_counter_is_refused() -> None:
    books = Books()
    books.node("n1")
    books.node("n1")
    for counter in (1, 2):
        with pytest.raises(Conflict) as refusal:
            books.roster.check("n1", counter)
        assert refusal.value.reason is Reason.SESSION_REPLACED


def test_a_node_that_said_goodbye_finishes_and_gets_nothing_new() -> None:
    books = Books()
    node = books.node(slots=2)
    job = books.submit(1)
    books.roster.goodbye(node)
    assert books.submit(2).state is JobState.QUEUED
    books.heartbeat(node, slots=2, running=[(job.id, job.fence)])
    assert node.state == SessionState.DRAINING
    books.accept(job)
    books.done(job, 0)
    assert books.ends() == ["COMPLETED"]


def test_a_node_may_pause_and_come_back_by_its_own_report() -> None:
    books = Books()
    node = books.node()
    books.heartbeat(node, draining=True)
    job = books.submit()
    assert job.state.name == "QUEUED"
    books.heartbeat(node)
    assert job.state.name == "OFFERED"


def test_a_model_that_is_not_ready_or_not_in_the_catalogue_gets_no_offers() -> None:
    books = Books()
    node = books.node(ready=False)
    assert block(node) is Block.MODEL_NOT_READY
    job = books.submit()
    books.heartbeat(node)
    assert job.state == JobState.OFFERED
    books.note(books.roster.catalogue(frozenset({"another"}), books.now))
    assert block(node) is Block.NOT_IN_CATALOGUE
    books.note(books.roster.catalogue(frozenset({"tiny"}), books.now))
    assert block(node) is Block.NO_FREE_SLOT


def test_a_slot_is_taken_back_when_two_digests_leave_its_job_out() -> None:
    books = Books()
    node = books.node(slots=1)
    job = books.submit()
    books.accept(job)
    books.heartbeat(node)
    assert job.state == JobState.ACCEPTED  # the offer may have crossed the report
    books.now += 11.0
    books.heartbeat(node)
    assert job.state == JobState.ACCEPTED  # Done may be behind the heartbeat
    books.heartbeat(node)
    # Tried again, on the same node since there is no other.
    assert [fence for _, fence in books.offers()] == [1 << 16 | 1, 1 << 16 | 2]
    assert len(node.tries) == 1


def test_a_digest_that_lists_the_job_clears_the_doubt() -> None:
    books = Books()
    node = books.node(slots=1)
    job = books.submit()
    books.accept(job)
    for _ in range(4):
        books.now += 11.0
        books.heartbeat(node)
        books.heartbeat(node, running=[(job.id, job.fence)])
    assert job.state == JobState.ACCEPTED


def test_a_cancelled_try_that_the_digest_leaves_out_frees_its_slot_soon() -> None:
    books = Books()
    node = books.node(slots=1)
    job = books.submit()
    books.cancel(job, Reason.CLIENT_GONE)
    books.now += 2.5
    books.heartbeat(node)
    assert node.seats[BUILD.key].used == 0


def test_jobs_that_a_node_runs_and_nobody_knows_are_cancelled_there() -> None:
    books = Books()
    node = books.node()
    books.heartbeat(node, running=[(job_id(9), 1 << 16 | 1)])
    assert books.cancels() == [("n1", "UNKNOWN_JOB")]


def test_a_model_that_disappears_keeps_its_seat_until_its_jobs_are_over() -> None:
    books = Books()
    node = books.node(slots=1)
    job = books.submit()
    books.accept(job)
    running = [(job.id, job.fence)]
    books.note(books.roster.status(node, NodeStatus((), frozenset(running)), books.now))
    assert node.seats[BUILD.key].block is Block.MODEL_NOT_READY
    books.heartbeat(node, slots=1, running=running)
    assert node.seats[BUILD.key].used == 1
    books.done(job, 0)
    books.note(books.roster.status(node, NodeStatus(), books.now))
    assert node.seats == {}
    assert books.board.pools.pools == {}


def test_a_revoked_nodes_session_ends_and_no_new_one_begins() -> None:
    books = Books()
    books.node("n1")
    job = books.submit()
    books.note(books.roster.revoke(["n1", "n2"], books.now))
    assert books.of(EndSession)[0].reason is Reason.NODE_REVOKED
    assert job.state == JobState.QUEUED
    for node_id in ("n1", "n2"):
        with pytest.raises(PermissionDenied) as refusal:
            books.roster.check(node_id, 99)
        assert refusal.value.reason is Reason.NODE_REVOKED


def test_more_sessions_than_allowed_are_refused_with_a_time_to_come_back() -> None:
    books = Books(Limits(max_sessions=1))
    books.node("n1")
    with pytest.raises(MeshError) as refusal:
        books.node("n2")
    assert refusal.value.reason is Reason.RESOURCE_EXHAUSTED
    assert refusal.value.retry_after_s


def test_the_node_with_the_fewest_outstanding_tokens_is_chosen() -> None:
    books = Books()
    books.node("n1", slots=4)
    books.node("n2", slots=4)
    for number in range(1, 7):
        books.submit(number)
    assert sorted(node for node, _ in books.offers()) == ["n1"] * 3 + ["n2"] * 3


def test_capacity_counts_ready_nodes_slots_and_tokens() -> None:
    books = Books()
    node = books.node("n1", slots=3)
    books.node("n2", slots=2, ready=False)
    books.submit()
    capacity = books.board.pools.pools[BUILD.key].capacity()
    assert (capacity.nodes, capacity.slots, capacity.free_slots, capacity.outstanding_tokens) == (1, 3, 2, 20)
    books.close(node, Reason.NODE_LOST)
    assert books.board.pools.pools[BUILD.key].capacity().nodes == 0


def test_a_session_ends_in_order_before_its_certificate_does() -> None:
    books = Books(Limits(reauthenticate_s=10.0))
    node = books.node(slots=2)
    node.end_with(books.now + 100.0, books.now, books.limits)
    job = books.submit(1)
    books.accept(job)
    sweep(books, 89, heard=node)
    assert node.state.name == "READY"
    sweep(books, 2, heard=node)
    assert node.state.name == "DRAINING"
    assert books.submit(2).state is JobState.QUEUED
    books.done(job, 0)
    sweep(books, 1, heard=node)
    assert [(end.session, end.reason) for end in books.of(EndSession)] == [(node, Reason.CERTIFICATE_INVALID)]


def test_a_session_does_not_outlive_its_certificate_whatever_runs() -> None:
    books = Books(Limits(reauthenticate_s=10.0))
    node = books.node()
    node.end_with(books.now + 100.0, books.now, books.limits)
    books.accept(books.submit())
    sweep(books, 101, heard=node)
    assert not books.roster.sessions


def test_the_one_node_with_a_feature_is_found_among_many() -> None:
    books = Books()
    for number in range(100):
        books.node(f"n{number}", features=frozenset({1}) if number == 77 else frozenset())
    job = books.submit(features=frozenset({1}))
    assert job.current is not None
    assert job.current.session.node_id == "n77"
