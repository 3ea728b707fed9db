"""One running job at the rim: what its machine decides is done here, over links and towards its sink."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from gpumesh.common.v1.job_pb2 import JobOutcome, Segment, Usage
from gpumesh.common.v1.link_pb2 import Item, ItemFlag, ItemKind, Window
from gpumesh.node.v1.session_pb2 import Done, Frame, Reject
from gpumesh.router.v1.admission_service_pb2 import AdmitRequest
from gpumesh.scheduler.v1.dispatch_service_pb2 import Delivered, Submit
from gpumesh_dispatch.admit import Admitter
from gpumesh_dispatch.deliveries import Deliveries
from gpumesh_dispatch.job import Fail, Job, Retry, Verdict
from gpumesh_dispatch.money import charge_nano_usd, within_bounds
from gpumesh_dispatch.request import Admitted, Completed, JobRequest, Sink
from gpumesh_dispatch.schedulers import SchedulerConnection, Schedulers
from gpumesh_dispatch.submit import send_submit
from gpumesh_runtime.errors import Conflict, DeadlineExceeded, MeshError, Reason, ResourceExhausted, Unavailable
from gpumesh_runtime.link import Link, LinkDown
from gpumesh_runtime.metrics import counter

# Half of the 256 KiB that a slow reader may hold beyond the kernel's buffers; the transport's own buffer has the rest.
DEFAULT_WINDOW_BYTES: Final = 128 * 1024
_FRAME_OVERHEAD: Final = 256
# Looking a name up in a protobuf enum costs 0.5 us.
_WINDOW: Final = ItemKind.ITEM_KIND_WINDOW
_COMPLETED: Final = JobOutcome.JOB_OUTCOME_COMPLETED
_CANCELLED: Final = JobOutcome.JOB_OUTCOME_CANCELLED
_FAILED: Final = JobOutcome.JOB_OUTCOME_FAILED
_CONTENT: Final = int(ItemFlag.ITEM_FLAG_CONTENT)
# How long an admitted job waits for the link to its scheduler before it asks for another.
_LINK_WAIT_S: Final = 0.5
# A frame may overrun the window by what was under way when it was granted; four times it is no accident.
_WINDOW_SLACK: Final = 4
_ATTEMPTS: Final = counter("gpumesh_dispatch_attempts_total", "Submits sent").labels()
_RETRIES: Final = counter("gpumesh_dispatch_retries_total", "Jobs placed again before content, by reason", ("reason",))
_STALE: Final = counter("gpumesh_dispatch_dropped_frames_total", "Frames dropped: duplicates and stale fences").labels()


class Home(Protocol):
    """What a running job needs of its dispatcher."""

    admitter: Admitter
    schedulers: Schedulers
    deliveries: Deliveries
    window_bytes: int
    time: Callable[[], float]

    def forget(self, job_id: bytes) -> None:
        """The job is over."""


class Running:
    """A job that runs. Its owner may cancel() it and says consumed() as its client reads; the rest is called by the dispatcher.

    admission: of the current attempt, None before the first. link: where it was submitted. job: the pure machine.
    """

    __slots__ = (
        "_connection",
        "_due",
        "_granted",
        "_held",
        "_home",
        "_received",
        "_submitted",
        "_timer",
        "admission",
        "deadline",
        "job",
        "link",
        "request",
        "sink",
    )

    def __init__(self, home: Home, request: JobRequest, sink: Sink) -> None:
        now = home.time()
        self._home = home
        self.request = request
        self.sink = sink
        self.job = Job(now)
        self.deadline = now + request.deadline_s
        self.admission: Admitted | None = None
        self.link: Link | None = None
        self._connection: SchedulerConnection | None = None
        self._held: list[bytes] = []
        self._received = 0
        self._granted = 0
        self._due = 0
        self._submitted = False
        self._timer: asyncio.TimerHandle | None = None

    # --- placing --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Asks for admission."""
        self._timer = None
        self.link = None
        request, job = self.request, self.job
        attempt = job.next_attempt()
        local = self._home.admitter.admit_here(request, attempt)
        if local is not None:
            self._on_answer(local)
            return
        wire = AdmitRequest(
            job_id=request.job_id,
            key_id=request.key_id,
            key_sha256=request.key_sha256,
            model=request.model,
            modality=request.modality,
            features=request.features,
            input_tokens_estimate=request.input_tokens,
            max_output_tokens=request.max_output_tokens,
            choices=request.choices,
            attempt=attempt,
            deadline_ms=self._left_ms(),
            excluded_scheduler_ids=job.excluded,
            service_class=request.service_class,
        )
        self._home.admitter.admit(wire, self._on_answer)

    def _left_ms(self) -> int:
        return max(1, int((self.deadline - self._home.time()) * 1000))

    def _on_answer(self, answer: Admitted | MeshError) -> None:
        job = self.job
        if isinstance(answer, MeshError):
            if not job.ended:
                self._act(job.refused(answer, self._home.time()), answer)
            return
        if job.ended:
            self._home.admitter.release(self.request.job_id, 0)
            return
        self.admission = answer
        fail = job.admitted(answer.scheduler_id)
        if fail is not None:
            self._act(fail, fail.error)
            return
        self.sink.on_admitted(answer)
        if job.ended:  # the sink cancelled
            return
        connection = self._home.schedulers.at(answer.scheduler_address)
        self._connection = connection
        if connection.link is not None:
            self._submit(connection.link)
            return
        connection.waiting[self.request.job_id] = self._submit
        self._timer = asyncio.get_running_loop().call_later(_LINK_WAIT_S, self._no_link)

    def _no_link(self) -> None:
        self._stop_waiting()
        decision = self.job.cannot_submit(self._home.time())
        self._act(decision, Unavailable(Reason.SCHEDULER_UNAVAILABLE))

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._connection is not None:
            self._connection.waiting.pop(self.request.job_id, None)

    def _submit(self, link: Link | None) -> None:
        admission = self.admission
        if link is None or admission is None:
            return
        self._stop_waiting()
        request = self.request
        fence = self.job.submitted(self._home.time())
        self.link = link
        self._submitted = True
        self._reset_window()
        submit = Submit(
            ticket=admission.ticket,
            streaming=request.streaming,
            deadline_ms=self._left_ms(),
            traceparent=request.traceparent,
            window_bytes=self._home.window_bytes,
            tries_used=self.job.tries_before,
        )
        _ATTEMPTS.value += 1
        try:
            send_submit(link, request.job_id, fence, submit, request.payload)
        except LinkDown:
            self.on_link_lost()

    # --- the answer -----------------------------------------------------------------------------------------------------

    def on_frame(self, item: Item) -> None:
        """A frame from the scheduler."""
        self._frame(item, item.body)

    def _frame(self, item: Item, body: bytes) -> None:
        """item: has the frame's header."""
        seq = item.seq
        verdict = self.job.frame(item.fence, seq, item.tokens, item.flags & _CONTENT != 0)
        if verdict is Verdict.DROP:
            _STALE.value += 1
            return
        if verdict is Verdict.GAP:
            self._broken(Conflict(Reason.MISSING_FRAMES, "Parts of the answer were lost. You are not charged."))
            return
        if seq == 1:
            self._held.clear()
            self._reset_window()
        self._received += len(body) + _FRAME_OVERHEAD
        if self._received - self._granted > _WINDOW_SLACK * self._home.window_bytes + len(body):
            self._broken(
                ResourceExhausted(
                    Reason.WINDOW_EXCEEDED, "The answer came faster than it was asked for. You are not charged."
                )
            )
            return
        if verdict is Verdict.HOLD:
            self._held.append(body)
            return
        if self._held:
            self._flush()
        self._deliver(body)

    def _reset_window(self) -> None:
        self._received = self._granted = self._due = 0

    def _flush(self) -> None:
        held, self._held = self._held, []
        for body in held:
            self._deliver(body)

    def _deliver(self, body: bytes) -> None:
        if self.job.ended:  # the sink cancelled while held frames were handed on
            return
        try:
            frame = Frame.FromString(body)
        except DecodeError:
            self._broken(Unavailable(Reason.ENGINE_ERROR, "The node's answer could not be read. You are not charged."))
            return
        # As the node counts (its outbox): each delta becomes an event of its own. Counted by frame, a window of frames with many
        # deltas would never be a quarter consumed, and the answer would stand still.
        self._due += len(body) + _FRAME_OVERHEAD * (len(frame.deltas) or 1)
        self.sink.on_frame(frame, len(body))

    def consumed(self) -> None:
        """All frames so far have left for the client. Cheap; grants the node a further window when a quarter of one is free."""
        job = self.job
        if self._due * 4 < self._home.window_bytes or job.ended or self.link is None:
            return
        self._due = 0
        received = self._granted = self._received
        window = Window(consumed_seq=job.seq, consumed_bytes=received, limit_bytes=self._home.window_bytes)
        try:
            self.link.send(
                Item(
                    kind=_WINDOW,
                    id=self.request.job_id,
                    fence=job.fence,
                    body=window.SerializeToString(),
                )
            )
        except LinkDown:
            return  # on_down follows and decides

    def on_done(self, item: Item) -> None:
        """The answer is complete, says the node."""
        job = self.job
        if job.is_stale(item.fence):
            _STALE.value += 1
            return
        try:
            done = Done.FromString(item.body)
        except DecodeError:
            self._broken(Unavailable(Reason.ENGINE_ERROR, "The node's answer could not be read. You are not charged."))
            return
        if done.frame:
            self._frame(item, done.frame)
            if job.ended:
                return
        fail = job.done(item.fence, item.seq, item.tokens)
        if fail is not None:
            self._finish_failed(fail.error)
            return
        self._flush()
        if job.ended:
            return
        job.end()
        admission = self.admission
        cap = admission.max_output_tokens if admission is not None else 0
        usage = within_bounds(done.usage, job.tokens, cap, self.request.input_tokens_bound)
        job.tokens = usage.completion_tokens
        charge = charge_nano_usd(admission.price, usage, admission.hold_nano_usd) if admission is not None else 0
        seed = done.seed if done.HasField("seed") else None
        try:  # the client first, the books after it
            self.sink.on_done(Completed(usage, charge, done.build, item.fence, seed))
        finally:
            self._close(_COMPLETED, usage, charge, "", done.receipt_token)

    # --- failures -------------------------------------------------------------------------------------------------------

    def on_reject(self, item: Item) -> None:
        """The scheduler refuses the Submit."""
        reject = Reject.FromString(item.body)
        try:
            reason = Reason(reject.reason)
        except ValueError:
            reason = Reason.UNAVAILABLE
        self.on_failure(item.fence, item.seq, MeshError.of(reason, reject.message, retryable=True))

    def on_failure(self, fence: int, seq: int, error: MeshError) -> None:
        """The scheduler says that it failed."""
        del seq
        if self.job.is_stale(fence):
            _STALE.value += 1
            return
        self._act(self.job.failed(fence, error, self._home.time()), error)

    def on_link_lost(self) -> None:
        """The link to its scheduler is gone."""
        self.link = None
        if not self.job.ended:
            self._act(self.job.scheduler_lost(self._home.time()), Unavailable(Reason.LINK_DOWN))

    def _act(self, decision: Retry | Fail, why: MeshError) -> None:
        if isinstance(decision, Fail):
            self._finish_failed(decision.error)
            return
        _RETRIES.labels(why.reason.value).value += 1
        self.link = None
        self._held.clear()
        # Never in this turn: an admitter that answers at once would recurse.
        self._timer = asyncio.get_running_loop().call_later(decision.after_s, self.start)

    def _broken(self, error: MeshError) -> None:
        """This side gives up on the try: tell the scheduler, then the client."""
        self._send_cancel(error.reason.value)
        self.job.end()
        self._finish_failed(error)

    def fail(self, error: MeshError) -> None:
        """Ends it from our side."""
        if not self.job.ended:
            self._broken(error)

    def out_of_time(self) -> None:
        """The deadline passed."""
        seconds = int(self.request.deadline_s)
        self.fail(
            DeadlineExceeded(
                Reason.DEADLINE_EXCEEDED, f"The answer was not complete within {seconds} s. You are not charged."
            )
        )

    def cancel(self, reason: Reason = Reason.CLIENT_GONE) -> None:
        """The client is gone: the node stops, what it received is charged. No callback follows. Repetition is harmless."""
        job = self.job
        if job.ended:
            return
        job.end()
        self._send_cancel(reason.value)
        usage = Usage(prompt_tokens=self.request.input_tokens, completion_tokens=job.tokens if job.committed else 0)
        admission = self.admission
        charge = 0
        if admission is not None and self._submitted:
            charge = charge_nano_usd(admission.price, usage, admission.hold_nano_usd)
        self._close(_CANCELLED, usage, charge, reason.value, b"")

    def _send_cancel(self, reason: str) -> None:
        if self.link is not None:
            self.link.cancel(self.request.job_id, reason, 0, self.job.tokens if self.job.committed else 0)

    def _finish_failed(self, error: MeshError) -> None:
        usage = Usage(completion_tokens=self.job.tokens if self.job.committed else 0)
        try:
            self.sink.on_error(error)
        finally:
            self._close(_FAILED, usage, 0, error.reason.value, b"")

    # --- the end --------------------------------------------------------------------------------------------------------

    def _close(
        self, outcome: "JobOutcome.ValueType", usage: Usage, charge: int, reason: str, receipt_token: bytes
    ) -> None:
        """Forgets the job here; gives back its hold and keeps its delivered record until that is acknowledged."""
        job, admission, job_id = self.job, self.admission, self.request.job_id
        self._stop_waiting()
        self._held.clear()
        self._home.forget(job_id)
        if admission is None:
            return
        self._home.admitter.release(job_id, charge)
        if not self._submitted:
            return
        delivered = Delivered(ticket=admission.ticket, outcome=outcome, usage=usage, reason=reason)
        if job.committed or receipt_token:
            delivered.segments.append(Segment(fence=job.fence, start_token=0, end_token=usage.completion_tokens))
            if receipt_token:
                delivered.receipt_tokens.append(receipt_token)
        self._home.deliveries.add(job_id, delivered.SerializeToString(), self.link, self._home.time())
