"""DispatchService: the links of callers. One Caller object per link; it turns their items into events of the cores."""

from typing import Final

from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Cancel, Goodbye, Item, ItemKind, Window
from gpumesh.scheduler.v1.dispatch_service_pb2 import Delivered as DeliveredMessage
from gpumesh.scheduler.v1.dispatch_service_pb2 import Submit
from gpumesh_runtime.error_types import MeshError, PayloadTooLarge, ResourceExhausted
from gpumesh_runtime.link import FLAG_LAST, Link, LinkEnd, LinkProtocolError
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler import metrics
from gpumesh_scheduler.desk import PAYLOAD, Desk
from gpumesh_scheduler.domain.nouns import Party
from gpumesh_scheduler.domain.reconcile import AckCaller
from gpumesh_scheduler.domain.tickets import check_ticket
from gpumesh_scheduler.wire import MOST_PIECE_BYTES, delivered_from_wire, reason_from_wire, terms_from_wire

log = get_logger("gpumesh.scheduler.callers")

_SUBMIT: Final = int(ItemKind.ITEM_KIND_SUBMIT)
_WINDOW: Final = int(ItemKind.ITEM_KIND_WINDOW)
_CANCEL: Final = int(ItemKind.ITEM_KIND_CANCEL)
_DELIVERED: Final = int(ItemKind.ITEM_KIND_DELIVERED)


class Caller:
    """Receiver of one caller's link. A job belongs to the link that submitted it; other links cannot touch it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._jobs = desk.board.jobs
        self._id = 0

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """The caller may submit from here on."""
        del hello_or_welcome
        self._id = self._desk.new_caller(link)
        log.info("caller connected", peer=link.peer.uri)

    def on_item(self, link: Link, item: Item) -> None:
        """One item."""
        kind: int = item.kind
        if kind == _SUBMIT:
            self._submit(link, item)
        elif kind == _DELIVERED:
            self._delivered(link, item)
        elif kind == _WINDOW:
            self._window(item)
        elif kind == PAYLOAD:
            self._payload(item)
        elif kind == _CANCEL:
            self._cancel(item)
        else:
            raise LinkProtocolError("a caller does not send this")

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The caller stops: what runs goes on until its link closes."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Its jobs have no reader any more."""
        log.info("caller gone", peer=link.peer.uri, end=end.value)
        self._desk.caller_gone(self._id)

    def on_overflow(self, link: Link, id_: bytes) -> None:
        """Frames of a job piled up; the caller has been told."""
        job = self._jobs.get(id_)
        if job is not None and job.caller == self._id:
            error = ResourceExhausted(Reason.SEND_QUEUE_FULL, "The answer piled up faster than it could be sent.")
            self._desk.apply(self._desk.board.fail(job, error, self._desk.time(), tell=False))

    # ---- items ---------------------------------------------------------------------------------------------------------------

    def _submit(self, link: Link, item: Item) -> None:
        desk = self._desk
        job_id, fence = item.id, item.fence
        try:
            submit = Submit.FromString(item.body)
            ticket = desk.seals.open_ticket(submit.ticket)
            wall_ns = desk.wall_ns()
            check_ticket(ticket, job_id, fence >> 16, desk.scheduler_id, desk.boot_id, wall_ns)
            desk.replay.use(job_id, ticket.attempt, ticket.submit_by_ns, wall_ns)
            now = desk.time()
            terms = terms_from_wire(job_id, submit, ticket, desk.limits, now)
            payload = desk.board.admit(terms, submit.payload, submit.payload_bytes)
        except MeshError as error:
            metrics.REFUSED.labels(error.reason.value).value += 1
            link.fail(job_id, error, fence=fence)
            return
        desk.apply(desk.board.submit(terms, payload, self._id, now))

    def _payload(self, item: Item) -> None:
        desk = self._desk
        job = self._jobs.get(item.id)
        if job is None or job.caller != self._id or item.fence >> 16 != job.terms.attempt:
            return  # refused or ended meanwhile: the caller will hear or has heard of it
        piece, last = item.body, item.flags & FLAG_LAST != 0
        try:
            if len(piece) > MOST_PIECE_BYTES:
                raise PayloadTooLarge(Reason.PAYLOAD_TOO_LARGE, "A piece of the request is too large.")
            job.payload.add(item.seq, piece, last)
        except MeshError as error:
            desk.apply(desk.board.fail(job, error, desk.time()))
            return
        if job.current is not None:
            link = desk.nodes[job.current.session.id]
            link.send_new(PAYLOAD, id=job.id, body=piece, fence=job.fence, seq=item.seq, flags=FLAG_LAST if last else 0)

    def _window(self, item: Item) -> None:
        desk = self._desk
        job = self._jobs.get(item.id)
        if job is None or job.caller != self._id:
            return
        window = Window.FromString(item.body)
        if job.window(item.fence, window.consumed_bytes, window.limit_bytes, desk.time()) and job.current is not None:
            desk.nodes[job.current.session.id].send(item)

    def _cancel(self, item: Item) -> None:
        desk = self._desk
        job = self._jobs.get(item.id)
        if job is None or job.caller != self._id:
            return
        cancel = Cancel.FromString(item.body)
        reason = reason_from_wire(cancel.reason, Reason.CANCELLED)
        desk.apply(desk.board.cancel(job.id, item.fence, reason, cancel.delivered_tokens, desk.time()))

    def _delivered(self, link: Link, item: Item) -> None:
        desk = self._desk
        job_id = item.id
        now = desk.time()
        try:
            message = DeliveredMessage.FromString(item.body)
            record = delivered_from_wire(message)
        except (DecodeError, MeshError):
            # It will never be better: the caller must not present it for ever.
            desk.settle([AckCaller(self._id, job_id, 0, Reason.PROTOCOL_ERROR.value)])
            return
        job = self._jobs.get(job_id)
        if job is not None and job.caller == self._id:
            # The caller is through with a job that still runs here.
            desk.apply(desk.board.cancel(job_id, 0, Reason.CANCELLED, record.usage.completion_tokens, now))
        case = desk.reconciler.cases.get(job_id)
        known = case is not None and case.relayed is not None
        # Where our own books say who served there is no need to check seals.
        parties = [] if known else self._parties(job_id, message)
        desk.settle(desk.reconciler.delivered(job_id, self._id, record, parties, now))

    def _parties(self, job_id: bytes, message: DeliveredMessage) -> list[tuple[int, Party]]:
        claims = (self._desk.seals.open_receipt(token) for token in message.receipt_tokens)
        return [(claim.fence, claim.party) for claim in claims if claim is not None and claim.job_id == job_id]
