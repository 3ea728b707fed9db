"""The settlement decision: what a finished job costs, who is paid, and which transfers follow. Pure.

Evidence comes from callers and nodes by way of schedulers; nothing in it is believed beyond the ticket:
- FAILED, or an outcome we do not know, costs nothing.
- Prompt tokens: at most 1.25 x the admission's estimate + 64. The estimate is exact where the model's tokenizer is in
  the catalogue and a few per cent off otherwise; 25 % covers that, 64 covers a chat template's own tokens on very short
  prompts.
- Completion tokens: at most ticket.max_output_tokens, and no more than the segments hold.
- Segments: the longest run that is contiguous from 0, each with a provider and a fence of its own; what follows a flaw
  is dropped.
- No segment, no provider: nobody could be paid, so nobody pays. A job that prefilled but produced nothing has one empty
  segment (0, 0).
- The charge never exceeds the hold.
"""

import uuid
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple

from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, FEES, INSURANCE, PROVIDER_PENDING, Account
from gpumesh_metering.domain.ledger import INT64_MAX, Transfer, TransferKind
from gpumesh_metering.domain.pricing import Price, charge_of, split
from gpumesh_metering.domain.transfer_ids import SETTLE_CHARGE, SETTLE_PAY, SETTLE_SHORTFALL, pay_key

DEFAULT_SHARE_BP: Final = 8_000  # providers get 80 %
PROMPT_SLACK_TOKENS: Final = 64
# Most that one job may hold, nano-USD ($1,000,000): above it a ticket is a mistake, and sums over a batch stay far from
# int64.
MAX_HOLD: Final = 10**15
MAX_SEGMENTS: Final = 64  # 3 tries and a few resumes are real; a longer list is somebody's mistake


class Outcome(IntEnum):
    """How a job ended. The numbers are those of gpumesh.common.v1.JobOutcome and are stored."""

    COMPLETED = 1
    CANCELLED = 2
    FAILED = 3


class Terms(NamedTuple):
    """What the ticket promised. hold: nano-USD, 0 .. MAX_HOLD. Tokens: >= 0."""

    price: Price
    hold: int
    max_output_tokens: int
    input_tokens_estimate: int


class Usage(NamedTuple):
    """Tokens of a job. cached is part of prompt, reasoning part of completion."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0


class Segment(NamedTuple):
    """A run [start, end) of output tokens and who produced it."""

    fence: int
    start: int
    end: int
    provider_id: str
    node_id: str


class Settlement(NamedTuple):
    """What is committed for a job. usage: billed. pays: nano-USD, one per segment. charge = fee + sum(pays), exactly."""

    outcome: Outcome
    usage: Usage
    charge: int
    fee: int
    segments: Sequence[Segment]
    pays: Sequence[int]


_NOTHING: Final = Usage()
_OUTCOMES: Final = {int(outcome): outcome for outcome in Outcome}
_FAILED: Final = Outcome.FAILED


def prompt_bound(estimate: int) -> int:
    """Most prompt tokens that are billed, for an estimate made at admission."""
    return estimate + estimate // 4 + PROMPT_SLACK_TOKENS


def decide(
    outcome: int, terms: Terms, usage: Usage, segments: Sequence[Segment], share_bp: int = DEFAULT_SHARE_BP
) -> Settlement:
    """Settles one job's evidence under its ticket's terms. Total: any evidence gives a settlement. share_bp: 0 ..
    10000.
    """
    kept = sound_segments(segments)
    limit = terms.max_output_tokens
    ended = _OUTCOMES.get(outcome, _FAILED)
    if ended is _FAILED or not kept:
        # Kept as a record of what was delivered, within the ticket's limit; nobody is paid for it.
        segments = _clip(kept, limit)
        return Settlement(ended, _NOTHING, 0, 0, segments, [0] * len(segments))
    # Comparisons in place of min() and max(): this runs once per job, and eight calls cost as much as the seal's verification.
    prompt, completion, cached, reasoning = usage
    bound = prompt_bound(terms.input_tokens_estimate)
    reach = kept[-1].end
    if prompt > bound:
        prompt = bound
    if completion > limit:
        completion = limit
    if completion > reach:
        completion = reach
    if prompt < 0 or completion < 0 or cached or reasoning:
        prompt, completion = max(0, prompt), max(0, completion)
        cached, reasoning = max(0, min(cached, prompt)), max(0, min(reasoning, completion))
    billed = Usage(prompt, completion, cached, reasoning)
    segments = _clip(kept, completion) if reach != completion else kept
    charge = charge_of(terms.price, prompt, cached, completion, terms.hold)
    if len(segments) == 1:
        pays = [charge * share_bp // 10_000]
        return Settlement(ended, billed, charge, charge - pays[0], segments, pays)
    weights = [(segment.end - segment.start) * terms.price.output for segment in segments]
    weights[0] += prompt * terms.price.input  # the prompt is charged once and paid to whom it was first sent
    pays = split(charge, share_bp, weights)
    return Settlement(ended, billed, charge, charge - sum(pays), segments, pays)


def sound_segments(segments: Sequence[Segment]) -> Sequence[Segment]:
    """The longest prefix that is contiguous from 0, with a provider each and no fence twice. Empty runs count only
    alone at the start.
    """
    if len(segments) == 1:
        only = segments[0]
        return (
            segments if only.start == 0 and only.end >= 0 and only.provider_id and 0 <= only.fence <= INT64_MAX else ()
        )
    kept: list[Segment] = []
    position = 0
    fences: set[int] = set()
    for segment in segments[:MAX_SEGMENTS]:
        sound = (
            segment.start == position
            and segment.end >= position
            and segment.provider_id
            and 0 <= segment.fence <= INT64_MAX
        )
        if not sound or segment.fence in fences:
            break
        if segment.end == position:
            continue
        fences.add(segment.fence)
        kept.append(segment)
        position = segment.end
    if not kept and segments:
        return sound_segments(segments[:1])
    return kept


def _clip(segments: Sequence[Segment], limit: int) -> Sequence[Segment]:
    """Segments up to token `limit`; the first is kept even when nothing of it is left, for it has the prompt."""
    if not segments or segments[-1].end <= limit:
        return segments
    clipped = [segment._replace(end=min(segment.end, limit)) for segment in segments if segment.start < limit]
    return clipped or [segments[0]._replace(end=0)]


def transfers_of(job_id: bytes, account_id: str, settlement: Settlement, available: int) -> list[Transfer]:
    """The transfers of a settlement: one debit of the buyer into fees, then pays out of fees; what remains there is the
    fee.

    available: what the buyer can spend at that moment, nano-USD. What it does not cover is paid from insurance, so that
    no buyer falls below zero: admission works with cached balances and may be late by a moment. The database does the
    same in one statement.
    """
    taken = max(0, min(settlement.charge, available))
    buyer = Account(BUYER_AVAILABLE, account_id)
    lines: list[Transfer] = []
    if taken:
        lines.append(_direct(SETTLE_CHARGE.id(job_id), buyer, FEES, taken, "settle.charge", job_id))
    if settlement.charge > taken:
        rest = settlement.charge - taken
        lines.append(_direct(SETTLE_SHORTFALL.id(job_id), INSURANCE, FEES, rest, "settle.shortfall", job_id))
    for segment, pay in zip(settlement.segments, settlement.pays, strict=True):
        if pay:
            provider = Account(PROVIDER_PENDING, segment.provider_id)
            lines.append(
                _direct(SETTLE_PAY.id(pay_key(job_id, segment.fence)), FEES, provider, pay, "settle.pay", job_id)
            )
    return lines


def _direct(id_: uuid.UUID, debit: Account, credit: Account, amount: int, purpose: str, job_id: bytes) -> Transfer:
    return Transfer(id_, TransferKind.DIRECT, debit, credit, amount, purpose, job_id=job_id)
