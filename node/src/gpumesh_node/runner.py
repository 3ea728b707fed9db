"""Runs jobs: takes offers, gives them to engines, sends what comes. One Runner per node; sessions come and go under it.

Items reach it synchronously from the link's reader; each job that has a slot is one task. What it sends goes out at once when a session
is up, and stays in the job's outbox until the caller has passed it on, so that a new session can go on where the old one broke.
"""

import asyncio
from collections.abc import Iterable, Sequence
from time import monotonic  # uvloop's own time() has milliseconds only
from typing import Final

from gpumesh.common.v1.link_pb2 import Item, Window
from gpumesh_node import meters
from gpumesh_node.desk import Desk, Running
from gpumesh_node.domain.deltas import Delta
from gpumesh_node.domain.failures import EngineFailure
from gpumesh_node.domain.job import FLAG_LAST, Job, JobError, JobState, Receipt, spread
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.domain.offers import covers, refusal
from gpumesh_node.domain.outbox import frame_cost
from gpumesh_node.domain.request import EngineRequest
from gpumesh_node.engines.base import Answer, Engine
from gpumesh_node.outlet import Outlet
from gpumesh_node.store import ReceiptStore
from gpumesh_node.wire import frames_of, offer_from_wire, only_frame
from gpumesh_runtime.errors import as_mesh_error
from gpumesh_runtime.link import Link
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.tracing import span

log = get_logger("gpumesh.node.runner")
_DEFAULT_WINDOW: Final = 256 * 1024
# Above this many unacknowledged receipts nobody settles what this node does: it stops working for nothing.
_MAX_RECEIPTS: Final = 100_000
# How long jobs go on without a session (mechanisms.md 2).
ORPHAN_S: Final = 20.0


class Runner:
    """All jobs of this node."""

    def __init__(self, engines: Iterable[Engine], journal: ReceiptStore, *, orphan_s: float = ORPHAN_S) -> None:
        self._outlet = Outlet()
        self.draining = False
        self.jobs: dict[bytes, Running] = {}
        self._journal = journal
        self._engines = list(engines)
        self._desks = {
            model.model_id: Desk(engine, model.model_id) for engine in self._engines for model in engine.models()
        }
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._orphan_s = orphan_s
        self._orphan_timer: asyncio.TimerHandle | None = None
        # The loop itself refers to tasks weakly.
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def link(self) -> Link | None:
        """The session, None while there is none."""
        return self._outlet.link

    # --- what it has ----------------------------------------------------------------------------------------------------------

    def models(self) -> list[ServedModel]:
        """All models with their states."""
        models = [self._shown(model) for engine in self._engines for model in engine.models()]
        for model in models:
            self._desks[model.model_id].meters.ready.set(1 if model.state is ModelState.READY else 0)
        return models

    def _shown(self, model: ServedModel) -> ServedModel:
        """A model as others see it: while the node drains, so does what is ready."""
        if self.draining and model.state is ModelState.READY:
            return model.with_state(ModelState.DRAINING)
        return model

    def running(self) -> list[Job]:
        """Jobs whose end has not been sent."""
        return [running.job for running in self.jobs.values()]

    @property
    def problem(self) -> str:
        """Why the node can take no offers at all, empty when it can."""
        if self._journal.failed:
            return "its journal cannot be written"
        if len(self._journal) >= _MAX_RECEIPTS:
            return "too many of its receipts are without acknowledgement"
        return ""

    async def idle(self) -> None:
        """Returns when no job is left."""
        await self._idle.wait()

    # --- sessions -------------------------------------------------------------------------------------------------------------

    def attach(self, link: Link) -> None:
        """A session is up: goes on with what runs, from what callers have not passed on yet."""
        self._outlet.link = link
        if self._orphan_timer is not None:
            self._orphan_timer.cancel()
            self._orphan_timer = None
        for running in list(self.jobs.values()):
            for item in running.outbox.pending():
                link.send(item)
            if running.final is not None:
                link.send(running.final)
                self._forget(running)

    def detach(self) -> None:
        """The session is gone: jobs go on for orphan_s, then they are given up."""
        self._outlet.link = None
        if self.jobs and self._orphan_timer is None:
            self._orphan_timer = self._loop.call_later(self._orphan_s, self._drop_orphans)

    def _drop_orphans(self) -> None:
        self._orphan_timer = None
        log.warning("gave up jobs without a session", jobs=len(self.jobs), seconds=self._orphan_s)
        self.drop_all()

    def drop_all(self) -> None:
        """Stops everything without telling anybody: whoever asked has no session with us any more."""
        for running in list(self.jobs.values()):
            meters.ORPHANS.value += 1
            self._give_up(running)

    def end_all(self) -> None:
        """The drain is over: gives back what still runs, so that it is tried elsewhere where that is possible."""
        for running in list(self.jobs.values()):
            self._stop(running)
            self._fail(running, EngineFailure(Reason.NODE_DRAINING, "The node has shut down.", retryable=True))

    async def close(self) -> None:
        """Waits for tasks that still give connections back, after cancelling them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def on_overflow(self, job_id: bytes) -> None:
        """The link dropped what was queued for a job and told the other side."""
        running = self.jobs.get(job_id)
        if running is not None:
            self._give_up(running)

    # --- items ----------------------------------------------------------------------------------------------------------------

    def on_offer(self, item: Item) -> None:
        """Accepts or refuses at once. A repeat of a running offer is accepted again; a later try replaces an earlier one."""
        offer = offer_from_wire(item.id, item.fence, item.body)
        held = self.jobs.get(offer.job_id)
        if held is not None:
            if held.job.offer.fence == offer.fence:
                self._outlet.accept(offer, 0)
                return
            if held.job.offer.fence > offer.fence:
                self._outlet.reject(offer, Reason.STALE_FENCE, "A later try of this job runs here.")
                return
            self._give_up(held)
        desk = self._desks.get(offer.model_id)
        model = desk.model if desk is not None else None
        if model is not None:
            model = self._shown(model)
        refused = refusal(offer, model, desk.taken if desk is not None else 0, self.problem)
        if refused is not None or desk is None or model is None:
            self._outlet.reject(offer, *(refused or (Reason.MODEL_UNAVAILABLE, "This node does not serve the model.")))
            return
        running = Running(Job(offer, monotonic()), desk, model, offer.window_bytes or _DEFAULT_WINDOW)
        self.jobs[offer.job_id] = running
        self._idle.clear()
        if offer.deadline_s > 0:
            running.timer = self._loop.call_later(offer.deadline_s, self._expire, running)
        queued = max(0, desk.taken + 1 - model.slots)
        if running.job.state is JobState.WAITING and not queued:
            # Its Accept rides with its first frame, when that comes soon: one message less on both sides of the session.
            self._outlet.accept_soon(running)
            self._start(running)
            return
        self._outlet.accept(offer, queued)
        if running.job.state is JobState.WAITING:
            self._start_or_wait(running)

    def on_payload(self, item: Item) -> None:
        """A piece of a payload."""
        running = self.jobs.get(item.id)
        if running is None or running.job.offer.fence != item.fence or running.job.ended:
            meters.IGNORED.labels("payload", "unknown_job").add()
            return
        try:
            complete = running.job.piece(item.seq, item.body, last=bool(item.flags & FLAG_LAST))
        except JobError as err:
            self._fail(
                running, EngineFailure(Reason.PROTOCOL_ERROR, f"The payload is broken: {err.message}.", retryable=True)
            )
            return
        if complete:
            self._start_or_wait(running)

    def on_window(self, item: Item) -> None:
        """The caller has passed frames on."""
        running = self.jobs.get(item.id)
        if running is None:
            return
        window = Window.FromString(item.body)
        running.outbox.on_window(window.consumed_seq, window.limit_bytes)
        if running.window_event is not None:
            running.window_event.set()

    def on_cancel(self, item: Item) -> None:
        """Stops a job and answers what it had done. A job that is not (or no longer) here is answered with nothing done."""
        running = self.jobs.get(item.id)
        if running is None:
            if not self._journal.holds(item.id):  # else Done is on its way, or a receipt: that is the answer
                self._outlet.nothing_to_cancel(item.id, item.fence)
            return
        job = running.job
        if not covers(item.fence, job.offer.fence):
            meters.IGNORED.labels("cancel", "stale_fence").add()
            return
        if job.ended:
            return
        usage = running.usage
        receipt = job.cancel(usage)
        self._stop(running)
        if receipt is not None:
            self._put(receipt)
        self._outlet.cancel_ack(job, usage)
        running.desk.meters.cancelled.value += 1
        self._forget(running)

    # --- slots ----------------------------------------------------------------------------------------------------------------

    def _give_up(self, running: Running) -> None:
        """Ends a job without telling anybody: the scheduler has given it up, or is not there."""
        if not running.job.ended:
            running.job.fail()
            running.desk.meters.failed.value += 1
        self._stop(running)
        self._forget(running)

    def _start_or_wait(self, running: Running) -> None:
        desk = running.desk
        if desk.running < running.model.slots:
            self._start(running)
        else:
            desk.waiting.append(running)
            desk.meters.waiting.value += 1

    def _start(self, running: Running) -> None:
        running.has_slot = True
        running.desk.running += 1
        running.desk.meters.running.value += 1
        payload = running.job.start()
        task = running.task = self._loop.create_task(self._work(running, payload), name="job")
        self._tasks.add(task)
        # A callback, since a task that is cancelled before its first step runs none of its code.
        task.add_done_callback(lambda done: self._on_task_done(done, running))

    def _on_task_done(self, task: "asyncio.Task[None]", running: Running) -> None:
        self._tasks.discard(task)
        self._leave_slot(running)
        if not task.cancelled() and (err := task.exception()) is not None:
            self._fail_oddly(running, err)

    # --- work -----------------------------------------------------------------------------------------------------------------

    async def _work(self, running: Running, payload: bytes) -> None:
        """One job from engine to Done. Cancelled by _stop, whose caller tells whoever must know."""
        offer = running.job.offer
        with span("chat", offer.traceparent, _attributes(running.model) if offer.traceparent else None) as trace:
            request = EngineRequest(
                payload, offer.model_id, offer.max_output_tokens, offer.streaming, trace.traceparent
            )
            try:
                answer = running.answer = await running.desk.engine.generate(request)
                try:
                    only = None
                    while deltas := await answer.read():
                        frames = [*([only] if only else ()), *frames_of(deltas)]
                        only = None if offer.streaming or running.job.seq else only_frame(frames)
                        if only:
                            continue  # there is seldom another: it goes inside Done
                        counts = spread(running.job.tokens, answer.tokens, [len(body) for body, _ in frames])
                        for (body, part), tokens in zip(frames, counts, strict=True):
                            cost = frame_cost(len(body), len(part))
                            if not running.outbox.has_room(cost):
                                await self._room(running, cost)
                            self._outlet.frame(running, body, part, tokens, cost, monotonic())
                    self._done(running, answer, only)
                except BaseException:
                    answer.abort()
                    raise
            except EngineFailure as failure:
                trace.fail(failure.reason.value)
                self._fail(running, failure)
                return
            if offer.traceparent:
                usage = answer.usage
                trace.set("gen_ai.usage.input_tokens", usage.prompt_tokens)
                trace.set("gen_ai.usage.output_tokens", usage.completion_tokens)
        self._leave_slot(running)
        await answer.release()

    def _fail_oddly(self, running: Running, err: BaseException) -> None:
        """A bug of ours ended one job: the others go on. as_mesh_error logs it with its hash."""
        mesh = as_mesh_error(err)
        self._fail(running, EngineFailure(mesh.reason, mesh.message, retryable=True, metadata=mesh.metadata))

    async def _room(self, running: Running, cost: int) -> None:
        """Waits until the caller has passed enough on. Meanwhile the engine is not read."""
        meters.WINDOW_WAITS.value += 1
        event = running.window_event = asyncio.Event()
        while not running.outbox.has_room(cost):
            event.clear()
            await event.wait()
        running.window_event = None

    def _done(self, running: Running, answer: Answer, only: tuple[bytes, Sequence[Delta]] | None) -> None:
        job, model_meters = running.job, running.desk.meters
        usage, now = answer.usage, monotonic()
        frame, deltas = only or (b"", ())
        flags = self._outlet.only_frame(running, deltas, answer.tokens, now) if only else 0
        self._put(job.done(usage))
        total_s = now - job.offered_at
        if self._outlet.done(running, usage, answer.seed, total_s, frame=frame, flags=flags):
            self._forget(running)
        model_meters.completed.value += 1
        model_meters.tokens.value += usage.completion_tokens
        model_meters.prompt_tokens.value += usage.prompt_tokens
        model_meters.duration.observe(total_s)

    def _fail(self, running: Running, failure: EngineFailure) -> None:
        """Ends a job in failure and tells the scheduler. After content it is not retryable: another try would repeat what was read."""
        job = running.job
        if job.ended:
            return
        retryable = failure.retryable and not job.content_sent
        job.fail()
        meters.FAILURES.labels(running.desk.engine.name, failure.reason.value).add()
        running.desk.meters.failed.value += 1
        if self._outlet.error(running, failure, retryable=retryable):
            self._forget(running)

    def _expire(self, running: Running) -> None:
        """The deadline has passed."""
        if not running.job.ended:
            failure = EngineFailure(
                Reason.DEADLINE_EXCEEDED, "The answer took longer than the time it was given.", retryable=False
            )
            self._stop(running)
            self._fail(running, failure)

    def _put(self, receipt: Receipt) -> None:
        """Writes a receipt down. A full disk does not hold the answer back: Done carries the same receipt once."""
        if not self._journal.put(receipt):
            meters.JOURNAL_FAILURES.value += 1
            log.error("a receipt could not be written to the journal", id=receipt.job_id.hex())

    def _stop(self, running: Running) -> None:
        """Stops the engine's work for a job; sends nothing."""
        desk = running.desk
        if running in desk.waiting:
            desk.waiting.remove(running)
            desk.meters.waiting.value -= 1
        if running.answer is not None:
            running.answer.abort()
        if running.task is not None:
            running.task.cancel()

    def _leave_slot(self, running: Running) -> None:
        """Gives the slot, if it still has one, to whoever waits longest."""
        if not running.has_slot:
            return
        running.has_slot = False
        desk = running.desk
        desk.running -= 1
        desk.meters.running.value -= 1
        while desk.waiting and desk.running < running.model.slots:
            desk.meters.waiting.value -= 1
            self._start(desk.waiting.popleft())

    def _forget(self, running: Running) -> None:
        if running.timer is not None:
            running.timer.cancel()
        held = self.jobs.get(running.job.offer.job_id)
        if held is running:
            del self.jobs[running.job.offer.job_id]
        if not self.jobs:
            self._idle.set()


def _attributes(model: ServedModel) -> dict[str, str]:
    """OpenTelemetry's names for generative AI."""
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": model.model_id,
        "gen_ai.provider.name": model.engine_name or "unknown",
    }
