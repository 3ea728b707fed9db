"""From a Settle item to columns of a batch: verifies the ticket, decides, and makes the answer that is sent once it is
committed.

This is the hot path of metering: no object per row beyond what protobuf makes, no clock per job, one HMAC.
"""

from collections.abc import Callable
from typing import Final, NamedTuple

from gpumesh.common.v1.job_pb2 import SealedTicket, Ticket
from gpumesh.metering.v1.settlement_service_pb2 import Settle
from gpumesh_metering import wire
from gpumesh_metering.domain.ledger import INT64_MAX
from gpumesh_metering.domain.settlement import Settlement, decide
from gpumesh_metering.domain.transfer_ids import SETTLE_CHARGE, SETTLE_PAY, SETTLE_SHORTFALL, pay_key
from gpumesh_metering.store import Maker, SettleBatch, Terms
from gpumesh_runtime.errors import Reason

MAX_COUNTS: Final = 64  # node counts kept per job; more tries than this do not happen
MAX_REASON_CHARACTERS: Final = 64

Verify = Callable[[bytes, str, bytes, bytes], bool]  # KeyRing.verify: context, key id, body, mac


class Decided(NamedTuple):
    """The job is in the batch at `place`; `answer` is the Settled to send when it has been committed."""

    place: int
    answer: bytes


class Refused(NamedTuple):
    """The job cannot be settled by this evidence; it may have been settled before, by other evidence. reason: of the
    closed list.
    """

    reason: str


class Receipt(NamedTuple):
    """A node's receipt without a record. fences: the tries that it names."""

    fences: frozenset[int]


class Intake:
    """Decides Settle items into a batch.

    verify: checks a ticket's seal. share_bp: what providers get of a charge, 1/100 %. Raises nothing for what a
    scheduler sends.
    """

    def __init__(self, verify: Verify, share_bp: int) -> None:
        self._verify = verify
        self._share_bp = share_bp

    def add(self, batch: SettleBatch, job_id: bytes, body: bytes, now_s: float) -> Decided | Refused | Receipt:
        """Decides one item. now_s: wall time, seconds since 1970."""
        try:
            settle = wire.settle_from_wire(body)
            if settle.receipt_only:
                return Receipt(frozenset(count.fence for count in settle.node_counts if count.fence <= INT64_MAX))
            sealed = wire.sealed_from_wire(settle.ticket)
            ticket = self._open(sealed, job_id)
        except wire.WireError:
            return Refused(Reason.TICKET_INVALID)
        if ticket is None:
            return Refused(Reason.TICKET_INVALID)
        if ticket.settle_by_time.seconds < now_s:
            return Refused(Reason.TICKET_EXPIRED)
        return self._decide(batch, job_id, settle, ticket)

    def _open(self, sealed: SealedTicket, job_id: bytes) -> Ticket | None:
        body = sealed.body
        if not self._verify(wire.TICKET_CONTEXT, sealed.key_id, body, sealed.mac):
            return None
        ticket = wire.ticket_from_wire(body)
        return ticket if ticket.job_id == job_id and len(job_id) == wire.JOB_ID_BYTES else None

    def _decide(self, batch: SettleBatch, job_id: bytes, settle: Settle, ticket: Ticket) -> Decided | Refused:
        wire_price = ticket.price
        price = wire.price_from_wire(wire_price)
        try:
            promised = wire.terms_from_wire(ticket, price)
        except wire.WireError:
            return Refused(Reason.TICKET_INVALID)
        settled = decide(
            settle.outcome,
            promised,
            wire.usage_from_wire(settle.usage),
            wire.segments_from_wire(settle),
            self._share_bp,
        )
        terms = Terms(
            ticket.account_id,
            ticket.key_id,
            ticket.model_id,
            ticket.model_revision,
            settle.reason[:MAX_REASON_CHARACTERS],
            ticket.modality,
            settled.outcome,
            settle.source,
            *price,
        )
        charge_id = SETTLE_CHARGE.id_bytes(job_id)
        place = batch.add_job(job_id, charge_id, SETTLE_SHORTFALL.id_bytes(job_id), terms, promised.hold, settled)
        pays = self._add_segments(batch, place, job_id, settle, settled)
        for count in settle.node_counts[:MAX_COUNTS]:
            if count.fence <= INT64_MAX:
                batch.add_count(place, count.fence, *wire.usage_from_wire(count.usage))
        return Decided(place, wire.settled_to_wire(settled.charge, settled.fee, wire_price, pays, repeated=False))

    @staticmethod
    def _add_segments(
        batch: SettleBatch, place: int, job_id: bytes, settle: Settle, settled: Settlement
    ) -> list[tuple[int, int]]:
        """Adds what the decision kept; (fence, pay) of each."""
        pays = []
        builds = {paid.segment.fence: paid.build for paid in reversed(settle.segments)} if settled.segments else {}
        for segment, pay in zip(settled.segments, settled.pays, strict=True):
            fence = segment.fence
            build = builds[fence]
            maker = Maker(
                segment.provider_id, segment.node_id, build.quantisation, build.engine_name, build.engine_version
            )
            pay_id = SETTLE_PAY.id_bytes(pay_key(job_id, fence))
            batch.add_segment(place, maker, fence, segment.start, segment.end, pay, pay_id)
            pays.append((fence, pay))
        return pays
