"""Between the wire's messages and ours. Total and pure: whatever bytes a scheduler sends, the answer is a value or
WireError.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from gpumesh.common.v1.job_pb2 import Charge, JobOutcome, SealedTicket, Ticket, Usage
from gpumesh.common.v1.job_pb2 import Price as WirePrice
from gpumesh.metering.v1 import balance_service_pb2 as balance
from gpumesh.metering.v1 import ledger_service_pb2 as ledger
from gpumesh.metering.v1.settlement_service_pb2 import Settle, Settled
from gpumesh_metering.domain.ledger import INT64_MAX
from gpumesh_metering.domain.pricing import MAX_PRICE, Price
from gpumesh_metering.domain.settlement import MAX_HOLD, Segment
from gpumesh_metering.domain.settlement import Terms as TicketTerms
from gpumesh_metering.store import BuyerBalance, StoredSettlement, UsageRow

TICKET_CONTEXT: Final = b"gpumesh-ticket-v1"
GRANT_CONTEXT: Final = b"gpumesh-grant-v1"
JOB_ID_BYTES: Final = 16
_PAGE_TOKEN: Final = "before:"  # noqa: S105 -- a cursor, not a secret


class WireError(Exception):
    """The bytes are not the message that they should be."""


def settle_from_wire(body: bytes) -> Settle:
    """A Settle. Raises WireError."""
    try:
        return Settle.FromString(body)
    except DecodeError as err:
        raise WireError("not a Settle") from err


def many_from_wire(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(job id, Settle encoded) of each job in a Settle of many. Raises DecodeError, and ValueError when the lists differ in length."""
    settle = Settle.FromString(body)
    joined = settle.job_ids
    ids = [joined[at : at + JOB_ID_BYTES] for at in range(0, len(joined), JOB_ID_BYTES)]
    return zip(ids, settle.jobs, strict=True)


def sealed_from_wire(body: bytes) -> SealedTicket:
    """A SealedTicket. Raises WireError."""
    try:
        return SealedTicket.FromString(body)
    except DecodeError as err:
        raise WireError("not a SealedTicket") from err


def ticket_from_wire(body: bytes) -> Ticket:
    """A Ticket whose seal was verified. Raises WireError."""
    try:
        return Ticket.FromString(body)
    except DecodeError as err:
        raise WireError("not a Ticket") from err


def price_from_wire(price: WirePrice) -> Price:
    """A price."""
    cached = price.cached_input_nano_usd_per_mtok if price.HasField("cached_input_nano_usd_per_mtok") else None
    return Price(price.version, price.input_nano_usd_per_mtok, price.output_nano_usd_per_mtok, cached)


def price_to_wire(price: Price) -> WirePrice:
    """A price."""
    return WirePrice(
        version=price.version,
        input_nano_usd_per_mtok=price.input,
        output_nano_usd_per_mtok=price.output,
        cached_input_nano_usd_per_mtok=price.cached_input,
    )


class Shared(NamedTuple):
    """What the tickets under one grant have in common. names: account, key, model, revision. settle_by_s: seconds since 1970."""

    names: tuple[str, str, str, str]
    price: Price
    settle_by_s: int


# Fields that a grant may set for all its jobs. One that says more is merged with each ticket anew.
_SHARED_FIELDS: Final = frozenset((
    "account_id", "key_id", "model_id", "model_revision", "price", "lease_id", "scheduler_id", "scheduler_boot_id", "submit_by_time",
    "settle_by_time", "grant_id",
))  # fmt: skip


def shared_of(ticket: Ticket) -> Shared:
    """That part of a ticket."""
    names = ticket.account_id, ticket.key_id, ticket.model_id, ticket.model_revision
    return Shared(names, price_from_wire(ticket.price), ticket.settle_by_time.seconds)


def grant_from_wire(grant: bytes) -> Shared | None:
    """What a verified grant says of all its jobs; None when it says more. Raises WireError."""
    ticket = ticket_from_wire(grant)
    return None if any(field.name not in _SHARED_FIELDS for field, _ in ticket.ListFields()) else shared_of(ticket)


def terms_from_wire(ticket: Ticket, shared: Shared) -> TicketTerms:
    """What the ticket promises. Raises WireError for amounts that no router of ours would seal."""
    price = shared.price
    terms = TicketTerms(price, ticket.hold_nano_usd, ticket.max_output_tokens, ticket.input_tokens_estimate)
    if not (
        0 <= terms.hold <= MAX_HOLD
        and terms.max_output_tokens >= 0
        and 0 <= terms.input_tokens_estimate <= INT64_MAX // 2
        and 0 <= price.input <= MAX_PRICE
        and 0 <= price.output <= MAX_PRICE
        and (price.cached_input is None or 0 <= price.cached_input <= MAX_PRICE)
        and shared.names[0]
    ):
        raise WireError("a ticket with impossible terms")
    return terms


def segments_from_wire(settle: Settle) -> list[Segment]:
    """The segments, in the order sent."""
    found = []
    for paid in settle.segments:
        run = paid.segment
        found.append(Segment(run.fence, run.start_token, run.end_token, paid.provider_id, paid.node_id))
    return found


def settled_to_wire(charge: int, fee: int, price: WirePrice, pays: Sequence[tuple[int, int]], repeated: bool) -> bytes:
    """A Settled, encoded. pays: (fence, nano-USD)."""
    # Field by field: keyword arguments of nested messages take twice as long.
    settled = Settled(repeated_settlement=True) if repeated else Settled()
    money = settled.charge
    money.amount_nano_usd = charge
    money.provider_nano_usd = charge - fee
    money.fee_nano_usd = fee
    money.price.CopyFrom(price)
    for fence, pay in pays:
        line = settled.pays.add()
        line.fence = fence
        line.pay_nano_usd = pay
    return settled.SerializeToString()


def many_to_wire(jobs: Sequence[tuple[bytes, int, int, int]]) -> bytes:
    """A Settled of many jobs: (job id, charge, fence, pay) of each, nano-USD."""
    job_ids, charges, fences, pays = zip(*jobs, strict=True)
    return Settled(
        job_ids=b"".join(job_ids), charges_nano_usd=charges, fences=fences, pays_nano_usd=pays
    ).SerializeToString()


def stored_to_wire(stored: StoredSettlement, fences: frozenset[int] | None = None) -> bytes:
    """The answer to a job settled before. fences: of a receipt, whose try is answered even when it earned nothing."""
    pays = stored.pays
    if fences is not None:
        earned = dict(pays)
        pays = [(fence, earned.get(fence, 0)) for fence in sorted(fences)]
    return settled_to_wire(stored.charge, stored.fee, price_to_wire(stored.price), pays, repeated=True)


def refusal_to_wire(reason: str) -> bytes:
    """A Settled that settles nothing."""
    return Settled(reason=reason).SerializeToString()


def balance_to_wire(row: BuyerBalance) -> balance.Balance:
    """A buyer's balance."""
    return balance.Balance(account_id=row.account_id, available_nano_usd=row.available, version=row.version)


def update_to_wire(rows: Sequence[BuyerBalance]) -> bytes:
    """A BalanceUpdate with changed balances, encoded."""
    return balance.BalanceUpdate(balances=map(balance_to_wire, rows)).SerializeToString()


def prices_to_wire(prices: Mapping[str, Price]) -> bytes:
    """A BalanceUpdate with the whole price list, encoded; equal lists give equal bytes."""
    wire = {model: price_to_wire(price) for model, price in prices.items()}
    return balance.BalanceUpdate(prices=wire, prices_whole=True).SerializeToString(deterministic=True)


def usage_row_to_wire(row: UsageRow) -> ledger.UsageRow:
    """A settled job, for an operator."""
    settle_time = Timestamp()
    settle_time.FromDatetime(row.settle_time.astimezone(UTC))
    return ledger.UsageRow(
        job_id=row.job_id,
        account_id=row.account_id,
        key_id=row.key_id,
        model_id=row.model_id,
        outcome=JobOutcome.ValueType(row.outcome),
        usage=Usage(
            prompt_tokens=row.prompt,
            completion_tokens=row.completion,
            cached_prompt_tokens=row.cached,
            reasoning_tokens=row.reasoning,
        ),
        charge=Charge(
            amount_nano_usd=row.charge,
            provider_nano_usd=row.charge - row.fee,
            fee_nano_usd=row.fee,
            price=price_to_wire(row.price),
        ),
        settle_time=settle_time,
        providers=[
            ledger.PaidProvider(
                provider_id=part.provider_id,
                node_id=part.node_id,
                fence=part.fence,
                tokens=part.tokens,
                pay_nano_usd=part.pay,
            )
            for part in row.segments
        ],
    )


def page_token(number: int) -> str:
    """A token for the page of settlements below `number`."""
    return f"{_PAGE_TOKEN}{number}"


def page_from_wire(token: str) -> int | None:
    """The number in a token; None for the empty one. Raises WireError for one that is not ours."""
    if not token:
        return None
    digits = token.removeprefix(_PAGE_TOKEN)
    if digits == token or not (digits.isascii() and digits.isdigit()) or not 0 < int(digits[:20]) <= INT64_MAX:
        raise WireError("not one of our page tokens")
    return int(digits)
