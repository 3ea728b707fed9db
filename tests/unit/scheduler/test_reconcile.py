"""Pairing of what nodes counted with what callers delivered: what is settled, when, and who is told."""

from typing import Any

from gpumesh_scheduler.domain.evidence import Bill, Delivered, Relayed, Segment
from gpumesh_scheduler.domain.nouns import Build, Outcome, Party, Usage
from gpumesh_scheduler.domain.reconcile import AckCaller, AckNode, Reconciler, SendSettle, Settling, Waits

JOB = bytes(16)
F1, F2 = 1 << 16 | 1, 1 << 16 | 2
N1 = Party("acme", "n1", Build("tiny", "r1"))
N2 = Party("beta", "n2", Build("tiny", "r1"))


def relayed(**fields: Any) -> Relayed:
    values: dict[str, Any] = {
        "ticket": b"ticket",
        "caller": 1,
        "fence": F1,
        "tokens": 5,
        "done": True,
        "reason": "",
        "accepted": True,
        "stopping": frozenset(),
        "parties": {F1: N1},
    }
    return Relayed(**(values | fields))


def delivered(outcome: Outcome = Outcome.COMPLETED, tokens: int = 5, fence: int = F1) -> Delivered:
    segments = (Segment(fence, 0, tokens),) if tokens else ()
    return Delivered(b"ticket", outcome, segments, Usage(20, tokens))


def bills(effects: Settling) -> list[Bill]:
    return [effect.bill for effect in effects if isinstance(effect, SendSettle)]


def counted(
    book: Reconciler, fence: int = F1, party: Party = N1, tokens: int = 5, now: float = 0.0, **fields: Any
) -> list[Bill]:
    return bills(book.counted(JOB, fence, Usage(11, tokens), party, now, **fields))


def test_a_completed_job_settles_when_both_sides_are_there() -> None:
    book = Reconciler(Waits())
    assert counted(book, running=True) == []
    assert book.ended(JOB, relayed(), 0.0) == []
    (bill,) = bills(book.delivered(JOB, 1, delivered(), [], 0.1))
    assert bill.outcome is Outcome.COMPLETED
    assert bill.segments == (Segment(F1, 0, 5, N1),)
    assert bill.usage == Usage(11, 5)  # the caller only estimated the prompt
    assert bill.counts == {F1: Usage(11, 5)}
    assert bill.from_caller


def test_both_are_told_when_metering_has_committed_and_the_job_is_forgotten() -> None:
    book = Reconciler(Waits())
    counted(book, running=True)
    book.ended(JOB, relayed(), 0.0)
    book.delivered(JOB, 3, delivered(), [], 0.1)
    told = book.settled(JOB, 1000, {F1: 800}, "")
    assert told == [AckCaller(3, JOB, 1000, ""), AckNode("n1", JOB, F1, 800, "")]
    assert not book.cases
    assert book.settled(JOB, 1000, {F1: 800}, "") == []


def test_a_record_alone_settles_after_2_s_and_a_cancelled_one_after_5() -> None:
    for outcome, wait in ((Outcome.COMPLETED, 2.0), (Outcome.CANCELLED, 5.0)):
        book = Reconciler(Waits())
        assert bills(book.delivered(JOB, 1, delivered(outcome), [(F1, N1)], 0.0)) == []
        assert book.sweep(wait - 0.1) == []
        (bill,) = bills(book.sweep(wait + 0.1))
        assert bill.segments == (Segment(F1, 0, 5, N1),)


def test_a_failed_job_settles_at_once_with_nothing_to_wait_for() -> None:
    book = Reconciler(Waits())
    (bill,) = bills(book.delivered(JOB, 1, delivered(Outcome.FAILED, 0), [], 0.0))
    assert bill.outcome is Outcome.FAILED


def test_a_job_cancelled_before_any_node_accepted_costs_nothing() -> None:
    book = Reconciler(Waits())
    book.ended(JOB, relayed(done=False, accepted=False, tokens=0), 0.0)
    (bill,) = bills(book.delivered(JOB, 1, delivered(Outcome.CANCELLED, 0), [], 0.0))
    assert (bill.usage, bill.segments) == (Usage(), ())


def test_a_job_cancelled_in_prefill_waits_for_the_nodes_count_and_pays_it_for_the_prompt() -> None:
    book = Reconciler(Waits())
    book.ended(JOB, relayed(done=False, tokens=0, stopping=frozenset({F1})), 0.0)
    assert book.delivered(JOB, 1, delivered(Outcome.CANCELLED, 0), [], 0.0) == []
    (bill,) = counted(book, tokens=0, now=0.3)
    assert bill.segments == (Segment(F1, 0, 0, N1),)
    assert bill.usage == Usage(11, 0)


def test_a_dead_callers_finished_job_is_settled_from_what_was_relayed_after_10_s() -> None:
    book = Reconciler(Waits())
    counted(book, running=True, tokens=9)
    book.ended(JOB, relayed(), 0.0)
    book.caller_lost(1, 1.0)
    assert book.sweep(10.9) == []
    (bill,) = bills(book.sweep(11.1))
    assert (bill.outcome, bill.from_caller) == (Outcome.COMPLETED, False)
    assert bill.usage == Usage(11, 5)  # 5 tokens were relayed, whatever the node counted
    assert bill.segments == (Segment(F1, 0, 5, N1),)


def test_a_dead_callers_unfinished_job_is_settled_as_failed() -> None:
    book = Reconciler(Waits())
    book.caller_lost(1, 1.0)
    book.ended(JOB, relayed(done=False, reason="CLIENT_GONE"), 1.0)
    (bill,) = bills(book.sweep(11.1))
    assert (bill.outcome, bill.reason, bill.segments) == (Outcome.FAILED, "CLIENT_GONE", ())


def test_a_caller_that_comes_back_in_time_settles_by_its_own_record() -> None:
    book = Reconciler(Waits())
    counted(book, running=True)
    book.ended(JOB, relayed(), 0.0)
    book.caller_lost(1, 1.0)
    (bill,) = bills(book.delivered(JOB, 2, delivered(tokens=4), [], 5.0))
    assert bill.from_caller
    assert bill.usage.completion_tokens == 4


def test_a_receipt_of_an_unknown_job_goes_alone_after_2_s_and_nobody_is_told_while_it_is_parked() -> None:
    book = Reconciler(Waits())
    assert counted(book) == []
    (bill,) = bills(book.sweep(2.1))
    assert bill.receipt_only
    assert bill.segments == (Segment(F1, 0, 0, N1),)
    assert book.settled(JOB, 0, {}, "PARKED") == []
    assert not book.cases
    counted(book, now=30.0)
    book.sweep(33.0)
    assert book.settled(JOB, 1000, {F1: 800}, "") == [AckNode("n1", JOB, F1, 800, "")]


def test_a_record_that_comes_after_its_receipt_was_sent_alone_replaces_it() -> None:
    book = Reconciler(Waits())
    counted(book)
    book.sweep(2.1)
    (bill,) = bills(book.delivered(JOB, 4, delivered(), [], 2.2))
    assert not bill.receipt_only
    assert bill.counts == {F1: Usage(11, 5)}
    assert book.settled(JOB, 0, {}, "PARKED") == []  # the answer to the receipt
    assert book.settled(JOB, 1000, {F1: 800}, "") == [AckCaller(4, JOB, 1000, ""), AckNode("n1", JOB, F1, 800, "")]


def test_a_losing_try_is_told_with_the_job_and_earns_nothing() -> None:
    book = Reconciler(Waits())
    counted(book, F1, N1, 0, running=True)
    counted(book, F2, N2, 5, running=True)
    book.ended(JOB, relayed(fence=F2, parties={F1: N1, F2: N2}), 0.0)
    book.delivered(JOB, 1, delivered(fence=F2), [], 0.1)
    told = book.settled(JOB, 1000, {F2: 800}, "")
    assert told[1:] == [AckNode("n1", JOB, F1, 0, ""), AckNode("n2", JOB, F2, 800, "")]


def test_counts_of_a_job_that_went_elsewhere_are_presented_alone() -> None:
    book = Reconciler(Waits())
    counted(book, running=True)
    assert book.sweep(100.0) == []
    book.abandoned(JOB, 100.0)
    (bill,) = bills(book.sweep(102.1))
    assert bill.receipt_only


def test_what_metering_has_not_answered_goes_again_on_a_new_link_and_every_30_s() -> None:
    book = Reconciler(Waits())
    book.delivered(JOB, 1, delivered(Outcome.FAILED, 0), [], 0.0)
    assert book.unanswered(10.0) == []
    assert len(book.unanswered(10.0, everything=True)) == 1
    assert book.unanswered(39.0) == []
    assert len(book.unanswered(41.0)) == 1


def test_evidence_beyond_the_bound_is_dropped_and_counted() -> None:
    book = Reconciler(Waits(most=1))
    counted(book)
    assert book.delivered(bytes(15) + b"1", 1, delivered(), [], 0.0) == []
    assert (len(book.cases), book.dropped) == (1, 1)


def test_a_repeated_record_changes_nothing_but_who_is_told() -> None:
    book = Reconciler(Waits())
    counted(book, running=True)
    book.ended(JOB, relayed(), 0.0)
    assert len(book.delivered(JOB, 1, delivered(), [], 0.1)) == 1
    assert book.delivered(JOB, 2, delivered(tokens=3), [], 5.0) == []
    assert book.settled(JOB, 1000, {F1: 800}, "")[0] == AckCaller(2, JOB, 1000, "")


def test_a_lost_caller_is_forgotten_in_time() -> None:
    book = Reconciler(Waits())
    book.caller_lost(1, 0.0)
    book.sweep(2000.0)
    assert not book.lost_callers
