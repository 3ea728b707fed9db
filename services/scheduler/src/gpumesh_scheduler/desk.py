"""Carries out what the cores decide: effects become items on links. The one place that holds links by the numbers that cores use."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from gpumesh.common.v1.link_pb2 import GoodbyeReason, ItemKind
from gpumesh.node.v1.session_pb2 import ReceiptAck
from gpumesh.scheduler.v1.dispatch_service_pb2 import DeliveredAck
from gpumesh_runtime import tracing
from gpumesh_runtime.link import FLAG_FIRST, FLAG_LAST, Link
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler import metrics
from gpumesh_scheduler.domain.board import Board
from gpumesh_scheduler.domain.effects import Effect, EndSession, JobEnded, SendCancel, SendOffer, TellCaller, TryLost
from gpumesh_scheduler.domain.evidence import Bill, Relayed
from gpumesh_scheduler.domain.nouns import Limits
from gpumesh_scheduler.domain.reconcile import AckCaller, AckNode, Reconciler, SendSettle, Settling, Waits
from gpumesh_scheduler.domain.roster import Roster
from gpumesh_scheduler.domain.tickets import ReplayMemory
from gpumesh_scheduler.seals import Seals
from gpumesh_scheduler.wire import delivered_ack_to_wire, offer_to_wire, receipt_ack_to_wire

log = get_logger("gpumesh.scheduler.desk")

OFFER: Final = int(ItemKind.ITEM_KIND_OFFER)
PAYLOAD: Final = int(ItemKind.ITEM_KIND_PAYLOAD)
DELIVERED_ACK: Final = int(ItemKind.ITEM_KIND_DELIVERED_ACK)
RECEIPT_ACK: Final = int(ItemKind.ITEM_KIND_RECEIPT_ACK)
_NONE: Final[frozenset[int]] = frozenset()
_GOODBYES: Final = {
    Reason.SESSION_REPLACED: GoodbyeReason.GOODBYE_REASON_REPLACED,
    Reason.NODE_REVOKED: GoodbyeReason.GOODBYE_REASON_REVOKED,
    Reason.CERTIFICATE_INVALID: GoodbyeReason.GOODBYE_REASON_REAUTHENTICATE,
    Reason.NODE_PROTOCOL_ERROR: GoodbyeReason.GOODBYE_REASON_PROTOCOL_ERROR,
}


class Desk:
    """The cores of one scheduler and the links that they act on. One event loop; nothing here awaits.

    callers: link by caller number. nodes: link by session number. give_settle: gives a bill to metering, set by its rim.
    time: monotonic seconds. wall_ns: nanoseconds since 1970.
    """

    def __init__(
        self,
        limits: Limits,
        waits: Waits,
        seals: Seals,
        *,
        scheduler_id: str,
        boot_id: str,
        time: Callable[[], float],
        wall_ns: Callable[[], int],
        random: Callable[[], float],
        tick_s: float = 0.05,
    ) -> None:
        self.limits = limits
        self.seals = seals
        self.scheduler_id = scheduler_id
        self.boot_id = boot_id
        self.time = time
        self.wall_ns = wall_ns
        self.board = Board(limits, random, tick_s=tick_s)
        self.roster = Roster(self.board, limits)
        self.reconciler = Reconciler(waits)
        self.replay = ReplayMemory()
        self.callers: dict[int, Link] = {}
        self.nodes: dict[int, Link] = {}
        self.give_settle: Callable[[Bill], None] = lambda _bill: None
        self._spans: dict[tuple[bytes, int], tracing.Span] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._next_caller = 0
        self._carry_out: dict[type[Effect], Callable[[Any], None]] = {
            SendOffer: self._send_offer,
            SendCancel: self._send_cancel,
            TellCaller: self._tell_caller,
            JobEnded: self._job_ended,
            EndSession: self._end_session,
            TryLost: self._try_lost,
        }

    def new_caller(self, link: Link) -> int:
        """A number for a caller's link; never used twice."""
        self._next_caller += 1
        self.callers[self._next_caller] = link
        return self._next_caller

    def caller_gone(self, caller: int) -> None:
        """Its link is down."""
        self.callers.pop(caller, None)
        now = self.time()
        self.reconciler.caller_lost(caller, now)
        self.apply(self.board.caller_lost(caller, now))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something short that must await, such as closing a link."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- effects of the board and roster -------------------------------------------------------------------------------------

    def apply(self, effects: Iterable[Effect]) -> None:
        """Carries effects out in order."""
        for effect in effects:
            self._carry_out[type(effect)](effect)

    def _send_offer(self, effect: SendOffer) -> None:
        job, attempt = effect
        link = self.nodes[attempt.session.id]
        terms, payload = job.terms, job.payload
        now = self.time()
        if job.try_number == 1:
            metrics.PLACED_S.observe(now - job.opened_at)
        traceparent = terms.traceparent
        if traceparent:
            span = tracing.span(
                "scheduler.try",
                traceparent,
                {
                    "gen_ai.operation.name": "chat",
                    "gen_ai.request.model": terms.model[0],
                    "gpumesh.node_id": attempt.session.node_id,
                },
            )
            self._spans[job.id, attempt.fence] = span
            traceparent = span.traceparent
        attempt.token = token = self.seals.receipt_token(attempt, terms.settle_by_ns)
        body = offer_to_wire(job, token, traceparent, now)
        whole = payload.expected_bytes == 0
        link.send_new(
            OFFER, id=job.id, body=body, fence=attempt.fence, flags=FLAG_FIRST | FLAG_LAST if whole else FLAG_FIRST
        )
        last = len(payload.pieces) if payload.complete else -1
        for number, piece in enumerate(payload.pieces, 1):
            flags = FLAG_LAST if number == last else 0
            link.send_new(PAYLOAD, id=job.id, body=piece, fence=attempt.fence, seq=number, flags=flags)

    def _send_cancel(self, effect: SendCancel) -> None:
        link = self.nodes.get(effect.session.id)
        if link is not None:
            link.cancel(effect.job_id, effect.reason.value, effect.fence, effect.delivered_tokens)

    def _tell_caller(self, effect: TellCaller) -> None:
        job = effect.job
        link = self.callers.get(job.caller)
        if link is not None:
            link.fail(job.id, effect.error, seq=job.frames, fence=job.fence)

    def _job_ended(self, effect: JobEnded) -> None:
        job = effect.job
        done = effect.done
        if done:
            metrics.COMPLETED.value += 1
        else:
            metrics.JOBS.labels(effect.outcome.name, effect.reason).value += 1
        tries = job.tries
        now = self.time()
        if not effect.final:
            self.reconciler.abandoned(job.id, now)
        else:
            relayed = Relayed(
                job.terms.ticket,
                job.caller,
                job.fence,
                job.tokens,
                done,
                effect.reason,
                done or any(attempt.accepted for attempt in tries),
                _NONE if done else frozenset(t.fence for t in tries if t.accepted and t.cancelled),
                {attempt.fence: attempt.party for attempt in tries},
            )
            self.settle(self.reconciler.ended(job.id, relayed, now))
        if job.terms.traceparent:
            for attempt in tries:
                self._end_span(job.id, attempt.fence, effect.reason)

    def _end_session(self, effect: EndSession) -> None:
        session, reason = effect
        link = self.nodes.pop(session.id, None)
        if link is not None:
            metrics.SESSIONS_ENDED.labels(reason.value).value += 1
            log.info("session ended", node_id=session.node_id, reason=reason.value)
            if (goodbye := _GOODBYES.get(reason)) is not None:
                link.goodbye(goodbye, 0)
            self.background(link.close())

    def _try_lost(self, effect: TryLost) -> None:
        metrics.TRIES_LOST.labels(effect.reason.value).value += 1
        self._end_span(effect.attempt.job_id, effect.attempt.fence, effect.reason.value)

    def _end_span(self, job_id: bytes, fence: int, reason: str) -> None:
        span = self._spans.pop((job_id, fence), None) if self._spans else None
        if span is not None:
            if reason:
                span.fail(reason)
            span.end()

    # ---- effects of the reconciler -------------------------------------------------------------------------------------------

    def settle(self, effects: Settling) -> None:
        """Carries out what the reconciler wants."""
        for effect in effects:
            if isinstance(effect, SendSettle):
                self.give_settle(effect.bill)
            elif isinstance(effect, AckNode):
                session = self.roster.sessions.get(effect.node_id)
                if session is not None:
                    self.ack_node(self.nodes[session.id], effect)
            else:
                self._ack_caller(effect)

    def answer(self, acks: Settling) -> None:
        """Tells everybody of many jobs that were settled: one item to each node and caller."""
        by_node: dict[str, list[AckNode]] = {}
        by_caller: dict[int, list[AckCaller]] = {}
        for ack in acks:
            if type(ack) is AckNode:
                by_node.setdefault(ack.node_id, []).append(ack)
            elif type(ack) is AckCaller:
                by_caller.setdefault(ack.caller, []).append(ack)
        for node_id, of_node in by_node.items():
            session = self.roster.sessions.get(node_id)
            if session is not None:
                self.nodes[session.id].send_new(RECEIPT_ACK, body=receipt_ack_to_wire(of_node))
        for caller, of_caller in by_caller.items():
            link = self.callers.get(caller)
            if link is not None:
                link.send_new(DELIVERED_ACK, body=delivered_ack_to_wire(of_caller))

    def _ack_caller(self, effect: AckCaller) -> None:
        link = self.callers.get(effect.caller)
        if link is not None:
            body = DeliveredAck(charge_nano_usd=effect.charge_nano_usd, reason=effect.reason).SerializeToString()
            link.send_new(DELIVERED_ACK, id=effect.job_id, body=body)

    @staticmethod
    def ack_node(link: Link, ack: AckNode) -> None:
        """Sends ReceiptAck: the node may forget its receipt."""
        body = ReceiptAck(fence=ack.fence, earned_nano_usd=ack.earned_nano_usd, reason=ack.reason).SerializeToString()
        link.send_new(RECEIPT_ACK, id=ack.job_id, body=body, fence=ack.fence)
