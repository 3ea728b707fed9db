"""Tickets that come in and receipt tokens that go out: parsed, checked, sealed with the shared key ring. No asymmetric cryptography."""

from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from gpumesh.common.v1.job_pb2 import ReceiptClaim, ReceiptToken, SealedTicket
from gpumesh.common.v1.job_pb2 import Ticket as TicketMessage
from gpumesh_runtime.error_types import PermissionDenied
from gpumesh_runtime.link.items import varint
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.sealing import KeyRing
from gpumesh_scheduler.domain.nouns import ModelKey, Party
from gpumesh_scheduler.domain.session import Try
from gpumesh_scheduler.domain.tickets import Ticket
from gpumesh_scheduler.wire import MOST_TOKENS, build_from_wire, fill_build

_TICKET: Final = b"gpumesh-ticket-v1"
_GRANT: Final = b"gpumesh-grant-v1"
_RECEIPT: Final = b"gpumesh-receipt-v1"
_NANO: Final = 1_000_000_000
# Twice the most sessions; a party is forgotten only to be encoded again.
_MOST_PARTIES: Final = 40_000
# Twice the grants that live in two seconds of many keys.
_MOST_GRANTS: Final = 4096
_NO_FEATURES: Final[frozenset[int]] = frozenset()
# What all jobs of a grant share. A grant that says more than this is merged with each ticket anew.
_SHARED_FIELDS: Final = frozenset((
    "account_id", "key_id", "model_id", "model_revision", "price", "lease_id", "scheduler_id", "scheduler_boot_id", "submit_by_time",
    "settle_by_time", "grant_id",
))  # fmt: skip
# Of a Ticket: model, scheduler_id, scheduler_boot_id, submit_by_ns, settle_by_ns.
_Shared = tuple[ModelKey, str, str, int, int]


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
        self._grants: dict[bytes, _Shared] = {}

    def open_ticket(self, sealed: bytes) -> Ticket:
        """A ticket whose seal is ours. Raises PermissionDenied (TICKET_INVALID)."""
        try:
            outer = SealedTicket.FromString(sealed)
            body, grant = outer.body, outer.grant
            if not self._ring.check((_GRANT, grant) if grant else None, _TICKET, outer.key_id, body, outer.mac):
                raise PermissionDenied(Reason.TICKET_INVALID, "The ticket's seal is wrong.")
            shared = (self._grants.get(grant) or self._read_grant(grant)) if grant else None
            # With a grant that is known the caller's own part has only its own fields read; else, in this order, the router's part wins.
            ticket = TicketMessage.FromString(body if shared else body + grant)
        except DecodeError:
            raise PermissionDenied(Reason.TICKET_INVALID, "The ticket is malformed.") from None
        output, estimate = ticket.max_output_tokens, ticket.input_tokens_estimate
        if not (0 <= output <= MOST_TOKENS and 0 <= estimate <= MOST_TOKENS):
            raise PermissionDenied(Reason.TICKET_INVALID, "The ticket's token counts are out of bounds.")
        features = frozenset(map(int, ticket.features)) if ticket.features else _NO_FEATURES
        return Ticket(
            ticket.job_id, ticket.attempt, *(shared or _shared_of(ticket)), output, estimate, ticket.modality, features
        )

    def _read_grant(self, grant: bytes) -> _Shared | None:
        """What a verified grant says of all its jobs, kept; None when it says more than that. Raises DecodeError."""
        ticket = TicketMessage.FromString(grant)
        if any(field.name not in _SHARED_FIELDS for field, _ in ticket.ListFields()):
            return None
        if len(self._grants) >= _MOST_GRANTS:
            self._grants.clear()
        shared = self._grants[grant] = _shared_of(ticket)
        return shared

    def receipt_token(self, attempt: Try, settle_by_ns: int) -> bytes:
        """What a try's node may claim, until settle_by (whole seconds): no trace of the buyer."""
        party = attempt.party
        shared = self._parties.get(party) or self._encode_party(party)
        seconds = settle_by_ns // _NANO
        if self._stamp[0] != seconds:
            claim = ReceiptClaim()
            claim.settle_by_time.seconds = seconds
            self._stamp = seconds, claim.SerializeToString()
        # Claim and token field by field (job_id, fence; key_id, body, mac): two messages would cost as much again as the seal.
        body = b"\x0a\x10" + attempt.job_id + b"\x10" + varint(attempt.fence) + shared + self._stamp[1]
        key_id, mac = self._ring.seal(_RECEIPT, body)
        key = key_id.encode()
        return b"\x0a" + varint(len(key)) + key + b"\x12" + varint(len(body)) + body + b"\x1a\x20" + mac

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


def _shared_of(ticket: TicketMessage) -> _Shared:
    submit_by, settle_by = ticket.submit_by_time, ticket.settle_by_time
    return (
        (ticket.model_id, ticket.model_revision),
        ticket.scheduler_id,
        ticket.scheduler_boot_id,
        submit_by.seconds * _NANO + submit_by.nanos,
        settle_by.seconds * _NANO + settle_by.nanos,
    )
