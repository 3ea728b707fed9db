"""What is known about how a job ended, from three sides (caller, nodes, relay), and the bill that follows from it. Pure."""

from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from gpumesh_scheduler.domain.nouns import Outcome, Party, Usage


class Segment(NamedTuple):
    """Tokens [start, end) that one try produced and the client received. party: who is paid; None: not known here."""

    fence: int
    start_token: int
    end_token: int
    party: Party | None = None


class Delivered(NamedTuple):
    """The caller's record: what its client received."""

    ticket: bytes
    outcome: Outcome
    segments: tuple[Segment, ...]
    usage: Usage
    reason: str = ""


class Relayed(NamedTuple):
    """What this scheduler saw of a job: its last try, how far it came, whether Done went to the caller."""

    ticket: bytes
    caller: int
    fence: int
    tokens: int
    done: bool
    reason: str
    # Whether any node ever accepted: before that nothing was prefilled.
    accepted: bool
    # Tries that accepted and were stopped by us: their counts may still come.
    stopping: frozenset[int]
    parties: dict[int, Party]


class Bill(NamedTuple):
    """Body of Settle, as data."""

    job_id: bytes
    ticket: bytes
    outcome: Outcome | None
    segments: tuple[Segment, ...]
    usage: Usage
    counts: dict[int, Usage]
    reason: str
    receipt_only: bool
    from_caller: bool


@dataclass(slots=True, eq=False)
class Case:
    """One job until metering has answered. due: when it is settled with what is there; inf: not by time."""

    job_id: bytes
    opened_at: float
    due: float = inf
    delivered: Delivered | None = None
    relayed: Relayed | None = None
    # By fence: what nodes counted, and which node waits for its acknowledgement.
    counts: dict[int, Usage] = field(default_factory=dict)
    parties: dict[int, Party] = field(default_factory=dict)
    # Link of the caller that waits for DeliveredAck; 0: none.
    caller: int = 0
    sent_at: float = -inf
    receipt_only: bool = False

    @property
    def sent(self) -> bool:
        """Whether Settle has been given to the link to metering."""
        return self.sent_at > -inf

    def party(self, fence: int) -> Party | None:
        """Who served a try: from our own books first, then from a verified receipt token."""
        if self.relayed is not None and fence in self.relayed.parties:
            return self.relayed.parties[fence]
        return self.parties.get(fence)

    def whole(self) -> bool:
        """Whether nothing more is worth waiting for: the caller's record is here, and the count of every try that is to be paid."""
        delivered = self.delivered
        if delivered is None:
            return False
        if delivered.outcome is Outcome.FAILED:
            return True  # nobody pays and nobody is paid
        segments = delivered.segments
        if len(segments) == 1 and delivered.outcome is Outcome.COMPLETED:  # nearly all
            return segments[0].fence in self.counts
        wanted = {segment.fence for segment in segments}
        if delivered.outcome is Outcome.CANCELLED and self.relayed is not None:
            wanted |= self.relayed.stopping
        elif not wanted and self.relayed is None:
            return delivered.outcome is Outcome.CANCELLED  # nothing was delivered and nothing is known here
        return wanted <= self.counts.keys()

    def bill(self) -> Bill:
        """What goes to metering, from the best evidence at hand."""
        if self.delivered is not None:
            return self._bill_of_caller(self.delivered)
        if self.relayed is not None:
            return self._bill_of_relay(self.relayed)
        segments = tuple(Segment(fence, 0, 0, self.parties.get(fence)) for fence in sorted(self.counts))
        return Bill(
            self.job_id, b"", None, segments, Usage(), dict(self.counts), "", receipt_only=True, from_caller=False
        )

    def _bill_of_caller(self, record: Delivered) -> Bill:
        usage, segments = record.usage, record.segments
        if record.outcome is Outcome.CANCELLED:
            if self.relayed is not None and not self.relayed.accepted:
                # Cancelled before any node accepted: nothing was prefilled, nothing is owed.
                usage, segments = Usage(), ()
            elif not segments and (fence := self._stopped()):
                # No token reached the client, but a node prefilled the prompt for it: it is paid for that.
                segments = (Segment(fence, 0, 0),)
        elif record.outcome is Outcome.COMPLETED and not segments and self.relayed is not None and self.relayed.done:
            segments = (Segment(self.relayed.fence, 0, 0),)  # an empty answer: the prompt is paid for
        last = segments[-1].fence if segments else 0
        if (count := self.counts.get(last)) is not None:
            # The caller only estimates prompts; the node counted this one. metering bounds it by the ticket.
            usage = Usage(
                count.prompt_tokens, usage.completion_tokens, count.cached_prompt_tokens, usage.reasoning_tokens
            )
        return self._make(record.ticket, record.outcome, segments, usage, record.reason, from_caller=True)

    def _stopped(self) -> int:
        """The try that was running when the caller cancelled, if a node had accepted it; 0: none."""
        if self.relayed is not None:
            return self.relayed.fence if self.relayed.fence in self.relayed.stopping else 0
        return max(self.counts, default=0)

    def _bill_of_relay(self, relayed: Relayed) -> Bill:
        """The caller died: COMPLETED if Done was relayed, else FAILED; tokens as relayed, at most as the node counted."""
        count = self.counts.get(relayed.fence)
        if not relayed.done or count is None:
            return self._make(relayed.ticket, Outcome.FAILED, (), Usage(), relayed.reason, from_caller=False)
        tokens = min(relayed.tokens, count.completion_tokens)
        usage = Usage(count.prompt_tokens, tokens, count.cached_prompt_tokens, min(count.reasoning_tokens, tokens))
        segments = (Segment(relayed.fence, 0, tokens),)
        return self._make(relayed.ticket, Outcome.COMPLETED, segments, usage, "", from_caller=False)

    def _make(
        self,
        ticket: bytes,
        outcome: Outcome,
        segments: tuple[Segment, ...],
        usage: Usage,
        reason: str,
        *,
        from_caller: bool,
    ) -> Bill:
        party = self.party
        known = tuple([Segment(fence, start, end, party(fence) or told) for fence, start, end, told in segments])
        return Bill(self.job_id, ticket, outcome, known, usage, self.counts.copy(), reason, False, from_caller)
