"""Which nodes are here. Pure: sessions open, report, fall silent, drain, are replaced or revoked; the board's books follow."""

from dataclasses import replace
from typing import Final

from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.board import Board
from gpumesh_scheduler.domain.effects import Effects, EndSession, SendCancel
from gpumesh_scheduler.domain.nouns import Limits, NodeStatus
from gpumesh_scheduler.domain.session import Seat, Session, SessionState

# A sweep this late means that this process stood still: what nodes sent meanwhile is unread, so their silence is not theirs.
_STOOD_STILL_S: Final = 2.0
# Revoked nodes kept in mind; a certificate lives 24 h, so older ones cannot come back anyway.
_MOST_REVOKED: Final = 100_000


class Roster:
    """Sessions by node. One per node: the higher session counter wins."""

    def __init__(self, board: Board, limits: Limits) -> None:
        self.board = board
        self.limits = limits
        self.sessions: dict[str, Session] = {}
        self.revoked: dict[str, None] = {}
        self._next_id = 1
        self._swept_at: float | None = None

    def check(self, node_id: str, counter: int) -> None:
        """Whether a node's Hello may open a session. Raises MeshError; changes nothing."""
        if node_id in self.revoked:
            raise MeshError.of(Reason.NODE_REVOKED, "The node was revoked.")
        if self.board.draining:
            raise MeshError.of(Reason.DRAINING, "The scheduler is shutting down.", retryable=True)
        known = self.sessions.get(node_id)
        if known is not None and counter <= known.counter:
            message = "A session of this node with a higher counter is here."
            raise MeshError.of(Reason.SESSION_REPLACED, message, retry_after_s=self.limits.lost_s)
        if known is None and len(self.sessions) >= self.limits.max_sessions:
            message = "The scheduler holds as many sessions as it may."
            raise MeshError.of(Reason.RESOURCE_EXHAUSTED, message, retry_after_s=30.0, retryable=True)

    def open(self, session: Session, status: NodeStatus, now: float) -> Effects:
        """A checked session begins; an earlier one of the same node is fenced off first."""
        out: Effects = []
        known = self.sessions.get(session.node_id)
        if known is not None:
            self._forget(known, Reason.SESSION_REPLACED, now, out)
            out.append(EndSession(known, Reason.SESSION_REPLACED))
        self.sessions[session.node_id] = session
        self._apply(session, status, now, out)
        self.board.fill_all(now, out)
        return out

    def new_id(self) -> int:
        """A number for a session; never used twice."""
        self._next_id += 1
        return self._next_id

    def status(self, session: Session, status: NodeStatus, now: float) -> Effects:
        """A heartbeat. What the node says about its models replaces what it said before; its running jobs are compared with the books."""
        out: Effects = []
        if self.sessions.get(session.node_id) is not session:
            return out
        for attempt in session.missing(status, now, self.limits):
            self.board.try_gone(attempt, now, out)
        self._apply(session, status, now, out)
        self.board.fill_all(now, out)
        return out

    def heard(self, session: Session, now: float) -> Effects:
        """Something came from a session that was in doubt."""
        out: Effects = []
        session.heard_at = now
        if session.state is SessionState.SUSPECT:
            self._turn(session, SessionState.READY)
            self.board.fill_all(now, out)
        return out

    def goodbye(self, session: Session) -> None:
        """The node drains: no offers; what runs goes on."""
        session.leaving = True
        if session.state is not SessionState.LOST:
            self._turn(session, SessionState.DRAINING)

    def closed(self, session: Session, reason: Reason, now: float) -> Effects:
        """Its link is over, or must be. Repetition is harmless."""
        out: Effects = []
        if self.sessions.get(session.node_id) is session:
            self._forget(session, reason, now, out)
            self.board.fill_all(now, out)
        return out

    def revoke(self, node_ids: list[str], now: float) -> Effects:
        """Nodes whose certificates no longer count: their sessions end now, and no new one begins."""
        out: Effects = []
        for node_id in node_ids:
            self.revoked[node_id] = None
            session = self.sessions.get(node_id)
            if session is not None:
                self._forget(session, Reason.NODE_REVOKED, now, out)
                out.append(EndSession(session, Reason.NODE_REVOKED))
        while len(self.revoked) > _MOST_REVOKED:
            del self.revoked[next(iter(self.revoked))]
        if out:
            self.board.fill_all(now, out)
        return out

    def sweep(self, now: float) -> Effects:
        """Judges silence; to be called a few times a second."""
        out: Effects = []
        since = self._swept_at
        self._swept_at = now
        if since is not None and now - since > _STOOD_STILL_S:
            for session in self.sessions.values():
                session.heard_at = min(now, session.heard_at + now - since)
        for session in list(self.sessions.values()):
            if now >= session.leaves_at:
                self._outlived(session, now, out)
                continue
            state = session.silence(now, self.limits)
            if state is session.state:
                continue
            if state is SessionState.LOST:
                self._forget(session, Reason.NODE_LOST, now, out)
                out.append(EndSession(session, Reason.NODE_LOST))
            else:
                self._turn(session, state)
        if out:
            self.board.fill_all(now, out)
        return out

    def catalogue(self, model_ids: frozenset[str], now: float) -> Effects:
        """The registry's catalogue, whole: seats of other models get nothing new."""
        out: Effects = []
        self.board.pools.catalogue = model_ids
        for session in self.sessions.values():
            self.board.pools.refresh_session(session)
        self.board.fill_all(now, out)
        return out

    # ---- inside ------------------------------------------------------------------------------------------------------------

    def _turn(self, session: Session, state: SessionState) -> None:
        session.state = state
        self.board.pools.refresh_session(session)

    def _outlived(self, session: Session, now: float, out: Effects) -> None:
        """Its certificate ends: no new jobs, and the end when it has none left or when the certificate is over."""
        self.goodbye(session)
        if now >= session.ends_at or not session.tries:
            self._forget(session, Reason.CERTIFICATE_INVALID, now, out)
            out.append(EndSession(session, Reason.CERTIFICATE_INVALID))

    def _forget(self, session: Session, reason: Reason, now: float, out: Effects) -> None:
        del self.sessions[session.node_id]
        session.state = SessionState.LOST
        for seat in session.seats.values():
            self.board.pools.remove(seat)
        self.board.session_lost(session, reason, now, out)

    def _apply(self, session: Session, status: NodeStatus, now: float, out: Effects) -> None:
        state = SessionState.DRAINING if status.draining or session.leaving else SessionState.READY
        if state is not session.state:
            self._turn(session, state)
        session.strays = 0
        self._seats(session, status)
        for job_id, fence in session.strangers(status):
            out.append(SendCancel(session, job_id, fence, Reason.UNKNOWN_JOB))

    def _seats(self, session: Session, status: NodeStatus) -> None:
        pools = self.board.pools
        told = {model.build.key: model for model in status.models}
        for key, model in told.items():
            seat = session.seats.get(key)
            if seat is None:
                seat = session.seats[key] = Seat(session, model)
                pools.add(seat)
            else:
                seat.report(model)
                pools.refresh(seat)
        for key in [key for key in session.seats if key not in told]:
            seat = session.seats[key]
            if seat.used:
                # Tries still hold slots of it: keep the seat for their sake, closed.
                seat.report(replace(seat.model, ready=False))
                pools.refresh(seat)
            else:
                del session.seats[key]
                pools.remove(seat)
