"""Dollars are exact on the way in and out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh_client.money import format_usd, parse_usd


@given(st.integers(min_value=0, max_value=10**18 - 1))
def test_what_is_printed_reads_back_as_the_same_amount(nano: int) -> None:
    assert parse_usd(format_usd(nano).replace(",", "")) == nano


@pytest.mark.parametrize(
    ("text", "nano"),
    [("10", 10 * 10**9), ("$0.25", 250_000_000), ("0.000000001", 1), ("00.10", 100_000_000), (" 1 ", 10**9)],
)
def test_amounts_as_people_write_them(text: str, nano: int) -> None:
    assert parse_usd(text) == nano


@pytest.mark.parametrize("text", ["", "-1", "1e3", "1,5", "0.0000000001", "1.", ".5", "NaN", "١", "1000000000000"])
def test_anything_else_is_refused_rather_than_guessed(text: str) -> None:
    with pytest.raises(ValueError, match="US dollars"):
        parse_usd(text)


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (12_345_000_000, "$12.345"),
        (-250_000_000, "-$0.25"),
        (10**15, "$1,000,000.00"),
    ],
)
def test_at_least_cents_and_no_more_digits_than_needed(nano: int, text: str) -> None:
    assert format_usd(nano) == text
