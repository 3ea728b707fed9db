"""SessionService: the links of nodes. One NodeLink per link; whatever a node sends, only its own session can suffer from it."""

from datetime import datetime
from typing import Final

from gpumesh.common.v1.link_pb2 import Failure, Goodbye, Item, ItemFlag, ItemKind
from gpumesh.node.v1.session_pb2 import Accept, CancelAck, Done, Hello, Receipt, Reject, Status, Welcome
from gpumesh_runtime.error_types import InvalidArgument, MeshError, PermissionDenied, ResourceExhausted
from gpumesh_runtime.identity import Identity
from gpumesh_runtime.link import FLAG_LAST, Link, LinkEnd, LinkProtocolError
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler import metrics
from gpumesh_scheduler.desk import Desk
from gpumesh_scheduler.domain.effects import Effect
from gpumesh_scheduler.domain.gate import RateGate
from gpumesh_scheduler.domain.job import Verdict
from gpumesh_scheduler.domain.nouns import NodeBreachError, NodeStatus
from gpumesh_scheduler.domain.reconcile import AckNode
from gpumesh_scheduler.domain.session import Session
from gpumesh_scheduler.wire import ID_BYTES, MOST_NAME, reason_from_wire, status_from_wire, usage_from_node

log = get_logger("gpumesh.scheduler.nodes")

_FRAME: Final = int(ItemKind.ITEM_KIND_FRAME)
_DONE: Final = int(ItemKind.ITEM_KIND_DONE)
_ERROR: Final = int(ItemKind.ITEM_KIND_ERROR)
_ACCEPT: Final = int(ItemKind.ITEM_KIND_ACCEPT)
_REJECT: Final = int(ItemKind.ITEM_KIND_REJECT)
_CANCEL_ACK: Final = int(ItemKind.ITEM_KIND_CANCEL_ACK)
_RECEIPT: Final = int(ItemKind.ITEM_KIND_RECEIPT)
_HEARTBEAT: Final = int(ItemKind.ITEM_KIND_HEARTBEAT)
_CONTENT: Final = int(ItemFlag.ITEM_FLAG_CONTENT)
_OVERHEAD: Final = 256
# One frame; the wire's comment says 64 KiB, an answer with log probabilities in one piece may be larger.
_MOST_FRAME: Final = 1024 * 1024
# Frames of a job that is not known here: its node is told to stop at the first and then now and then.
_TELL_EVERY: Final = 32
_END_REASON: Final = {
    LinkEnd.GOODBYE: Reason.NODE_DRAINING,
    LinkEnd.LOST: Reason.NODE_LOST,
    LinkEnd.PROTOCOL_ERROR: Reason.NODE_PROTOCOL_ERROR,
    LinkEnd.CLOSED_BY_US: Reason.DRAINING,
}


class Nodes:
    """What the links of all nodes share. heartbeat_s: told to nodes in Welcome. addresses: other schedulers that nodes may turn to."""

    def __init__(self, desk: Desk, gate: RateGate, *, heartbeat_s: float, addresses: tuple[str, ...] = ()) -> None:
        self.desk = desk
        self.links: dict[int, NodeLink] = {}
        self._gate = gate
        self._heartbeat_s = heartbeat_s
        self._addresses = addresses

    def welcome(self, hello: Hello, status: NodeStatus, peer: Identity) -> bytes:
        """Body of Welcome. Raises MeshError to refuse: another identity than the certificate's, too many at once, replaced, revoked."""
        del status
        if hello.node_id != peer.node_id:
            raise PermissionDenied(Reason.PERMISSION_DENIED, "The certificate is another node's.")
        wait_s = self._gate.take(self.desk.time())
        if wait_s > 0:
            message = "Too many nodes connect at once."
            raise ResourceExhausted(Reason.RESOURCE_EXHAUSTED, message, retry_after_s=max(1.0, wait_s), retryable=True)
        self.desk.roster.check(hello.node_id, hello.session_counter)
        fleet = len(self.desk.roster.sessions)
        return Welcome(
            scheduler_id=self.desk.scheduler_id,
            scheduler_boot_id=self.desk.boot_id,
            heartbeat_ms=round(self._heartbeat_s * 1000),
            # max(5 s, fleet / 150 s): a whole fleet comes back at 150 handshakes a second, a third of a core.
            reconnect_spread_ms=max(5000, round(fleet / 150 * 1000)),
            scheduler_addresses=self._addresses,
        ).SerializeToString()

    def hear(self) -> None:
        """Takes note of which sessions sent something since the last look, at no cost per item."""
        now = self.desk.time()
        for node in self.links.values():
            node.hear(now)


class NodeLink:
    """Receiver of one node's link."""

    def __init__(self, nodes: Nodes, certificate_end: datetime | None) -> None:
        """certificate_end: when the peer's certificate ends; None: not known, the session may last."""
        self._nodes = nodes
        self._certificate_end = certificate_end
        self._desk = nodes.desk
        self._jobs = nodes.desk.board.jobs
        self._callers = nodes.desk.callers
        self._time = nodes.desk.time
        self._seen = 0
        self._hello: tuple[Hello, NodeStatus] | None = None
        self.link: Link | None = None
        self.session = Session(0, "", "", 0, 0.0)
        self.status = Status()

    def welcome(self, body: bytes, peer: Identity) -> bytes:
        """Judges Hello. Raises MeshError to refuse."""
        hello = Hello.FromString(body)
        try:
            if max(len(hello.software_version), len(hello.boot_id)) > MOST_NAME:
                raise NodeBreachError("a name is too long")
            status = status_from_wire(hello.status)
        except NodeBreachError as error:
            raise InvalidArgument(Reason.PROTOCOL_ERROR, f"Hello is out of bounds: {error}.") from None
        self._hello = hello, status
        return self._nodes.welcome(hello, status, peer)

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """The session begins."""
        del hello_or_welcome
        if self._hello is None:
            raise LinkProtocolError("no Hello")
        hello, status = self._hello
        desk, peer = self._desk, link.peer
        now = self._time()
        self.session = session = Session(
            desk.roster.new_id(),
            peer.node_id,
            peer.provider_id,
            hello.session_counter,
            now,
            boot_id=hello.boot_id,
            version=hello.software_version,
        )
        self.link = link
        self.status = hello.status
        try:
            # Again: another session of the same node may have come while Welcome was written.
            desk.roster.check(session.node_id, session.counter)
        except MeshError:
            desk.background(link.close())
            return
        if self._certificate_end is not None:
            ends_at = now + self._certificate_end.timestamp() - desk.wall_ns() / 1e9
            session.end_with(ends_at, now, desk.limits)
        desk.nodes[session.id] = link
        self._nodes.links[session.id] = self
        log.info("session opened", node_id=session.node_id, provider_id=session.provider_id, models=len(status.models))
        desk.apply(desk.roster.open(session, status, now))

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The node drains."""
        self._desk.roster.goodbye(self.session)

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """The session is over; Goodbye or not decides the reason only."""
        desk, session = self._desk, self.session
        self._nodes.links.pop(session.id, None)
        if desk.nodes.pop(session.id, None) is not None:
            reason = _END_REASON[end]
            metrics.SESSIONS_ENDED.labels(reason.value).value += 1
            log.info("session ended", node_id=session.node_id, reason=reason.value)
            desk.apply(desk.roster.closed(session, reason, self._time()))

    def on_overflow(self, link: Link, id_: bytes) -> None:
        """The payload piled up on the way to this node; the node has been told to forget the job."""
        job = self._jobs.get(id_)
        if job is not None and job.current is not None and job.current.session is self.session:
            effects: list[Effect] = []
            self._desk.board.withdraw(job, Reason.SEND_QUEUE_FULL, self._time(), effects)
            self._desk.apply(effects)

    def hear(self, now: float) -> None:
        """Whether anything came since the last look."""
        link = self.link
        if link is not None and link.stats.messages_in != self._seen:
            self._seen = link.stats.messages_in
            self._desk.apply(self._desk.roster.heard(self.session, now))

    def on_item(self, link: Link, item: Item) -> None:
        """One item. Garbage ends this session only."""
        try:
            if item.kind == _FRAME:
                self._frame(link, item)
            else:
                self._other(link, item)
        except NodeBreachError as error:
            metrics.BREACHES.value += 1
            log.warning("node broke the protocol", node_id=self.session.node_id, cause=str(error))
            raise LinkProtocolError(str(error)) from None

    # ---- items ---------------------------------------------------------------------------------------------------------------

    def _frame(self, link: Link, item: Item) -> None:
        job = self._jobs.get(item.id)
        if job is None:
            self._stray(link, item)
            return
        size = len(item.body)
        if size > _MOST_FRAME:
            raise NodeBreachError("frame too large")
        now = self._time()
        content = item.flags & _CONTENT != 0
        verdict = job.frame(self.session, item.fence, item.seq, content, size + _OVERHEAD, item.tokens, now)
        if verdict <= Verdict.COMMIT:
            if verdict is Verdict.COMMIT:
                job.payload.release()
                metrics.CONTENT_S.observe(now - job.opened_at)
            self._callers[job.caller].send(item)
        else:
            metrics.DROPPED[verdict].value += 1

    def _stray(self, link: Link, item: Item) -> None:
        """A frame of a job that is over or was never here."""
        if (item.id, item.fence) in self.session.tries:
            metrics.DROPPED[Verdict.LATE].value += 1
            return
        metrics.DROPPED_STRAY.value += 1
        session = self.session
        if len(item.id) != ID_BYTES or session.strays >= self._desk.limits.max_strays:
            raise NodeBreachError("frames of jobs that it was not given")
        if session.strays % _TELL_EVERY == 0:
            link.cancel(item.id, Reason.UNKNOWN_JOB.value, item.fence)
        session.strays += 1

    def _other(self, link: Link, item: Item) -> None:
        kind: int = item.kind
        if kind == _HEARTBEAT:
            self._heartbeat(item)
            return
        if len(item.id) != ID_BYTES:
            raise NodeBreachError("an item without a job")
        if kind == _DONE:
            self._done(link, item)
        elif kind == _ACCEPT:
            Accept.FromString(item.body)
            self._desk.board.accept(self.session, item.id, item.fence, self._time())
        elif kind == _CANCEL_ACK:
            self._cancel_ack(link, item)
        elif kind == _RECEIPT:
            receipt = Receipt.FromString(item.body)
            self._receipt(link, item, receipt)
        elif kind == _ERROR:
            self._error(item)
        elif kind == _REJECT:
            reason = reason_from_wire(Reject.FromString(item.body).reason, Reason.NODE_REJECTED)
            self._desk.apply(self._desk.board.reject(self.session, item.id, item.fence, reason, self._time()))
        else:
            raise NodeBreachError("a node does not send this")

    def _heartbeat(self, item: Item) -> None:
        self.status = Status.FromString(item.body)
        self._desk.apply(self._desk.roster.status(self.session, status_from_wire(self.status), self._time()))

    def _done(self, link: Link, item: Item) -> None:
        desk, session = self._desk, self.session
        done = Done.FromString(item.body)
        usage = usage_from_node(done.usage)
        job_id, fence = item.id, item.fence
        attempt = session.tries.get((job_id, fence))
        now = self._time()
        if attempt is not None and done.receipt_token != attempt.token:
            raise NodeBreachError("the receipt token is another try's")
        if done.frame:
            self._only_frame(item, len(done.frame), now)
        verdict, job, effects = desk.board.done(session, job_id, fence, item.seq, item.tokens, now)
        if job is not None:
            self._callers[job.caller].send(item)
        else:
            metrics.DROPPED[verdict].value += 1
        if attempt is not None:
            running = job is not None or job_id in self._jobs
            desk.settle(desk.reconciler.counted(job_id, fence, usage, attempt.party, now, running=running))
        else:
            self._receipt(link, item, Receipt(receipt_token=done.receipt_token, usage=done.usage))
        desk.apply(effects)

    def _only_frame(self, item: Item, size: int, now: float) -> None:
        """The frame inside a Done, of which header and relay are the Done's."""
        job = self._jobs.get(item.id)
        if job is None:
            return
        content = item.flags & _CONTENT != 0
        verdict = job.frame(self.session, item.fence, item.seq, content, size + _OVERHEAD, item.tokens, now)
        if verdict is Verdict.COMMIT:
            metrics.CONTENT_S.observe(now - job.opened_at)

    def _error(self, item: Item) -> None:
        desk = self._desk
        failure = Failure.FromString(item.body)
        reason = reason_from_wire(failure.reason, Reason.ENGINE_ERROR)
        verdict, job, effects = desk.board.error(
            self.session, item.id, item.fence, item.seq, reason, failure.retryable, self._time()
        )
        if job is not None and verdict is Verdict.RELAY:
            if item.flags & FLAG_LAST == 0:
                item.flags |= FLAG_LAST
            self._callers[job.caller].send(item)
        desk.apply(effects)

    def _cancel_ack(self, link: Link, item: Item) -> None:
        desk = self._desk
        ack = CancelAck.FromString(item.body)
        usage = usage_from_node(ack.usage)
        now = self._time()
        attempt, effects = desk.board.cancel_ack(self.session, item.id, item.fence, now)
        if attempt is None:
            if ack.receipt_token:
                self._receipt(link, item, Receipt(receipt_token=ack.receipt_token, usage=ack.usage))
        elif ack.receipt_token:
            if ack.receipt_token != attempt.token:
                raise NodeBreachError("the receipt token is another try's")
            desk.settle(
                desk.reconciler.counted(item.id, item.fence, usage, attempt.party, now, running=item.id in self._jobs)
            )
        desk.apply(effects)

    def _receipt(self, link: Link, item: Item, receipt: Receipt) -> None:
        """A receipt presented again, here or for a job of another scheduler: its token says what it may claim."""
        desk = self._desk
        usage = usage_from_node(receipt.usage)
        claim = desk.seals.open_receipt(receipt.receipt_token)
        refusal = None
        if claim is None or claim.job_id != item.id or claim.party.node_id != self.session.node_id:
            refusal = Reason.RECEIPT_INVALID
        elif claim.settle_by_ns < desk.wall_ns():
            refusal = Reason.TICKET_EXPIRED
        else:
            desk.settle(
                desk.reconciler.counted(
                    item.id, claim.fence, usage, claim.party, self._time(), running=item.id in self._jobs
                )
            )
        if refusal is not None:
            metrics.RECEIPTS_REFUSED.labels(refusal.value).value += 1
            desk.ack_node(
                link,
                AckNode(self.session.node_id, item.id, item.fence or (claim.fence if claim else 0), 0, refusal.value),
            )
