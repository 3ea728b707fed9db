"""From a Settle item to columns of a batch: verifies the ticket, decides, and makes the answer that is sent once it is
committed.

This is the hot path of metering: no object per row beyond what protobuf makes, no clock per job, one HMAC.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from gpumesh.common.v1.job_pb2 import SealedTicket, Ticket
from gpumesh.metering.v1.settlement_service_pb2 import Settle
from gpumesh_metering import wire
from gpumesh_metering.domain.ledger import INT64_MAX
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.domain.settlement import Segment, Usage, decide
from gpumesh_metering.domain.transfer_ids import SETTLE_CHARGE, SETTLE_PAY, SETTLE_SHORTFALL, pay_key
from gpumesh_metering.store import SettleBatch
from gpumesh_runtime.errors import Reason

MAX_COUNTS: Final = 64  # node counts kept per job; more tries than this do not happen
MAX_REASON_CHARACTERS: Final = 64
_MOST_GRANTS: Final = 4096

Verify = Callable[[tuple[bytes, bytes] | None, bytes, str, bytes, bytes], bool]  # KeyRing.check


class Refused(NamedTuple):
    """The job cannot be settled by this evidence; it may have been settled before, by other evidence. reason: of the
    closed list.
    """

    reason: str


class Receipt(NamedTuple):
    """A node's receipt without a record. fences: the tries that it names."""

    fences: frozenset[int]


class Decided(NamedTuple):
    """The job is in the batch: what to answer once that is committed. Nano-USD; paid: (fence, pay) of each segment."""

    charge: int
    fee: int
    price: Price
    paid: Sequence[tuple[int, int]]


class Intake:
    """Decides Settle items into a batch.

    verify: checks a ticket's seal. share_bp: what providers get of a charge, 1/100 %. Raises nothing for what a
    scheduler sends.
    """

    def __init__(self, verify: Verify, share_bp: int) -> None:
        self._verify = verify
        self._share_bp = share_bp
        self._grants: dict[bytes, wire.Shared] = {}

    def add(self, batch: SettleBatch, job_id: bytes, body: bytes, now_s: float) -> Decided | Refused | Receipt:
        """Decides one item. now_s: wall time, seconds since 1970. Decided: the job was added to the batch."""
        try:
            settle = wire.settle_from_wire(body)
            if settle.receipt_only:
                return Receipt(frozenset(count.fence for count in settle.node_counts if count.fence <= INT64_MAX))
            sealed = wire.sealed_from_wire(settle.ticket)
            opened = self._open(sealed, job_id)
        except wire.WireError:
            return Refused(Reason.TICKET_INVALID)
        if opened is None:
            return Refused(Reason.TICKET_INVALID)
        ticket, shared = opened
        if shared.settle_by_s < now_s:
            return Refused(Reason.TICKET_EXPIRED)
        return self._decide(batch, job_id, settle, ticket, shared)

    def _open(self, sealed: SealedTicket, job_id: bytes) -> tuple[Ticket, wire.Shared] | None:
        body, grant = sealed.body, sealed.grant
        if not self._verify(
            (wire.GRANT_CONTEXT, grant) if grant else None, wire.TICKET_CONTEXT, sealed.key_id, body, sealed.mac
        ):
            return None
        shared = (self._grants.get(grant) or self._read_grant(grant)) if grant else None
        # Under a grant that is known only the caller's own fields are read of its part; else, in this order, the router's part wins.
        ticket = wire.ticket_from_wire(body if shared else body + grant)
        if ticket.job_id != job_id or len(job_id) != wire.JOB_ID_BYTES:
            return None
        return ticket, shared or wire.shared_of(ticket)

    def _read_grant(self, grant: bytes) -> wire.Shared | None:
        """What a verified grant says of all its jobs, kept; None when it says more than that."""
        shared = wire.grant_from_wire(grant)
        if shared is not None:
            if len(self._grants) >= _MOST_GRANTS:
                self._grants.clear()
            self._grants[grant] = shared
        return shared

    def _decide(
        self, batch: SettleBatch, job_id: bytes, settle: Settle, ticket: Ticket, shared: wire.Shared
    ) -> Decided | Refused:
        price = shared.price
        try:
            promised = wire.terms_from_wire(ticket, shared)
        except wire.WireError:
            return Refused(Reason.TICKET_INVALID)
        used = settle.usage
        usage = Usage(used.prompt_tokens, used.completion_tokens, used.cached_prompt_tokens, used.reasoning_tokens)
        outcome, usage, charge, fee, segments, pays = decide(
            settle.outcome, promised, usage, wire.segments_from_wire(settle), self._share_bp
        )
        terms = batch.number_of_terms((
            *shared.names, settle.reason[:MAX_REASON_CHARACTERS], ticket.modality, int(outcome), settle.source, *price,
        ))  # fmt: skip
        batch.job_ids.append(job_id)
        batch.charge_ids.append(SETTLE_CHARGE.digest(job_id))
        batch.shortfall_ids.append(SETTLE_SHORTFALL.digest(job_id))
        batch.jobs.append((terms, *usage, charge, fee, promised.hold))
        place = len(batch.jobs)
        paid = _add_segments(batch, place, job_id, settle, segments, pays) if segments else ()
        for count in settle.node_counts[:MAX_COUNTS]:
            fence = count.fence
            if fence <= INT64_MAX:
                seen = count.usage
                batch.counts.append((
                    place, fence, seen.prompt_tokens, seen.completion_tokens, seen.cached_prompt_tokens, seen.reasoning_tokens,
                ))  # fmt: skip
        return Decided(charge, fee, price, paid)


def _add_segments(
    batch: SettleBatch, place: int, job_id: bytes, settle: Settle, segments: Sequence[Segment], pays: Sequence[int]
) -> list[tuple[int, int]]:
    """Adds the segments that the decision kept; (fence, pay) of each."""
    sent = settle.segments
    builds = {paid.segment.fence: paid.build for paid in reversed(sent)} if len(sent) > 1 else None
    paid = []
    for (fence, start, end, provider_id, node_id), pay in zip(segments, pays, strict=True):
        build = sent[0].build if builds is None else builds[fence]
        maker = batch.number_of_maker(
            (provider_id, node_id, build.quantisation, build.engine_name, build.engine_version)
        )
        batch.segments.append((place, maker, fence, start, end, pay))
        batch.pay_ids.append(SETTLE_PAY.digest(pay_key(job_id, fence)))
        paid.append((fence, pay))
    return paid
