"""Charges are rounded once and splits lose nothing."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh_metering.domain.pricing import MAX_PRICE, Price, charge_of, split

TOKENS = st.integers(0, 10_000_000)
PRICES = st.integers(0, MAX_PRICE)


def test_charge_is_prompt_and_completion_at_their_prices() -> None:
    assert charge_of(Price(1, 10**9, 2 * 10**9), 100, 0, 50, hold=10**9) == 200_000


@pytest.mark.parametrize(("tokens", "charge"), [(499_999, 0), (500_000, 1), (1_499_999, 1), (1_500_000, 2)])
def test_charge_is_rounded_half_up_once_per_job(tokens: int, charge: int) -> None:
    assert charge_of(Price(1, 1, 0), tokens, 0, 0, hold=10**9) == charge


def test_prompt_and_completion_are_rounded_together_not_each() -> None:
    assert charge_of(Price(1, 1, 1), 300_000, 0, 300_000, hold=10) == 1


def test_cached_tokens_have_their_own_price_where_there_is_one() -> None:
    assert charge_of(Price(1, 10**6, 0, 10**5), 10, 4, 0, hold=100) == 6 + 0  # 6 + 0.4
    assert charge_of(Price(1, 10**6, 0, None), 10, 4, 0, hold=100) == 10


def test_a_free_model_costs_nothing() -> None:
    assert charge_of(Price(1, 0, 0), 10**6, 0, 10**6, hold=10**9) == 0


@given(TOKENS, TOKENS, PRICES, PRICES, st.integers(0, 2**63 - 1))
def test_charge_never_exceeds_the_hold_and_is_within_half_of_the_exact_price(
    prompt: int, completion: int, price_in: int, price_out: int, hold: int
) -> None:
    charge = charge_of(Price(1, price_in, price_out), prompt, 0, completion, hold)
    exact = Fraction(prompt * price_in + completion * price_out, 1_000_000)
    assert 0 <= charge <= hold
    assert charge == hold or abs(charge - exact) <= Fraction(1, 2)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10_000), st.lists(st.integers(0, 2**80), min_size=1, max_size=20))
def test_pays_add_up_to_the_share_exactly_and_follow_the_weights(charge: int, share: int, weights: list[int]) -> None:
    pays = split(charge, share, weights)
    assert sum(pays) == charge * share // 10_000
    assert all(pay >= 0 for pay in pays)
    whole = sum(weights)
    if whole:
        for pay, weight in zip(pays, weights, strict=True):
            assert abs(pay - Fraction(sum(pays) * weight, whole)) <= 1


def test_weightless_segments_leave_everything_to_the_first() -> None:
    assert split(100, 8_000, [0, 0, 0]) == [80, 0, 0]
    assert split(100, 8_000, []) == []
