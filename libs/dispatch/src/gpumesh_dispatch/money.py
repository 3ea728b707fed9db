"""What a job costs, as metering will compute it: for the release of its hold and for answers that show the cost. Pure."""

from typing import Final

from gpumesh.common.v1.job_pb2 import Price, Usage

_TOKENS_PER_PRICE: Final = 1_000_000


def charge_nano_usd(price: Price, usage: Usage, hold_nano_usd: int) -> int:
    """Nano-USD: rounded once, half up, at most the hold. Metering's own rule (gpumesh_metering.domain.pricing.charge_of) decides."""
    cached = usage.cached_prompt_tokens if price.HasField("cached_input_nano_usd_per_mtok") else 0
    raw = (
        usage.prompt_tokens - cached
    ) * price.input_nano_usd_per_mtok + usage.completion_tokens * price.output_nano_usd_per_mtok
    if cached:
        raw += cached * price.cached_input_nano_usd_per_mtok
    return min((raw + _TOKENS_PER_PRICE // 2) // _TOKENS_PER_PRICE, hold_nano_usd)
