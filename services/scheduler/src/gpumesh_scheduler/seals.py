"""Tickets that come in and receipt tokens that go out: parsed, checked, sealed with the shared key ring. No asymmetric cryptography."""

from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from gpumesh.common.v1.job_pb2 import ReceiptClaim, ReceiptToken, SealedTicket
from gpumesh.common.v1.job_pb2 import Ticket as TicketMessage
from gpumesh_runtime.error_types import PermissionDenied
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.sealing import KeyRing
from gpumesh_scheduler.domain.nouns import Party
from gpumesh_scheduler.domain.session import Try
from gpumesh_scheduler.domain.tickets import Ticket
from gpumesh_scheduler.wire import MOST_TOKENS, build_from_wire, fill_build

_TICKET: Final = b"gpumesh-ticket-v1"
_GRANT: Final = b"gpumesh-grant-v1"
_RECEIPT: Final = b"gpumesh-receipt-v1"
_NANO: Final = 1_000_000_000
# Twice the most sessions; a party is forgotten only to be encoded again.
_MOST_PARTIES: Final = 40_000
_NO_FEATURES: Final[frozenset[int]] = frozenset()


class Claim(NamedTuple):
    """What a verified receipt token says."""

    job_id: bytes
    fence: int
    party: Party
    settle_by_ns: int


class Seals:
    """The two seals of this service."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring
        # The part of a claim that a party's tries share, encoded: encodings of parts, one after the other, are the encoding of the whole.
        self._parties: dict[Party, bytes] = {}
        self._stamp: tuple[int, bytes] = (0, b"")

    def open_ticket(self, sealed: bytes) -> Ticket:
        """A ticket whose seal is ours. Raises PermissionDenied (TICKET_INVALID)."""
        try:
            outer = SealedTicket.FromString(sealed)
            body, grant = outer.body, outer.grant
            if not self._ring.check((_GRANT, grant) if grant else None, _TICKET, outer.key_id, body, outer.mac):
                raise PermissionDenied(Reason.TICKET_INVALID, "The ticket's seal is wrong.")
            ticket = TicketMessage.FromString(body + grant)  # in this order the router's part wins over the caller's
        except DecodeError:
            raise PermissionDenied(Reason.TICKET_INVALID, "The ticket is malformed.") from None
        if not (0 <= ticket.max_output_tokens <= MOST_TOKENS and 0 <= ticket.input_tokens_estimate <= MOST_TOKENS):
            raise PermissionDenied(Reason.TICKET_INVALID, "The ticket's token counts are out of bounds.")
        submit_by, settle_by = ticket.submit_by_time, ticket.settle_by_time
        return Ticket(
            job_id=ticket.job_id,
            attempt=ticket.attempt,
            model=(ticket.model_id, ticket.model_revision),
            scheduler_id=ticket.scheduler_id,
            scheduler_boot_id=ticket.scheduler_boot_id,
            submit_by_ns=submit_by.seconds * _NANO + submit_by.nanos,
            settle_by_ns=settle_by.seconds * _NANO + settle_by.nanos,
            max_output_tokens=ticket.max_output_tokens,
            input_tokens_estimate=ticket.input_tokens_estimate,
            modality=ticket.modality,
            features=frozenset(map(int, ticket.features)) if ticket.features else _NO_FEATURES,
        )

    def receipt_token(self, attempt: Try, settle_by_ns: int) -> bytes:
        """What a try's node may claim, until settle_by (whole seconds): no trace of the buyer."""
        party = attempt.party
        shared = self._parties.get(party) or self._encode_party(party)
        seconds = settle_by_ns // _NANO
        if self._stamp[0] != seconds:
            claim = ReceiptClaim()
            claim.settle_by_time.seconds = seconds
            self._stamp = seconds, claim.SerializeToString()
        own = ReceiptClaim(job_id=attempt.job_id, fence=attempt.fence).SerializeToString()
        body = own + shared + self._stamp[1]
        key_id, mac = self._ring.seal(_RECEIPT, body)
        return ReceiptToken(key_id=key_id, body=body, mac=mac).SerializeToString()

    def _encode_party(self, party: Party) -> bytes:
        if len(self._parties) >= _MOST_PARTIES:
            self._parties.clear()
        claim = ReceiptClaim(provider_id=party.provider_id, node_id=party.node_id)
        fill_build(claim.build, party.build)
        encoded = self._parties[party] = claim.SerializeToString()
        return encoded

    def open_receipt(self, token: bytes) -> Claim | None:
        """A token that a scheduler of this mesh gave out; None for anything else."""
        try:
            outer = ReceiptToken.FromString(token)
            if not self._ring.verify(_RECEIPT, outer.key_id, outer.body, outer.mac):
                return None
            claim = ReceiptClaim.FromString(outer.body)
        except DecodeError:
            return None
        party = Party(claim.provider_id, claim.node_id, build_from_wire(claim.build))
        settle_by = claim.settle_by_time
        return Claim(claim.job_id, claim.fence, party, settle_by.seconds * _NANO + settle_by.nanos)
