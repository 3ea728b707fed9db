"""One node's session: liveness by silence, seats by model, and the tries that hold their slots. Pure.

The scheduler owns the guards: a try takes its slot when it is offered and gives it back on its end (Done, Error, Reject, CancelAck),
with the session, or when two heartbeats running do not list it.
"""

from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Final

from gpumesh_scheduler.domain.choice.filters import Block, SeatView
from gpumesh_scheduler.domain.nouns import Limits, ModelKey, NodeStatus, Party, ServedModel

# A digest must leave a try out this often before its slot is taken back: Done may be behind the heartbeat, which overtakes data.
_MISSES: Final = 2


class SessionState(IntEnum):
    """Whether a session gets offers."""

    READY = 1
    SUSPECT = 2
    DRAINING = 3
    LOST = 4


class Seat(SeatView):
    """One model on one node. `used` counts tries, `outstanding_tokens` what they may still take."""

    __slots__ = ("key", "party", "position", "session")

    def __init__(self, session: "Session", model: ServedModel) -> None:
        super().__init__(model)
        self.session = session
        # Fixed for a seat: what jobs ask for, and who is paid for what is served here (the build as last reported).
        self.key = model.build.key
        self.party = Party(session.provider_id, session.node_id, model.build)
        # Index in its pool's list of free seats; -1: not there.
        self.position = -1

    def report(self, model: ServedModel) -> None:
        """What the node says about it now. Tries that run keep the party that they were offered to."""
        if model.build != self.model.build:
            self.party = Party(self.session.provider_id, self.session.node_id, model.build)
        self.model = model


@dataclass(slots=True, eq=False)
class Try:
    """One offer of a job to a node: the guard of one slot. party: who serves it. token: the ReceiptToken, set by the rim."""

    job_id: bytes
    fence: int
    session: "Session"
    seat: Seat
    party: Party
    cost: int
    offered_at: float
    accepted: bool = False
    cancelled: bool = False
    missed: int = 0
    token: bytes = b""


class Session:
    """A node's session as the books have it. `id` is ours and never reused; `heard_at` is set by the rim on every item."""

    __slots__ = (
        "boot_id",
        "counter",
        "ends_at",
        "heard_at",
        "id",
        "leaves_at",
        "leaving",
        "node_id",
        "opened_at",
        "provider_id",
        "seats",
        "state",
        "strays",
        "tries",
        "version",
    )

    def __init__(
        self,
        id_: int,
        node_id: str,
        provider_id: str,
        counter: int,
        now: float,
        *,
        boot_id: str = "",
        version: str = "",
    ) -> None:
        self.id = id_
        self.node_id = node_id
        self.provider_id = provider_id
        self.counter = counter
        self.boot_id = boot_id
        self.version = version
        self.opened_at = now
        self.heard_at = now
        self.state = SessionState.READY
        self.seats: dict[ModelKey, Seat] = {}
        self.tries: dict[tuple[bytes, int], Try] = {}
        # Said Goodbye: no report of its own brings it back.
        self.leaving = False
        # When its certificate ends: TLS checked it at the start of a stream that may outlive it. Before that it gets nothing new.
        self.ends_at = inf
        self.leaves_at = inf
        self.strays = 0

    def end_with(self, ends_at: float, now: float, limits: Limits) -> None:
        """Ties the session to its certificate. What runs has reauthenticate_s to finish, or a tenth of a short life."""
        self.ends_at = ends_at
        self.leaves_at = ends_at - min(limits.reauthenticate_s, 0.1 * (ends_at - now))

    def silence(self, now: float, limits: Limits) -> SessionState:
        """The state that silence asks for: never better than DRAINING for a session that drains."""
        silent = now - self.heard_at
        if silent >= limits.lost_s:
            return SessionState.LOST
        if self.state is SessionState.DRAINING:
            return SessionState.DRAINING
        return SessionState.SUSPECT if silent >= limits.suspect_s else SessionState.READY

    def gate(self) -> Block | None:
        """Why the whole session gets no offers; None when it does."""
        if self.state is SessionState.READY:
            return None
        return Block.SESSION_DRAINING if self.state is SessionState.DRAINING else Block.SESSION_SUSPECT

    def missing(self, status: NodeStatus, now: float, limits: Limits) -> list[Try]:
        """Tries that the node no longer runs, by two digests running and `digest_grace_s` after the offer: their slots are free."""
        gone: list[Try] = []
        for key, attempt in self.tries.items():
            # A cancelled try is answered by control items, which heartbeats do not overtake: once is enough, after a round trip.
            grace_s, misses = (limits.accept_s, 1) if attempt.cancelled else (limits.digest_grace_s, _MISSES)
            if key in status.running or now - attempt.offered_at < grace_s:
                attempt.missed = 0
                continue
            attempt.missed += 1
            if attempt.missed >= misses:
                gone.append(attempt)
        return gone

    def strangers(self, status: NodeStatus) -> list[tuple[bytes, int]]:
        """Jobs that the node runs and these books do not have: they are to be cancelled there."""
        return [key for key in status.running if key not in self.tries]
