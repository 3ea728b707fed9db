"""The one writer: settle items wait in a bounded queue, a batch of them commits in one transaction, then each is
answered.

What it promises: nothing is answered before it is committed; what is answered is never lost; one bad item never holds
up others (a batch that the database refuses is halved until the bad one is alone, and that one goes into suspense);
while the database is away the queue waits, and what no longer fits is not answered, so that its sender keeps it and
sends it again.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from gpumesh_metering import wire
from gpumesh_metering.intake import Decided, Intake, Receipt, Refused
from gpumesh_metering.store import BuyerBalance, Evidence, SettleBatch, SettleStore, StoreRefusedError
from gpumesh_runtime.clock import Clock
from gpumesh_runtime.errors import Reason, Unavailable, as_mesh_error
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.metrics import counter, gauge, histogram

log = get_logger("gpumesh.metering.writer")

FLUSH_S: Final = 0.010  # how long the first item of a batch waits for company; settling is in nobody's way
FLUSH_ITEMS: Final = 200  # beyond this a bigger batch gains nothing (mechanisms.md 6: 13,700/s in batches of 100)
MAX_QUEUED: Final = 50_000  # about 40 MB; a minute of 800 jobs/s while the database is away
MAX_QUEUED_BYTES: Final = (
    64 * 1024 * 1024
)  # a Settle has 400 to 800 bytes; this is the bound for those that are not as they should be
_BACKOFF_S: Final = (0.1, 2.0)
# A single item is judged twice: what a constraint says once may have to do with another transaction, twice it is the item.
_REFUSALS: Final = 2
# Settled.reason of a receipt that waits for its record (settlement_service.proto).
PARKED: Final = "PARKED"
REFUSED_BY_DATABASE: Final = "refused by the database"

_SETTLED: Final = counter(
    "gpumesh_metering_settle_items_total", "Settle items answered, by what became of them", ("result",)
)
_NEW, _REPEATED, _REFUSED, _PARKED, _SUSPENDED, _DROPPED = (
    _SETTLED.labels(name) for name in ("settled", "repeated", "refused", "parked", "suspended", "dropped")
)
_BATCHES: Final = counter("gpumesh_metering_batches_total", "Batches written").cell
_RETRIES: Final = counter("gpumesh_metering_batch_retries_total", "Writes that the database did not take").cell
_QUEUED: Final = gauge("gpumesh_metering_queued_items", "Settle items that wait").cell
_WRITE_S: Final = histogram("gpumesh_metering_batch_seconds", "From taking a batch to its commit").cell


class Way(Protocol):
    """The way back to whoever sent an item. Must not raise, must not block."""

    def answer(self, job_id: bytes, body: bytes) -> None:
        """Sends the answer (Settled, encoded) for a job."""

    def answer_many(self, body: bytes) -> None:
        """Sends one Settled, encoded, of many jobs."""


class Waiting(NamedTuple):
    """A settle item that waits: job id, Settle encoded, and where its answer goes."""

    job_id: bytes
    body: bytes
    way: Way


class GroupCommitWriter:
    """Takes settle items, commits them in batches, answers them.

    on_balances: told of buyers' balances after each commit. Run `run()` for as long as the process lives.
    """

    def __init__(
        self,
        store: SettleStore,
        intake: Intake,
        clock: Clock,
        on_balances: Callable[[Sequence[BuyerBalance]], None],
        *,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self._store = store
        self._intake = intake
        self._clock = clock
        self._on_balances = on_balances
        self._max_queued = max_queued
        self._queue: deque[Waiting] = deque()
        self._queued_bytes = 0
        self._some = asyncio.Event()
        self._full = asyncio.Event()
        self._stopping = False
        self._since = 0.0  # when the first item of the next batch came, monotonic seconds

    def submit(self, job_id: bytes, body: bytes, way: Way) -> bool:
        """Takes an item. False when the queue is full: it gets no answer, and its sender will send it again."""
        queue = self._queue
        size = self._queued_bytes + len(body)
        if len(queue) >= self._max_queued or size > MAX_QUEUED_BYTES:
            _DROPPED.value += 1
            return False
        self._queued_bytes = size
        queue.append(Waiting(job_id, body, way))
        if len(queue) == 1:
            self._since = self._clock.monotonic()
            self._some.set()
        if len(queue) >= FLUSH_ITEMS:
            self._full.set()
        return True

    @property
    def queued(self) -> int:
        """Items that wait."""
        return len(self._queue)

    def stop(self) -> None:
        """No more items will come: run() returns when what is queued has been written."""
        self._stopping = True
        self._some.set()
        self._full.set()

    async def run(self) -> None:
        """Writes batches until stop(), then what is left. Cancel it to leave at once; what is queued then is not
        answered.
        """
        while True:
            await self._some.wait()
            if not self._queue and self._stopping:
                return
            wait = self._since + FLUSH_S - self._clock.monotonic()
            if len(self._queue) < FLUSH_ITEMS and not self._stopping and wait > 0:
                try:
                    async with asyncio.timeout(wait):
                        await self._full.wait()
                except TimeoutError:
                    pass  # the time is up: what came is the batch
            await self._write(self._take())

    def _take(self) -> list[Waiting]:
        """The next batch, each job once: another item of the same job waits for the next one, where it is a repeat."""
        queue = self._queue
        jobs: set[bytes] = set()
        batch: list[Waiting] = []
        again: list[Waiting] = []
        while queue and len(batch) < FLUSH_ITEMS:
            item = queue.popleft()
            if item.job_id in jobs:
                again.append(item)
            else:
                jobs.add(item.job_id)
                batch.append(item)
                self._queued_bytes -= len(item.body)
        queue.extendleft(reversed(again))
        self._since = self._clock.monotonic()
        if not queue and not self._stopping:
            self._some.clear()
        if len(queue) < FLUSH_ITEMS and not self._stopping:
            self._full.clear()
        _QUEUED.value = len(queue)
        return batch

    async def _write(self, items: list[Waiting]) -> None:
        """Commits and answers items, however long the database is away; halves them when it refuses them."""
        started = self._clock.monotonic()
        backoff, longest = _BACKOFF_S
        refusals = 0
        while True:
            try:
                await self._attempt(items)
                break
            except Unavailable as err:
                _RETRIES.value += 1
                wait = random.uniform(backoff / 2, backoff)  # noqa: S311 -- jitter, not a secret
                cause = err.__cause__ or err
                log.warning(
                    "cannot write, will try again", cause=f"{type(cause).__name__}: {cause}"[:200], batch=len(items),
                    queued=len(self._queue), after_s=round(wait, 2),
                )  # fmt: skip
                await asyncio.sleep(wait)
                backoff = min(2 * backoff, longest)
            except StoreRefusedError as err:
                if len(items) > 1:
                    middle = len(items) // 2
                    await self._write(items[:middle])
                    await self._write(items[middle:])
                    return
                refusals += 1
                if refusals == _REFUSALS:
                    await self._suspend(items[0], err)
                    return
        _BATCHES.value += 1
        _WRITE_S.observe(self._clock.monotonic() - started)

    async def _attempt(self, items: list[Waiting]) -> None:
        """One try: decides, commits, answers. Raises Unavailable or StoreRefusedError with nothing answered that was
        not committed.
        """
        batch = SettleBatch()
        now_s = self._clock.now_ns() / 1e9
        decided: list[tuple[Waiting, Decided]] = []
        refused: list[tuple[Waiting, Refused]] = []
        receipts: list[tuple[Waiting, Receipt]] = []
        add = self._intake.add
        for item in items:
            try:
                verdict = add(batch, item.job_id, item.body, now_s)
            except Exception as err:
                # A flaw of ours that this evidence brings out. Alone, it must end in suspense, not in a process that
                # dies of it for ever.
                as_mesh_error(err)  # logs it
                raise StoreRefusedError(type(err).__name__) from err
            if type(verdict) is Decided:
                decided.append((item, verdict))
            elif type(verdict) is Refused:
                refused.append((item, verdict))
            elif type(verdict) is Receipt:
                receipts.append((item, verdict))
        repeated: list[Waiting] = []
        if decided:
            result = await self._store.settle(batch)
            places = set(result.repeated)
            repeated = [item for place, (item, _) in enumerate(decided, 1) if place in places]
            if result.balances:
                self._on_balances(result.balances)
            _answer([one for place, one in enumerate(decided, 1) if place not in places])
            _NEW.value += len(decided) - len(repeated)
        if repeated or refused or receipts:
            await self._answer_from_store(repeated, refused, receipts)

    async def _answer_from_store(
        self, repeated: list[Waiting], refused: list[tuple[Waiting, Refused]], receipts: list[tuple[Waiting, Receipt]]
    ) -> None:
        """Answers what is not new: the stored outcome where the job is settled, whatever the evidence; else the refusal
        or PARKED.
        """
        items = [*repeated, *(item for item, _ in refused), *(item for item, _ in receipts)]
        stored = await self._store.stored([item.job_id for item in items])
        parked = [
            Evidence(item.job_id, fence, item.body)
            for item, receipt in receipts
            if item.job_id not in stored and len(item.job_id) == wire.JOB_ID_BYTES
            for fence in receipt.fences
        ]
        if parked:
            await self._store.park(parked)
        for item in repeated:
            _REPEATED.value += 1
            item.way.answer(item.job_id, wire.stored_to_wire(stored[item.job_id]))
        for item, refusal in refused:
            known = stored.get(item.job_id)
            (_REPEATED if known else _REFUSED).value += 1
            item.way.answer(item.job_id, wire.stored_to_wire(known) if known else wire.refusal_to_wire(refusal.reason))
        for item, receipt in receipts:
            known = stored.get(item.job_id)
            (_REPEATED if known else _PARKED).value += 1
            item.way.answer(
                item.job_id, wire.stored_to_wire(known, receipt.fences) if known else wire.refusal_to_wire(PARKED)
            )

    async def _suspend(self, item: Waiting, refusal: StoreRefusedError) -> None:
        """Keeps an item that the database refuses for a person to look at, and answers it, so that nobody sends it for
        ever.
        """
        log.error("a settlement was refused by the database", id=item.job_id.hex(), cause=str(refusal)[:200])
        try:
            await self._store.suspend([Evidence(item.job_id, 0, item.body)], REFUSED_BY_DATABASE)
        except (Unavailable, StoreRefusedError) as err:
            # Not kept, so not answered: its sender has it and will send it again.
            log.warning("a refused settlement waits with its sender", id=item.job_id.hex(), cause=type(err).__name__)
            return
        _SUSPENDED.value += 1
        item.way.answer(item.job_id, wire.refusal_to_wire(Reason.INTERNAL))


def _answer(settled: Sequence[tuple[Waiting, Decided]]) -> None:
    """Answers what has been committed: jobs with one paid try together, on each way; others, and one alone, with a line of their own."""
    many: dict[Way, list[tuple[bytes, int, int, int]]] = {}
    if len(settled) > 1:
        for item, decided in settled:
            if len(decided.paid) == 1:
                many.setdefault(item.way, []).append((item.job_id, decided.charge, *decided.paid[0]))
    for item, (charge, fee, price, paid) in settled:
        if len(paid) != 1 or len(settled) == 1:
            body = wire.settled_to_wire(charge, fee, wire.price_to_wire(price), paid, repeated=False)
            item.way.answer(item.job_id, body)
    for way, jobs in many.items():
        way.answer_many(wire.many_to_wire(jobs))
