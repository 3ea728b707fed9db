"""What the node says about its jobs: items of the session, while there is one."""

import asyncio
from collections.abc import Sequence
from typing import Final

from gpumesh.common.v1.link_pb2 import Failure, Item, ItemKind
from gpumesh.node.v1 import session_pb2
from gpumesh_node import meters
from gpumesh_node.desk import Running
from gpumesh_node.domain.deltas import Delta, Usage
from gpumesh_node.domain.failures import EngineFailure
from gpumesh_node.domain.job import FLAG_LAST, FrameHeader, Job, Offer
from gpumesh_node.wire import build_to_wire, usage_to_wire
from gpumesh_runtime.link import Link, LinkDown
from gpumesh_runtime.reasons import Reason

# How long an Accept may wait for the job's first item. A hundredth of the scheduler's accept timer would do; engines with a short
# prompt answer within this.
ACCEPT_WITHIN_S: Final = 0.01


class Outlet:
    """Sends for the runner. link: the session, None while there is none."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self._loop = asyncio.get_running_loop()
        self._unaccepted: dict[bytes, Running] = {}
        self._accept_timer: asyncio.TimerHandle | None = None

    def send(self, item: Item) -> bool:
        """Sends an item; False when there is no session to take it."""
        link = self.link
        if link is None:
            return False
        try:
            link.send(item)
        except LinkDown:
            return False
        return True

    def reject(self, offer: Offer, reason: Reason, message: str) -> None:
        """The offer is refused."""
        meters.REJECTS.labels(reason.value).add()
        body = session_pb2.Reject(reason=reason.value, message=message).SerializeToString()
        self.send(Item(kind=ItemKind.ITEM_KIND_REJECT, id=offer.job_id, fence=offer.fence, body=body))

    def accept(self, offer: Offer, queued: int) -> None:
        """The offer is taken. queued: jobs ahead of it here."""
        body = session_pb2.Accept(queued=queued).SerializeToString() if queued else b""
        self.send(Item(kind=ItemKind.ITEM_KIND_ACCEPT, id=offer.job_id, fence=offer.fence, body=body))

    def accept_soon(self, running: Running) -> None:
        """As accept, for a job that starts at once: after ACCEPT_WITHIN_S with all others, unless its first item says it before."""
        self._unaccepted[running.job.offer.job_id] = running
        if self._accept_timer is None:
            self._accept_timer = self._loop.call_later(ACCEPT_WITHIN_S, self._accept_all)

    def _accept_all(self) -> None:
        self._accept_timer = None
        waiting, self._unaccepted = self._unaccepted, {}
        for running in waiting.values():
            if not running.job.ended:  # given up meanwhile: nobody waits for it
                self.accept(running.job.offer, 0)

    def cancel_ack(self, job: Job, usage: Usage) -> None:
        """The job is stopped; what had been done."""
        self._unaccepted.pop(job.offer.job_id, None)  # the answer says it all
        body = session_pb2.CancelAck(usage=usage_to_wire(usage), receipt_token=job.offer.receipt_token)
        self.send(_item(ItemKind.ITEM_KIND_CANCEL_ACK, job, 0, body.SerializeToString()))

    def nothing_to_cancel(self, job_id: bytes, fence: int) -> None:
        """The job is not here: nothing was done."""
        self.send(Item(kind=ItemKind.ITEM_KIND_CANCEL_ACK, id=job_id, fence=fence))

    def frame(self, running: Running, body: bytes, deltas: Sequence[Delta], tokens: int, cost: int, now: float) -> None:
        """Part of the answer; it stays in the job's outbox until the caller has passed it on."""
        header = self._count(running, deltas, tokens, now)
        item = _item(ItemKind.ITEM_KIND_FRAME, running.job, header.flags, body)
        running.outbox.sent(header.seq, cost, item)
        self.send(item)

    def only_frame(self, running: Running, deltas: Sequence[Delta], tokens: int, now: float) -> int:
        """Counts the frame that will go inside Done; the flags that Done then has for it."""
        return self._count(running, deltas, tokens, now).flags

    def _count(self, running: Running, deltas: Sequence[Delta], tokens: int, now: float) -> FrameHeader:
        job = running.job
        header = job.frame(tokens, now, content=any(delta.has_content for delta in deltas))
        if header.seq == 1:
            self._unaccepted.pop(job.offer.job_id, None)  # an answer is as good as an acceptance
            running.desk.meters.first_output.observe(now - job.offered_at)
        meters.FRAMES.value += 1
        return header

    def done(
        self, running: Running, usage: Usage, seed: int | None, total_s: float, *, frame: bytes = b"", flags: int = 0
    ) -> bool:
        """The answer is complete. False: it stays with the job until the next session. frame, flags: of an only frame that goes inside."""
        job = running.job
        first_s = max(0.0, job.first_output_at - job.offered_at)
        done = session_pb2.Done(
            usage=usage_to_wire(usage),
            receipt_token=job.offer.receipt_token,
            build=build_to_wire(running.model),
            timing=session_pb2.EngineTiming(first_output_us=int(first_s * 1e6), total_us=int(total_s * 1e6)),
            seed=seed,
            frame=frame,
        )
        return self._final(running, ItemKind.ITEM_KIND_DONE, done.SerializeToString(), flags)

    def error(self, running: Running, failure: EngineFailure, *, retryable: bool) -> bool:
        """The job has failed. False: it stays with the job until the next session."""
        body = Failure(
            reason=failure.reason.value, message=failure.message, metadata=failure.metadata, retryable=retryable
        )
        return self._final(running, ItemKind.ITEM_KIND_ERROR, body.SerializeToString())

    def _final(self, running: Running, kind: "ItemKind.ValueType", body: bytes, flags: int = 0) -> bool:
        self._unaccepted.pop(running.job.offer.job_id, None)
        running.final = _item(kind, running.job, FLAG_LAST | flags, body)
        return self.send(running.final)


def _item(kind: "ItemKind.ValueType", job: Job, flags: int, body: bytes) -> Item:
    offer = job.offer
    return Item(kind=kind, id=offer.job_id, fence=offer.fence, seq=job.seq, tokens=job.tokens, flags=flags, body=body)
