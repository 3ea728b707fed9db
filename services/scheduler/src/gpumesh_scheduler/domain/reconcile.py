"""Pairs what nodes counted with what callers delivered, and keeps each pair until metering has committed it. Pure.

Rules of docs/architecture/one-request.md, step 11. Everything here can be presented again, here or to another scheduler: whatever is
dropped for want of room comes back, because caller and node keep theirs until they are acknowledged.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Final, NamedTuple

from gpumesh_scheduler.domain.evidence import Bill, Case, Delivered, Relayed
from gpumesh_scheduler.domain.nouns import Outcome, Party, Usage

# metering has not judged yet: nobody is answered, and both sides present theirs again.
PARKED: Final = "PARKED"
# Settles sent in one turn: 2,000 are 1 MiB of a background queue of 16; the others are overdue and follow with the next sweeps.
_BURST: Final = 2000


@dataclass(frozen=True, slots=True)
class Waits:
    """How long evidence waits for its other half, seconds."""

    # Delivered without the node's count; longer where the node has just been told to stop.
    delivered_s: float = 2.0
    cancelled_s: float = 5.0
    # The caller's link is lost: it may come back and present its record.
    caller_s: float = 10.0
    # The caller's link lives, but no record comes: its client reads very slowly, or the caller is broken.
    patience_s: float = 900.0
    # A receipt for a job that is not known here.
    receipt_s: float = 2.0
    # No answer from metering over a link that lives.
    resend_s: float = 30.0
    # Cases kept; a few KiB each.
    most: int = 100_000


class SendSettle(NamedTuple):
    """Give this to metering; it is sent again until it is answered."""

    bill: Bill


class AckCaller(NamedTuple):
    """DeliveredAck on the link `caller`."""

    caller: int
    job_id: bytes
    charge_nano_usd: int
    reason: str


class AckNode(NamedTuple):
    """ReceiptAck to a node's present session, if it has one."""

    node_id: str
    job_id: bytes
    fence: int
    earned_nano_usd: int
    reason: str


Settling = list[SendSettle | AckCaller | AckNode]


class Reconciler:
    """Cases by job id. `waiting` are those that metering has not been given."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.cases: dict[bytes, Case] = {}
        self.waiting: dict[bytes, Case] = {}
        self.lost_callers: dict[int, float] = {}
        self.dropped = 0

    def ended(self, job_id: bytes, relayed: Relayed, now: float) -> Settling:
        """A job has had its terminal here."""
        case = self._case(job_id, now)
        if case is None or case.sent:
            return []
        case.relayed = relayed
        if case.delivered is None:
            lost_at = self.lost_callers.get(relayed.caller)
            case.due = now + self.waits.patience_s if lost_at is None else lost_at + self.waits.caller_s
        return self._judge(case, now)

    def counted(
        self, job_id: bytes, fence: int, usage: Usage, party: Party, now: float, *, running: bool = False
    ) -> Settling:
        """A node's receipt: Done, CancelAck or Receipt. running: the job still runs here in another try, so nothing is due yet."""
        case = self._case(job_id, now)
        if case is None:
            return []
        case.counts.setdefault(fence, usage)
        case.parties.setdefault(fence, party)
        if case.sent:
            return []
        if case.delivered is None and case.relayed is None:
            case.due = inf if running else min(case.due, now + self.waits.receipt_s)
        return self._judge(case, now)

    def delivered(
        self, job_id: bytes, caller: int, record: Delivered, parties: Iterable[tuple[int, Party]], now: float
    ) -> Settling:
        """The caller's record. parties: who served, from receipt tokens that were verified."""
        case = self._case(job_id, now)
        if case is None:
            return []
        case.caller = caller
        for fence, party in parties:
            case.parties.setdefault(fence, party)
        if case.sent and not case.receipt_only:
            return []
        # A receipt alone was on its way: the record now says more than it could.
        case.sent_at = -inf
        case.receipt_only = False
        self.waiting[job_id] = case
        if case.delivered is None:
            case.delivered = record
            cancelled = record.outcome is Outcome.CANCELLED
            case.due = now + (self.waits.cancelled_s if cancelled else self.waits.delivered_s)
        return self._judge(case, now)

    def abandoned(self, job_id: bytes, now: float) -> None:
        """A job ended here in a way that its caller may continue elsewhere: what nodes counted for it here is presented alone."""
        case = self.waiting.get(job_id)
        if case is not None and case.delivered is None and case.relayed is None:
            case.due = now + self.waits.receipt_s

    def caller_lost(self, caller: int, now: float) -> None:
        """A caller's link is down: what it has not presented in time is settled from what was relayed."""
        self.lost_callers[caller] = now
        for case in self.waiting.values():
            if case.delivered is None and case.relayed is not None and case.relayed.caller == caller:
                case.due = min(case.due, now + self.waits.caller_s)

    def sweep(self, now: float) -> Settling:
        """Settles what has waited long enough; to be called a few times a second."""
        out: Settling = []
        for case in [case for case in self.waiting.values() if case.due <= now]:
            out += self._send(case, now)
        old = now - self.waits.caller_s - self.waits.patience_s
        for caller in [caller for caller, at in self.lost_callers.items() if at < old]:
            del self.lost_callers[caller]
        return out

    def unanswered(self, now: float, *, everything: bool = False) -> Settling:
        """What metering has been given and has not answered: all of it on a new link, what is overdue on an old one."""
        before = inf if everything else now - self.waits.resend_s
        overdue = (case for case in self.cases.values() if case.sent and case.sent_at <= before)
        out: Settling = []
        for case in list(islice(overdue, _BURST)):
            out += self._send(case, now)
        return out

    def settled(self, job_id: bytes, charge_nano_usd: int, pays: dict[int, int], reason: str) -> Settling:
        """metering's answer: everybody who presented something is told."""
        case = self.cases.get(job_id)
        if case is None:
            return []
        if reason == PARKED:
            if case.receipt_only:
                self._drop(case)
            return []
        self._drop(case)
        out: Settling = []
        if case.caller:
            out.append(AckCaller(case.caller, job_id, charge_nano_usd, reason))
        for fence in case.counts:
            party = case.party(fence)
            if party is not None:
                out.append(AckNode(party.node_id, job_id, fence, pays.get(fence, 0), reason))
        return out

    # ---- inside ------------------------------------------------------------------------------------------------------------

    def _case(self, job_id: bytes, now: float) -> Case | None:
        case = self.cases.get(job_id)
        if case is None:
            if len(self.cases) >= self.waits.most:
                self.dropped += 1
                return None
            case = self.cases[job_id] = self.waiting[job_id] = Case(job_id, now)
        return case

    def _judge(self, case: Case, now: float) -> Settling:
        return self._send(case, now) if case.delivered is not None and case.whole() else []

    def _send(self, case: Case, now: float) -> Settling:
        self.waiting.pop(case.job_id, None)
        case.sent_at = now
        bill = case.bill()
        case.receipt_only = bill.receipt_only
        return [SendSettle(bill)]

    def _drop(self, case: Case) -> None:
        self.cases.pop(case.job_id, None)
        self.waiting.pop(case.job_id, None)
