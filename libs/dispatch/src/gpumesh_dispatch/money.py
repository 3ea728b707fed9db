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


def within_bounds(usage: Usage, relayed: int, cap: int, prompt_bound: int) -> Usage:
    """The node's count, corrected in place: nodes are strangers. At most the tokens that frames announced (`relayed`), the ticket's cap and
    the prompt's bound; 0 means that a bound is unknown.
    """
    prompt, completion = told = usage.prompt_tokens, usage.completion_tokens
    completion = max(completion, 0)
    if relayed and completion > relayed:
        completion = relayed
    if cap and completion > cap:
        completion = cap
    prompt = max(prompt, 0)
    if prompt_bound and prompt > prompt_bound:
        prompt = prompt_bound
    if (prompt, completion) != told:
        usage.prompt_tokens, usage.completion_tokens = prompt, completion
    if not 0 <= usage.cached_prompt_tokens <= prompt:
        usage.cached_prompt_tokens = 0
    if not 0 <= usage.reasoning_tokens <= completion:
        usage.reasoning_tokens = 0
    return usage
