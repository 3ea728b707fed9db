"""US dollars as people write them, and int64 nano-USD as the mesh counts them. Exact: no float on the way."""

import re
from decimal import Decimal
from typing import Final

NANO: Final = 1_000_000_000
_AMOUNT: Final = re.compile(r"\$?([0-9]{1,9})(?:\.([0-9]{1,9}))?")


def parse_usd(text: str) -> int:
    """ "10", "$0.25" or "0.000000001" as nano-USD. Raises ValueError for anything else, and for more than 9 decimals."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{text}" is not an amount in US dollars such as 10 or 0.25 (at most 9 decimals)')
    return int(match[1]) * NANO + int((match[2] or "").ljust(9, "0"))


def format_usd(nano: int) -> str:
    """12_345_000_000 as "$12.345"; at least two decimals, no more than needed."""
    sign = "-" if nano < 0 else ""
    value = Decimal(abs(nano)).scaleb(-9)
    whole, _, decimals = f"{value:.9f}".partition(".")
    return f"{sign}${int(whole):,}.{decimals.rstrip('0').ljust(2, '0')}"
