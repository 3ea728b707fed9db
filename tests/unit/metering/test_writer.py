"""The group-commit writer against a store in memory: batches, repeats, refusals, a database that is away."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gpumesh.metering.v1.settlement_service_pb2 import NodeCount, Settled
from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, PROVIDER_PENDING
from gpumesh_metering.intake import Intake
from gpumesh_metering.store import BuyerBalance
from gpumesh_metering.writer import FLUSH_ITEMS, GroupCommitWriter
from gpumesh_runtime.clock import SystemClock
from gpumesh_runtime.sealing import KeyRing
from tests.support.metering import CANCELLED, FAILED, FENCE, each_settled, key_ring, paid, receipt_only, settle, ticket
from tests.support.metering_store import MemorySettleStore


class Bench:
    """A writer, its store, and the answers that came."""

    def __init__(self, ring: KeyRing, max_queued: int = 1000) -> None:
        self.ring = ring
        self.store = MemorySettleStore()
        self.answers: list[tuple[bytes, Settled]] = []
        self.balances: list[BuyerBalance] = []
        intake = Intake(ring.check, 8_000)
        self.writer = GroupCommitWriter(self.store, intake, SystemClock(), self.on_balances, max_queued=max_queued)

    def on_balances(self, rows: Sequence[BuyerBalance]) -> None:
        self.balances += rows

    def answer(self, job_id: bytes, body: bytes) -> None:
        self.answers.append((job_id, Settled.FromString(body)))

    def answer_many(self, body: bytes) -> None:
        self.answers += each_settled(Settled.FromString(body))

    def submit(self, job_id: bytes, body: bytes | None = None) -> bool:
        return self.writer.submit(job_id, body or settle(ticket(self.ring, job_id)), self)

    async def ask(self, job_id: bytes, body: bytes | None = None) -> Settled:
        """Submits and waits for the answer."""
        count = len(self.answers)
        assert self.submit(job_id, body)
        await until(lambda: len(self.answers) > count)
        assert self.answers[-1][0] == job_id
        return self.answers[-1][1]


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.writer.run())
    try:
        yield bench
    finally:
        bench.writer.stop()
        await asyncio.wait_for(task, 10)
    assert bench.store.violations() == []


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with running(Bench(key_ring(tmp_path))) as made:
        made.store.credit("acct_1", 10**9)
        yield made


async def test_settled_job_is_answered_with_its_money_line(bench: Bench) -> None:
    done = await bench.ask(os.urandom(16))
    assert (done.charge.amount_nano_usd, done.charge.provider_nano_usd, done.charge.fee_nano_usd) == (
        200_000,
        160_000,
        40_000,
    )
    assert [(pay.fence, pay.pay_nano_usd) for pay in done.pays] == [(FENCE, 160_000)]
    assert not done.repeated_settlement
    assert done.reason == ""
    assert done.charge.price.version == 3
    assert bench.store.available(PROVIDER_PENDING, "prov_1") == 160_000
    assert bench.balances[-1].available == 10**9 - 200_000


async def test_repeats_get_the_first_answer_and_move_no_money(bench: Bench) -> None:
    job = os.urandom(16)
    first = await bench.ask(job)
    other = settle(ticket(bench.ring, job), completion=999, segments=[paid(0, 999, provider="thief")])
    for body in (None, other, None):
        again = await bench.ask(job, body)
        assert again.repeated_settlement
        assert again.charge == first.charge
        assert list(again.pays) == list(first.pays)
    assert bench.store.available(BUYER_AVAILABLE, "acct_1") == 10**9 - 200_000


async def test_items_that_come_together_commit_together(bench: Bench) -> None:
    jobs = [os.urandom(16) for _ in range(50)]
    for job in jobs:
        bench.submit(job)
    await until(lambda: len(bench.answers) == 50)
    assert bench.store.batches == [50]


async def test_batches_are_no_larger_than_the_limit_and_full_ones_do_not_wait(bench: Bench) -> None:
    for _ in range(2 * FLUSH_ITEMS + 1):
        bench.submit(os.urandom(16))
    await until(lambda: len(bench.answers) == 2 * FLUSH_ITEMS + 1)
    assert bench.store.batches == [FLUSH_ITEMS, FLUSH_ITEMS, 1]


async def test_same_job_twice_in_one_moment_settles_once_and_answers_both(bench: Bench) -> None:
    job = os.urandom(16)
    bench.submit(job)
    bench.submit(job, settle(ticket(bench.ring, job), completion=1))
    bench.submit(job)
    await until(lambda: len(bench.answers) == 3)
    assert [done.repeated_settlement for _, done in bench.answers] == [False, True, True]
    assert {done.charge.amount_nano_usd for _, done in bench.answers} == {200_000}


async def test_nothing_is_answered_before_the_commit(bench: Bench) -> None:
    bench.store.go.clear()
    bench.submit(os.urandom(16))
    await asyncio.sleep(0.05)
    assert bench.answers == []
    bench.store.go.set()
    await until(lambda: len(bench.answers) == 1)


async def test_one_bad_item_is_found_by_halving_and_blocks_nobody(bench: Bench) -> None:
    jobs = [os.urandom(16) for _ in range(33)]
    bench.store.poison = {jobs[20]}
    for job in jobs:
        bench.submit(job)
    await until(lambda: len(bench.answers) == 33)
    reasons = {job: done.reason for job, done in bench.answers}
    assert reasons.pop(jobs[20]) == "INTERNAL"
    assert set(reasons.values()) == {""}
    assert [(evidence.job_id, why) for evidence, why in bench.store.suspense] == [(jobs[20], "refused by the database")]
    assert jobs[20] not in bench.store.jobs


async def test_queue_waits_while_the_database_is_away_and_settles_when_it_is_back(bench: Bench) -> None:
    bench.store.away = True
    jobs = [os.urandom(16) for _ in range(10)]
    for job in jobs:
        bench.submit(job)
    await asyncio.sleep(0.05)
    assert bench.answers == []
    bench.store.away = False
    await until(lambda: len(bench.answers) == 10)
    assert set(bench.store.jobs) == set(jobs)


async def test_lost_answer_of_a_commit_settles_nothing_twice(bench: Bench) -> None:
    bench.store.lose_next_answer = True
    job = os.urandom(16)
    done = await bench.ask(job)
    assert done.repeated_settlement
    assert done.charge.amount_nano_usd == 200_000
    assert bench.store.available(BUYER_AVAILABLE, "acct_1") == 10**9 - 200_000


async def test_full_queue_takes_nothing_and_answers_nothing(tmp_path: Path) -> None:
    async with running(Bench(key_ring(tmp_path), max_queued=3)) as bench:
        bench.store.away = True
        taken = [bench.submit(os.urandom(16)) for _ in range(5)]
        assert taken == [True, True, True, False, False]
        bench.store.away = False
        await until(lambda: len(bench.answers) == 3)


async def test_queue_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    async with running(Bench(key_ring(tmp_path))) as bench:
        bench.store.go.clear()
        big = receipt_only() + b"\x32\x80\x80\x80\x0c" + bytes(24 * 1024 * 1024 + 16)  # a reason of 24 MiB, and some
        taken = [bench.submit(os.urandom(16), big) for _ in range(4)]
        assert taken == [True, True, False, False]
        bench.store.go.set()
        await until(lambda: len(bench.answers) == 2)
        assert bench.submit(os.urandom(16), big)
        await until(lambda: len(bench.answers) == 3)


async def test_stop_writes_what_is_queued(tmp_path: Path) -> None:
    bench = Bench(key_ring(tmp_path))
    for _ in range(FLUSH_ITEMS + 5):
        bench.submit(os.urandom(16))
    async with running(bench):
        pass
    assert len(bench.answers) == FLUSH_ITEMS + 5


async def test_forged_and_foreign_tickets_are_refused(bench: Bench, tmp_path: Path) -> None:
    job = os.urandom(16)
    (tmp_path / "other").mkdir()
    stranger = key_ring(tmp_path / "other")
    for sealed in (
        ticket(stranger, job),
        ticket(bench.ring, os.urandom(16)),
        b"",
        b"\xff\xff",
        ticket(bench.ring, job)[:-1],
    ):
        assert (await bench.ask(job, settle(sealed))).reason == "TICKET_INVALID"
    assert (await bench.ask(job, b"\xff garbage")).reason == "TICKET_INVALID"
    assert bench.store.jobs == {}


async def test_impossible_terms_are_refused_even_under_a_good_seal(bench: Bench) -> None:
    for fields in ({"hold_nano_usd": -1}, {"hold_nano_usd": 2**63 - 1}, {"account_id": ""}, {"max_output_tokens": -1}):
        job = os.urandom(16)
        assert (await bench.ask(job, settle(ticket(bench.ring, job, **fields)))).reason == "TICKET_INVALID"


async def test_expired_ticket_is_refused_but_a_settled_job_still_gets_its_answer(bench: Bench) -> None:
    job, fresh = os.urandom(16), os.urandom(16)
    await bench.ask(job)
    late = {"settle_by_s": int(time.time()) - 10}
    assert (await bench.ask(fresh, settle(ticket(bench.ring, fresh, **late)))).reason == "TICKET_EXPIRED"
    again = await bench.ask(job, settle(ticket(bench.ring, job, **late)))
    assert again.repeated_settlement
    assert again.charge.amount_nano_usd == 200_000


async def test_failed_job_settles_at_nothing_and_is_answered(bench: Bench) -> None:
    job = os.urandom(16)
    done = await bench.ask(job, settle(ticket(bench.ring, job), outcome=FAILED, reason="NODE_LOST"))
    assert (done.reason, done.charge.amount_nano_usd) == ("", 0)
    assert [(pay.fence, pay.pay_nano_usd) for pay in done.pays] == [(FENCE, 0)]


async def test_cancelled_job_pays_for_what_was_delivered(bench: Bench) -> None:
    job = os.urandom(16)
    done = await bench.ask(job, settle(ticket(bench.ring, job), outcome=CANCELLED, completion=10))
    assert done.charge.amount_nano_usd == 120_000


async def test_receipt_alone_is_parked_and_earns_nothing_by_itself(bench: Bench) -> None:
    job = os.urandom(16)
    for _ in range(3):
        assert (await bench.ask(job, receipt_only())).reason == "PARKED"
    assert list(bench.store.parked) == [(job, FENCE)]
    assert bench.store.jobs == {}


async def test_receipt_of_a_settled_job_is_answered_with_its_pay(bench: Bench) -> None:
    job = os.urandom(16)
    await bench.ask(job)
    done = await bench.ask(job, receipt_only())
    assert (done.reason, done.repeated_settlement) == ("", True)
    assert [(pay.fence, pay.pay_nano_usd) for pay in done.pays] == [(FENCE, 160_000)]
    other = await bench.ask(job, receipt_only(FENCE + 1))
    assert [(pay.fence, pay.pay_nano_usd) for pay in other.pays] == [(FENCE + 1, 0)]


async def test_charge_beyond_the_balance_is_covered_by_insurance(bench: Bench) -> None:
    bench.store.credit("poor", 250_000)
    for _ in range(3):
        job = os.urandom(16)
        await bench.ask(job, settle(ticket(bench.ring, job, account_id="poor")))
    assert bench.store.available(BUYER_AVAILABLE, "poor") == 0
    assert bench.store.available("platform:insurance", "platform") == -350_000
    assert bench.store.available(PROVIDER_PENDING, "prov_1") == 480_000


async def test_many_segments_and_counts_are_bounded(bench: Bench) -> None:
    job = os.urandom(16)
    segments = [paid(at, at + 1, fence=at + 1) for at in range(200)]
    counts = [NodeCount(fence=2**64 - 1)] * 500
    done = await bench.ask(job, settle(ticket(bench.ring, job), completion=200, segments=segments, counts=counts))
    assert len(done.pays) == 64
    assert sum(pay.pay_nano_usd for pay in done.pays) == done.charge.provider_nano_usd
