"""From tokens to nano-USD: one rounding per job, then a split that loses nothing."""

from collections.abc import Sequence
from typing import Final, NamedTuple

TOKENS_PER_PRICE: Final = 1_000_000  # prices are per 1,000,000 tokens
BASIS_POINTS: Final = 10_000
MAX_PRICE: Final = 10**12  # nano-USD per 1,000,000 tokens: $1,000; above it is a typing error


class Price(NamedTuple):
    """A model's price, nano-USD per 1,000,000 tokens. cached_input None: as input. version 0: never published."""

    version: int
    input: int
    output: int
    cached_input: int | None = None


def charge_of(price: Price, prompt_tokens: int, cached_prompt_tokens: int, completion_tokens: int, hold: int) -> int:
    """What a buyer pays for a job, nano-USD: rounded once, half up, and never more than the hold.

    Half up, not half even: it is the rule that people check with a pocket calculator, and at most 0.5 nano-USD a job.
    """
    cached_price = price.cached_input
    if cached_price is None or not cached_prompt_tokens:
        raw = prompt_tokens * price.input + completion_tokens * price.output
    else:
        fresh = prompt_tokens - cached_prompt_tokens
        raw = fresh * price.input + cached_prompt_tokens * cached_price + completion_tokens * price.output
    charge = (raw + TOKENS_PER_PRICE // 2) // TOKENS_PER_PRICE
    return min(charge, hold)


def split(charge: int, share_bp: int, weights: Sequence[int]) -> list[int]:
    """Pays of a job's segments, nano-USD, in order: together share_bp / 10000 of the charge, rounded down (the rest is
    the fee).

    weights: what each segment is worth, for example its tokens times their price. The running total is rounded down, so
    that the pays add up exactly and no order of summing gives another result. All weights 0: everything to the first.
    """
    total = charge * share_bp // BASIS_POINTS
    if len(weights) == 1:
        return [total]
    whole = sum(weights)
    if not whole:
        return [total, *([0] * (len(weights) - 1))] if weights else []
    pays = []
    before = running = 0
    for weight in weights:
        running += weight
        after = total * running // whole
        pays.append(after - before)
        before = after
    return pays
