"""The settlement decision believes nothing beyond the ticket."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from gpumesh_metering.domain.accounts import (
    BUYER_AVAILABLE,
    PLATFORM_FEES,
    PLATFORM_INSURANCE,
    PROVIDER_PENDING,
    Account,
)
from gpumesh_metering.domain.invariants import SettledJob, violations
from gpumesh_metering.domain.ledger import INT64_MAX, Ledger, Transfer, TransferKind
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.domain.settlement import (
    MAX_HOLD,
    Outcome,
    Segment,
    Settlement,
    Terms,
    Usage,
    decide,
    prompt_bound,
    sound_segments,
    transfers_of,
)
from gpumesh_metering.domain.transfer_ids import CREDIT

PRICE = Price(1, 10**9, 2 * 10**9)
TERMS = Terms(PRICE, 10**9, 1000, 100)
JOB = bytes(range(16))


def run(start: int, end: int, fence: int = 65537, provider: str = "p1") -> Segment:
    return Segment(fence, start, end, provider, "n1")


def completed(usage: Usage, segments: Sequence[Segment], terms: Terms = TERMS) -> Settlement:
    return decide(Outcome.COMPLETED, terms, usage, segments)


def test_completed_job_charges_both_prices_and_pays_eighty_per_cent() -> None:
    done = completed(Usage(100, 50), [run(0, 50)])
    assert (done.charge, done.fee, list(done.pays)) == (200_000, 40_000, [160_000])


def test_failed_job_charges_nothing_and_keeps_what_was_delivered() -> None:
    done = decide(Outcome.FAILED, TERMS, Usage(100, 50), [run(0, 50)])
    assert (done.outcome, done.charge, done.fee, list(done.pays)) == (Outcome.FAILED, 0, 0, [0])
    assert done.usage == Usage()
    assert list(done.segments) == [run(0, 50)]


def test_unknown_outcome_is_a_failure() -> None:
    for outcome in (0, 4, -1, 99):
        assert decide(outcome, TERMS, Usage(100, 50), [run(0, 50)]).outcome is Outcome.FAILED


def test_cancelled_job_pays_for_the_prompt_and_what_was_delivered() -> None:
    done = decide(Outcome.CANCELLED, TERMS, Usage(100, 10), [run(0, 10)])
    assert (done.charge, done.outcome) == (120_000, Outcome.CANCELLED)


def test_cancelled_during_prefill_pays_for_the_prompt_by_an_empty_segment() -> None:
    done = decide(Outcome.CANCELLED, TERMS, Usage(100, 0), [run(0, 0)])
    assert (done.charge, list(done.pays)) == (100_000, [80_000])


def test_job_without_a_provider_costs_nothing() -> None:
    assert completed(Usage(100, 50), []).charge == 0
    assert completed(Usage(100, 50), [run(0, 50, provider="")]).charge == 0


def test_prompt_tokens_are_bounded_by_the_estimate() -> None:
    assert prompt_bound(100) == 189
    assert completed(Usage(10**9, 0), [run(0, 0)]).usage.prompt == 189


def test_completion_tokens_are_bounded_by_the_ticket() -> None:
    done = completed(Usage(0, 10**9), [run(0, 10**9)])
    assert done.usage.completion == 1000
    assert done.segments[0].end == 1000


def test_completion_tokens_are_bounded_by_what_the_segments_hold() -> None:
    assert completed(Usage(0, 500), [run(0, 20)]).usage.completion == 20


def test_charge_is_bounded_by_the_hold() -> None:
    done = completed(Usage(100, 50), [run(0, 50)], TERMS._replace(hold=1000))
    assert (done.charge, done.fee, list(done.pays)) == (1000, 200, [800])


def test_negative_counts_are_zero() -> None:
    done = completed(Usage(-5, -5, -5, -5), [run(0, 0)])
    assert done.usage == Usage()
    assert done.charge == 0


def test_prompt_is_charged_once_and_paid_to_the_first_provider() -> None:
    segments = [run(0, 10, 65537, "p1"), run(10, 50, 131073, "p2")]
    done = completed(Usage(100, 50), segments)
    assert done.charge == 200_000
    assert list(done.pays) == [96_000, 64_000]  # 100 + 20 of 200, 80 of 200, of 160,000
    assert done.fee == 40_000


def test_segments_count_only_as_far_as_they_are_contiguous() -> None:
    assert list(sound_segments([run(0, 10), run(11, 20, 2)])) == [run(0, 10)]
    assert list(sound_segments([run(0, 10), run(5, 20, 2)])) == [run(0, 10)]
    assert list(sound_segments([run(1, 10)])) == []
    assert list(sound_segments([run(0, 10), run(10, 20)])) == [run(0, 10)], "one fence twice"
    assert list(sound_segments([run(0, 0, 1), run(0, 7, 2)])) == [run(0, 7, 2)], "an empty run before a full one"
    assert list(sound_segments([run(0, 10, INT64_MAX + 1)])) == []


def test_balance_below_the_charge_is_topped_up_by_insurance() -> None:
    done = completed(Usage(100, 50), [run(0, 50)])
    lines = [(line.debit.name, line.credit.name, line.amount) for line in transfers_of(JOB, "a", done, 150_000)]
    assert lines == [
        (BUYER_AVAILABLE, PLATFORM_FEES, 150_000),
        (PLATFORM_INSURANCE, PLATFORM_FEES, 50_000),
        (PLATFORM_FEES, PROVIDER_PENDING, 160_000),
    ]


def test_buyer_with_nothing_is_not_debited() -> None:
    done = completed(Usage(100, 50), [run(0, 50)])
    for available in (0, -5):
        assert all(line.debit.name != BUYER_AVAILABLE for line in transfers_of(JOB, "a", done, available))


SEGMENTS = st.lists(
    st.builds(
        Segment,
        st.integers(0, 2**64 - 1),
        st.integers(-2, 60),
        st.integers(-2, 120),
        st.sampled_from(["p1", "p2", "p3", ""]),
        st.just("n"),
    ),
    max_size=6,
)
CHAINS = st.lists(st.tuples(st.integers(1, 1000), st.sampled_from(["p1", "p2"])), min_size=1, max_size=6).map(
    lambda runs: [
        Segment(
            at + 1, sum(length for length, _ in runs[:at]), sum(length for length, _ in runs[: at + 1]), provider, "n"
        )
        for at, (_, provider) in enumerate(runs)
    ]
)
INT64 = st.integers(-(2**63), INT64_MAX)


@given(
    st.integers(0, 5),
    st.builds(
        Terms,
        st.builds(
            Price, st.just(1), st.integers(0, 10**12), st.integers(0, 10**12), st.none() | st.integers(0, 10**12)
        ),
        st.integers(0, MAX_HOLD),
        st.integers(0, INT64_MAX),
        st.integers(0, INT64_MAX // 2),
    ),
    st.builds(Usage, INT64, INT64, INT64, INT64),
    SEGMENTS | CHAINS,
    st.integers(0, 10_000),
    st.integers(0, 10**16),
)
def test_any_evidence_gives_a_settlement_that_keeps_every_invariant(
    outcome: int, terms: Terms, usage: Usage, segments: list[Segment], share: int, credit: int
) -> None:
    done = decide(outcome, terms, usage, segments, share)
    assert 0 <= done.charge <= terms.hold
    assert done.charge == done.fee + sum(done.pays)
    assert done.fee >= 0
    assert all(pay >= 0 for pay in done.pays)
    assert len(done.pays) == len(done.segments)
    assert 0 <= done.usage.completion <= terms.max_output_tokens
    assert 0 <= done.usage.prompt <= prompt_bound(terms.input_tokens_estimate)
    assert 0 <= done.usage.cached <= done.usage.prompt
    assert 0 <= done.usage.reasoning <= done.usage.completion
    ledger = Ledger()
    buyer = Account(BUYER_AVAILABLE, "a")
    if credit:
        ledger.apply(
            Transfer(CREDIT.id(b"c"), TransferKind.DIRECT, Account("external:x", "x"), buyer, credit, "credit")
        )
    for line in transfers_of(JOB, "a", done, ledger.available(buyer)):
        ledger.apply(line)
    rows = [(s.fence, s.start, s.end, s.provider_id, pay) for s, pay in zip(done.segments, done.pays, strict=True)]
    job = SettledJob(JOB, "a", done.charge, done.fee, rows)
    assert violations(ledger.transfers.values(), ledger.balances, [job]) == []
