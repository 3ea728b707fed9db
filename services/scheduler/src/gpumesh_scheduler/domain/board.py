"""The scheduler's books: jobs, their queue, and who runs them. Pure: methods take an event and the time, and return effects.

Invariants (tested with random event orders): a slot is held by exactly the tries in its session's `tries`; a job has one JobEnded;
fences of a job only grow. The order of work inside a method is always the same: the event's own job first, then the freed slots.
"""

from collections.abc import Callable
from itertools import islice
from math import inf
from typing import Final

from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.effects import (
    Effects,
    JobEnded,
    SendCancel,
    SendOffer,
    TellCaller,
    TryLost,
)
from gpumesh_scheduler.domain.job import Job, JobState, Lapse, Verdict
from gpumesh_scheduler.domain.nouns import Limits, ModelKey, NodeBreachError, Outcome, Terms, fence_of
from gpumesh_scheduler.domain.payload import Payload, PayloadBudget
from gpumesh_scheduler.domain.pools import Pools
from gpumesh_scheduler.domain.queue import FifoQueue, Queue
from gpumesh_scheduler.domain.session import Session, Try
from gpumesh_scheduler.domain.timers import Wheel

# Jobs looked at behind one that no free seat suits (another feature, an excluded node): bounds the work of one freed slot.
_LOOK_BEHIND: Final = 32
_LAPSE_REASON: Final = {
    Lapse.ACCEPT: Reason.ACCEPT_TIMEOUT,
    Lapse.FIRST_TOKEN: Reason.FIRST_TOKEN_TIMEOUT,
    Lapse.STALL: Reason.NODE_STALLED,
    Lapse.DEADLINE: Reason.DEADLINE_EXCEEDED,
}


class Board:
    """Jobs and tries. Sessions come and go through roster.Roster, which shares `pools` and calls `session_lost` and `fill`."""

    def __init__(
        self, limits: Limits, random: Callable[[], float], *, tick_s: float = 0.05, queue: Queue | None = None
    ) -> None:
        self.limits = limits
        self.jobs: dict[bytes, Job] = {}
        self.pools = Pools(random)
        self.queue: Queue = queue or FifoQueue()
        self.wheel = Wheel(tick_s)
        self.budget = PayloadBudget(limits.max_payload_total_bytes)
        self.draining = False

    # ---- from callers ------------------------------------------------------------------------------------------------------

    def admit(self, terms: Terms, inline: bytes, payload_bytes: int) -> Payload:
        """Checks whether a job may come in and reserves its payload. Raises MeshError; nothing is kept then."""
        if self.draining:
            raise MeshError.of(Reason.DRAINING, "The scheduler is shutting down.", retryable=True)
        known = self.jobs.get(terms.job_id)
        if known is not None and terms.attempt <= known.terms.attempt:
            raise MeshError.of(Reason.CONFLICT, "The job is here with this attempt or a later one.")
        if self.queue.length(terms.model) >= self.limits.max_queued_per_model:
            raise MeshError.of(
                Reason.QUEUE_FULL, "Too many requests wait for this model.", retry_after_s=self.limits.retry_after_s
            )
        return Payload(inline, payload_bytes, self.limits.max_payload_bytes, self.budget)

    def submit(self, terms: Terms, payload: Payload, caller: int, now: float) -> Effects:
        """A job that admit() let in. A later attempt replaces an earlier one that is still here."""
        out: Effects = []
        known = self.jobs.get(terms.job_id)
        if known is not None:
            self._stop(known, Reason.CANCELLED, out)
            self._end(known, out, Outcome.CANCELLED, Reason.CANCELLED, replaced=True)
        job = Job(terms, caller, payload, now, self.limits)
        self.jobs[terms.job_id] = job
        if job.tries_left <= 0:
            self._fail(job, Reason.TRIES_EXHAUSTED, "Every try that was allowed failed.", out)
        elif self.queue.length(terms.model) or not self._offer(job, now, out):
            self.queue.push(job)
            self.pools.changed.add(terms.model)
            if self.queue.length(terms.model) > 1:
                self._fill(terms.model, now, out)
            self._arm(job, now)
        return out

    def cancel(self, job_id: bytes, fence: int, reason: Reason, delivered_tokens: int, now: float) -> Effects:
        """The caller gives the job up (its client is gone, its deadline passed). A cancel of an earlier attempt changes nothing."""
        job = self.jobs.get(job_id)
        if job is None or (fence and fence >> 16 < job.terms.attempt):
            return []
        out: Effects = []
        key = job.terms.model
        self._stop(job, reason, out, delivered_tokens)
        self._end(job, out, Outcome.CANCELLED, reason)
        self._fill(key, now, out)
        return out

    def caller_lost(self, caller: int, now: float) -> Effects:
        """The link of a caller broke: nobody reads its answers."""
        out: Effects = []
        for job in [job for job in self.jobs.values() if job.caller == caller]:
            self._stop(job, Reason.CLIENT_GONE, out, job.tokens)
            self._end(job, out, Outcome.FAILED, Reason.CLIENT_GONE)
        self.fill_all(now, out)
        return out

    def fail(self, job: Job, error: MeshError, now: float, *, tell: bool = True) -> Effects:
        """A job that cannot go on for a reason of its own: a broken payload, a full send queue. tell: the caller does not know yet."""
        out: Effects = []
        if job.state is not JobState.ENDED:
            key = job.terms.model
            self._stop(job, error.reason, out, job.tokens)
            if tell:
                self._fail_with(job, error, out)
            else:
                self._end(job, out, Outcome.FAILED, error.reason)
            self._fill(key, now, out)
        return out

    # ---- from nodes --------------------------------------------------------------------------------------------------------

    def accept(self, session: Session, job_id: bytes, fence: int, now: float) -> None:
        """Raises NodeBreachError for a job of another node."""
        job = self.jobs.get(job_id)
        if job is not None and job.owner(session, fence) is Verdict.RELAY and job.state is JobState.OFFERED:
            job.accepted(now)  # its next timers are later than the accept timer, at which the wheel looks at it anyway
        elif (attempt := session.tries.get((job_id, fence))) is not None:
            attempt.accepted = (
                True  # accepted while our cancel was under way: its slot is taken and its prompt may be prefilled
            )

    def reject(self, session: Session, job_id: bytes, fence: int, reason: Reason, now: float) -> Effects:
        """The node does not take the offer. Raises NodeBreachError for a job of another node, or when it has already answered."""
        out: Effects = []
        job = self.jobs.get(job_id)
        if job is not None and job.owner(session, fence) is Verdict.RELAY:
            if job.frames:
                raise NodeBreachError("rejected after its first frame")
            self._give_back(session, job_id, fence)
            self._again(job, reason, now, out)
            self._fill(job.terms.model, now, out)
        else:
            self.released(session, job_id, fence, now, out)
        return out

    def done(
        self, session: Session, job_id: bytes, fence: int, seq: int, tokens: int, now: float
    ) -> tuple[Verdict, Job | None, Effects]:
        """The answer is complete: (RELAY, its job, effects), or why not. Relay before applying the effects. Raises NodeBreachError."""
        out: Effects = []
        job = self.jobs.get(job_id)
        verdict = Verdict.LATE if job is None else job.ends(session, fence, seq)
        if job is None or verdict is not Verdict.RELAY:
            self.released(session, job_id, fence, now, out)
            return verdict, None, out
        job.tokens = max(job.tokens, tokens)
        self._give_back(session, job_id, fence)
        self._end(job, out, Outcome.COMPLETED, None, done=True)
        self._fill(job.terms.model, now, out)
        return verdict, job, out

    def error(
        self, session: Session, job_id: bytes, fence: int, seq: int, reason: Reason, retryable: bool, now: float
    ) -> tuple[Verdict, Job | None, Effects]:
        """The node's answer ends in failure. RELAY: the node's own Error goes to the caller. Raises NodeBreachError."""
        out: Effects = []
        job = self.jobs.get(job_id)
        verdict = Verdict.LATE if job is None else job.ends(session, fence, seq)
        if job is None or verdict is not Verdict.RELAY:
            self.released(session, job_id, fence, now, out)
            return verdict, None, out
        key = job.terms.model
        self._give_back(session, job_id, fence)
        if retryable and not job.committed:
            self._again(job, reason, now, out)
            verdict = Verdict.LATE
        else:
            self._end(job, out, Outcome.FAILED, reason)
        self._fill(key, now, out)
        return verdict, job, out

    def cancel_ack(self, session: Session, job_id: bytes, fence: int, now: float) -> tuple[Try | None, Effects]:
        """The node has stopped a try: the try as the books had it, None when they did not."""
        out: Effects = []
        attempt = session.tries.get((job_id, fence))
        job = self.jobs.get(job_id)
        if job is not None and attempt is not None and job.current is attempt:
            # Stopped by itself (its shutdown): the same as losing the try.
            self._give_back(session, job_id, fence)
            self._lost(job, Reason.NODE_DRAINING, now, out)
            self._fill(job.terms.model, now, out)
        else:
            self.released(session, job_id, fence, now, out)
        return attempt, out

    def released(self, session: Session, job_id: bytes, fence: int, now: float, out: Effects) -> None:
        """A try that is no longer any job's current one ended on its node: its slot is free."""
        attempt = self._give_back(session, job_id, fence)
        if attempt is not None:
            self._fill(attempt.seat.key, now, out)

    def withdraw(self, job: Job, reason: Reason, now: float, out: Effects) -> None:
        """Stops the current try and goes on with the job as if its node were lost."""
        self._stop(job, reason, out, job.tokens)
        self._lost(job, reason, now, out)

    def try_gone(self, attempt: Try, now: float, out: Effects) -> None:
        """The node's digest no longer lists a try."""
        self._give_back(attempt.session, attempt.job_id, attempt.fence)
        job = self.jobs.get(attempt.job_id)
        if job is not None and job.current is attempt:
            self._lost(job, Reason.NODE_LOST, now, out)

    def session_lost(self, session: Session, reason: Reason, now: float, out: Effects) -> None:
        """All tries of a session that is over. Its seats are already out of the pools."""
        tries = list(session.tries.values())
        session.tries.clear()
        for attempt in tries:
            attempt.seat.used -= 1
            attempt.seat.outstanding_tokens -= attempt.cost
            job = self.jobs.get(attempt.job_id)
            if job is not None and job.current is attempt:
                self._lost(job, reason, now, out)

    # ---- time --------------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> Effects:
        """Timers that have run out."""
        out: Effects = []
        for job_id in self.wheel.due(now):
            job = self.jobs.get(job_id)
            if job is None:
                continue
            job.wake = inf
            at, which = job.lapse()
            if at > now:
                self._arm(job, now)
            else:
                self._lapsed(job, which, now, out)
        return out

    def drain(self) -> Effects:
        """Takes nothing new; what waits goes back to its callers, which may place it elsewhere. Repetition is harmless."""
        self.draining = True
        out: Effects = []
        error = MeshError.of(Reason.DRAINING, "The scheduler is shutting down.", retryable=True)
        for job in [job for job in self.jobs.values() if job.state is JobState.QUEUED]:
            self._fail_with(job, error, out)
        return out

    def queued(self, key: ModelKey) -> int:
        """Jobs that wait for a model."""
        return self.queue.length(key)

    def fill_all(self, now: float, out: Effects) -> None:
        """Offers what waits wherever a seat is free: after sessions came or changed."""
        for key in self.queue.models():
            self._fill(key, now, out)

    # ---- inside ------------------------------------------------------------------------------------------------------------

    def _offer(self, job: Job, now: float, out: Effects) -> bool:
        """Takes a slot and offers the job; False when it has to wait."""
        seat = self.pools.choose(job.terms, job.excluded)
        if seat is None:
            return False
        job.try_number += 1
        terms, session = job.terms, seat.session
        fence = fence_of(terms.attempt, job.try_number)
        attempt = Try(terms.job_id, fence, session, seat, seat.party, terms.cost, now)
        session.tries[terms.job_id, fence] = attempt
        self.pools.take(seat, attempt.cost)
        job.offered(attempt, now)
        # As _arm, without asking the job which of its timers is the first.
        accept_at, deadline_at = now + self.limits.accept_s, terms.deadline_at
        at = min(deadline_at, accept_at)
        if at < job.wake:
            job.wake = at
            self.wheel.add(terms.job_id, at)
        out.append(SendOffer(job, attempt))
        return True

    def _give_back(self, session: Session, job_id: bytes, fence: int) -> Try | None:
        """Frees the slot that a try holds. Repetition is harmless."""
        attempt = session.tries.pop((job_id, fence), None)
        if attempt is not None:
            self.pools.give(attempt.seat, attempt.cost)
        return attempt

    def _fill(self, key: ModelKey, now: float, out: Effects) -> None:
        """Offers waiting jobs of a model until no free seat suits any of the first ones."""
        pools = self.pools.pools
        while (pool := pools.get(key)) is not None and pool.free:
            for job in islice(self.queue.waiting(key), _LOOK_BEHIND):
                if self._offer(job, now, out):
                    self.queue.remove(job)
                    break
            else:
                return

    def _stop(self, job: Job, reason: Reason, out: Effects, delivered_tokens: int = 0) -> None:
        """Takes the job off the queue or tells its node to stop. The slot stays taken until the node says that it has."""
        attempt = job.current
        if attempt is None:
            self.queue.remove(job)
        else:
            attempt.cancelled = True
            out.append(SendCancel(attempt.session, job.id, attempt.fence, reason, delivered_tokens))

    def _end(
        self,
        job: Job,
        out: Effects,
        outcome: Outcome,
        reason: Reason | None,
        *,
        replaced: bool = False,
        done: bool = False,
    ) -> None:
        job.ended()
        if self.jobs.get(job.id) is job:
            del self.jobs[job.id]
        # A failure before content is not the end for its caller, which may place the job elsewhere: it must not be settled from here.
        final = not replaced and (outcome is not Outcome.FAILED or job.committed)
        out.append(JobEnded(job, outcome, reason.value if reason else "", final, done))

    def _fail(
        self, job: Job, reason: Reason, message: str, out: Effects, *, retry_after_s: float | None = None
    ) -> None:
        metadata = {"last_reason": job.last_reason} if job.last_reason else None
        self._fail_with(job, MeshError.of(reason, message, metadata=metadata, retry_after_s=retry_after_s), out)

    def _fail_with(self, job: Job, error: MeshError, out: Effects) -> None:
        """Ends a job that no node has any more, at its caller too."""
        if job.state is JobState.QUEUED:
            self.queue.remove(job)
        out.append(TellCaller(job, error))
        self._end(job, out, Outcome.FAILED, error.reason)

    def _again(self, job: Job, reason: Reason, now: float, out: Effects) -> None:
        """A try ended before content: the job waits for another one, or fails when it has had them all."""
        if job.current is not None:
            out.append(TryLost(job.current, reason))
        job.withdrawn(now)
        job.last_reason = reason.value
        if job.tries_left <= 0:
            self._fail(job, Reason.TRIES_EXHAUSTED, "Every node that tried this request failed before answering.", out)
        elif self.draining:
            self._fail_with(job, MeshError.of(Reason.DRAINING, "The scheduler is shutting down.", retryable=True), out)
        elif not self._offer(job, now, out):
            self.queue.push(job)
            # It may have waited out its patience in earlier tries already; it gets one more turn of it.
            job.queued_at = now
            self._arm(job, now)

    def _lost(self, job: Job, reason: Reason, now: float, out: Effects) -> None:
        """The current try is gone without a word to the caller."""
        if job.committed:
            job.last_reason = reason.value
            if job.current is not None:
                out.append(TryLost(job.current, reason))
                job.current = None
            self._fail(
                job, Reason.ANSWER_INTERRUPTED, "The node that was answering went away. You are not charged.", out
            )
        else:
            self._again(job, reason, now, out)

    def _lapsed(self, job: Job, which: Lapse, now: float, out: Effects) -> None:
        key = job.terms.model
        if which is Lapse.QUEUE:
            retry = self.limits.retry_after_s
            if self.pools.serves(key):
                self._fail(
                    job, Reason.QUEUE_TIMEOUT, "All nodes that serve this model are busy.", out, retry_after_s=retry
                )
            else:
                self._fail(job, Reason.NO_CAPACITY, "No node serves this model now.", out, retry_after_s=retry)
            return
        reason = _LAPSE_REASON[which]
        if which is Lapse.DEADLINE:
            self._stop(job, reason, out, job.tokens)
            self._fail(job, reason, "The deadline passed.", out)
        else:
            self.withdraw(job, reason, now, out)
        self._fill(key, now, out)

    def _arm(self, job: Job, now: float) -> None:
        """Makes sure that the wheel looks at the job no later than its next timer runs out."""
        at, _ = job.lapse()
        if job.state >= JobState.ACCEPTED:
            # While it runs the timers move with every frame: look once per shortest patience instead of re-arming per frame.
            at = min(at, now + self.limits.stall_s)
        if at < job.wake:
            job.wake = at
            self.wheel.add(job.id, at)
