"""A whole metering over mTLS: links from schedulers and routers, operators' calls, a database that is killed."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh.metering.v1.balance_service_pb2 import Balance, BalanceHello, BalanceUpdate, LookupBalance
from gpumesh.metering.v1.ledger_service_pb2 import (
    CheckLedgerRequest,
    CreditRequest,
    GetBalancesRequest,
    ListUsageRequest,
    SetPriceRequest,
)
from gpumesh.metering.v1.ledger_service_pb2_grpc import LedgerServiceStub
from gpumesh.metering.v1.settlement_service_pb2 import Settle, Settled, SettlementHello
from gpumesh_metering.postgres import PostgresLedgerStore
from gpumesh_metering.writer import FLUSH_ITEMS
from gpumesh_runtime.database import Database
from gpumesh_runtime.errors import DeadlineExceeded, MeshError, PermissionDenied, Reason, from_grpc
from gpumesh_runtime.identity import node_uri, service_uri
from gpumesh_runtime.link import LinkClient
from tests.support.links import Recorder
from tests.support.metering import (
    FAILED,
    FENCE,
    RunningMetering,
    each_settled,
    receipt_only,
    running_metering,
    settle,
    ticket,
)
from tests.support.ports import free_port
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.postgres
SETTLEMENT = "/gpumesh.metering.v1.SettlementService/Connect"
BALANCE = "/gpumesh.metering.v1.BalanceService/Connect"
SETTLE = ItemKind.ITEM_KIND_SETTLE
SETTLED = ItemKind.ITEM_KIND_SETTLED
UPDATE = ItemKind.ITEM_KIND_UPDATE


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Peer:
    """A scheduler or router: a link that is kept up, and what came by it."""

    def __init__(self, client: LinkClient, seen: Recorder) -> None:
        self.client = client
        self.seen = seen

    async def settle(self, job_id: bytes, body: bytes) -> None:
        (await self.client.up(10)).send_new(SETTLE, id=job_id, body=body)

    def answers(self) -> dict[bytes, list[Settled]]:
        """What was answered, by job."""
        found: dict[bytes, list[Settled]] = {}
        for item in self.seen.items:
            if item.kind == SETTLED:
                settled = Settled.FromString(item.body)
                for job_id, one in each_settled(settled) if settled.job_ids else [(item.id, settled)]:
                    found.setdefault(job_id, []).append(one)
        return found

    async def ask(self, job_id: bytes, body: bytes) -> Settled:
        """Sends and waits for the next answer of that job."""
        before = len(self.answers().get(job_id, ()))
        await self.settle(job_id, body)
        await until(lambda: len(self.answers().get(job_id, ())) > before)
        return self.answers()[job_id][-1]

    def updates(self) -> list[BalanceUpdate]:
        """What metering pushed."""
        return [BalanceUpdate.FromString(item.body) for item in self.seen.items if item.kind == UPDATE]

    async def balance(self, account_id: str) -> Balance:
        """Asks for a balance."""
        link = await self.client.up(10)
        return Balance.FromString(await link.call(LookupBalance(account_id=account_id).SerializeToString(), 5))


@asynccontextmanager
async def peer(metering: RunningMetering, method: str, uri: str, hello: bytes) -> AsyncIterator[Peer]:
    seen = Recorder()
    client = LinkClient(metering.address, method, credentials=metering.tls(uri), hello=lambda: hello, receiver=seen)
    task = asyncio.create_task(client.run())
    try:
        yield Peer(client, seen)
    finally:
        await client.stop()
        await task


def scheduler(metering: RunningMetering, name: str = "s1"):  # type: ignore[no-untyped-def]  # an async context manager of Peer
    hello = SettlementHello(scheduler_id=name).SerializeToString()
    return peer(metering, SETTLEMENT, service_uri("scheduler", name), hello)


def router(metering: RunningMetering):  # type: ignore[no-untyped-def]  # as above
    return peer(metering, BALANCE, service_uri("router"), BalanceHello(router_id="r1").SerializeToString())


async def credit(metering: RunningMetering, account_id: str, amount: int, credit_id: str = "") -> int:
    stub = LedgerServiceStub(metering.channel())
    request = CreditRequest(account_id=account_id, amount_nano_usd=amount, credit_id=credit_id or os.urandom(8).hex())
    return (await stub.Credit(request, timeout=10)).balance.available_nano_usd


async def test_job_settles_over_a_link_and_shows_in_balances_and_usage(metering: RunningMetering) -> None:
    await credit(metering, "acct_1", 10**9)
    job = os.urandom(16)
    async with scheduler(metering) as one:
        for repeated in (False, True, True):
            done = await one.ask(job, settle(ticket(metering.ring, job)))
            assert (done.charge.amount_nano_usd, done.repeated_settlement, done.reason) == (200_000, repeated, "")
    stub = LedgerServiceStub(metering.channel())
    provider = await stub.GetBalances(GetBalancesRequest(owner_id="prov_1"), timeout=10)
    assert dict(provider.balances_nano_usd) == {"provider:pending": 160_000}
    usage = await stub.ListUsage(ListUsageRequest(job_id=job), timeout=10)
    (row,) = usage.rows
    assert (row.account_id, row.key_id, row.model_id, row.charge.fee_nano_usd) == (
        "acct_1",
        "key_1",
        "gpumesh-tiny",
        40_000,
    )
    assert (row.usage.prompt_tokens, row.usage.completion_tokens, row.charge.price.version) == (100, 50, 3)
    assert [(p.provider_id, p.node_id, p.fence, p.tokens, p.pay_nano_usd) for p in row.providers] == [
        ("prov_1", "node_1", FENCE, 50, 160_000)
    ]
    verdict = await stub.CheckLedger(CheckLedgerRequest(), timeout=30)
    assert (list(verdict.violations), verdict.transfers, verdict.settlements) == ([], 3, 1)


async def test_many_jobs_in_one_item_are_each_settled_and_answered(metering: RunningMetering) -> None:
    await credit(metering, "acct_1", 10**9)
    jobs = [os.urandom(16) for _ in range(5)]
    bodies = [settle(ticket(metering.ring, job)) for job in jobs[:4]] + [b"no settle"]
    async with scheduler(metering, "s1") as one:
        many = Settle(job_ids=b"".join(jobs), jobs=bodies).SerializeToString()
        (await one.client.up(10)).send_new(SETTLE, body=many)
        await until(lambda: len(one.answers()) == 5)
        assert [one.answers()[job][0].charge.amount_nano_usd for job in jobs] == [200_000] * 4 + [0]
        assert one.answers()[jobs[4]][0].reason == "TICKET_INVALID"


async def test_same_jobs_from_two_schedulers_settle_once_and_both_are_answered(metering: RunningMetering) -> None:
    await credit(metering, "acct_1", 10**9)
    jobs = [os.urandom(16) for _ in range(300)]
    async with scheduler(metering, "s1") as one, scheduler(metering, "s2") as two:
        for job in jobs:
            body = settle(ticket(metering.ring, job))
            await one.settle(job, body)
            await two.settle(job, body)
        await until(lambda: len(one.answers()) == 300 and len(two.answers()) == 300)
    for job in jobs:
        both = [one.answers()[job][0], two.answers()[job][0]]
        assert sorted(done.repeated_settlement for done in both) == [False, True]
        assert both[0].charge.amount_nano_usd == both[1].charge.amount_nano_usd
    assert await credit(metering, "acct_1", 1) == 10**9 - 300 * 200_000 + 1


async def test_receipt_waits_for_its_record_and_is_then_answered_with_its_pay(metering: RunningMetering) -> None:
    job = os.urandom(16)
    async with scheduler(metering) as one:
        for _ in range(3):
            assert (await one.ask(job, receipt_only())).reason == "PARKED"
        await one.ask(job, settle(ticket(metering.ring, job)))
        done = await one.ask(job, receipt_only())
    assert [(pay.fence, pay.pay_nano_usd) for pay in done.pays] == [(FENCE, 160_000)]


async def test_router_gets_prices_balances_and_their_changes(metering: RunningMetering) -> None:
    stub = LedgerServiceStub(metering.channel())
    await stub.SetPrice(
        SetPriceRequest(model_id="m", input_nano_usd_per_mtok=1, output_nano_usd_per_mtok=2), timeout=10
    )
    async with router(metering) as one:
        await until(lambda: bool(one.updates()))
        assert one.updates()[0].prices_whole
        assert one.updates()[0].prices["m"].output_nano_usd_per_mtok == 2
        assert (await one.balance("acct_1")).available_nano_usd == 0
        await credit(metering, "acct_1", 10**9)
        await credit(metering, "unasked", 10**9)
        await until(lambda: any(update.balances for update in one.updates()))
        job = os.urandom(16)
        async with scheduler(metering) as other:
            await other.ask(job, settle(ticket(metering.ring, job)))
        await until(lambda: one.updates()[-1].balances[0].available_nano_usd == 10**9 - 200_000, within_s=1.0)
        assert {row.account_id for update in one.updates() for row in update.balances} == {"acct_1"}
        versions = [row.version for update in one.updates() for row in update.balances]
        assert versions == sorted(versions)
        await stub.SetPrice(SetPriceRequest(model_id="n", output_nano_usd_per_mtok=5), timeout=10)
        await until(lambda: "n" in one.updates()[-1].prices)
        assert set(one.updates()[-1].prices) == {"m", "n"}


async def test_many_lookups_at_once_are_each_answered(metering: RunningMetering) -> None:
    for at in range(5):
        await credit(metering, f"acct_{at}", 100 + at)
    async with router(metering) as one:
        await one.client.up(10)
        found = await asyncio.gather(*(one.balance(f"acct_{at % 7}") for at in range(200)))
    assert {row.account_id: row.available_nano_usd for row in found} == {
        "acct_0": 100, "acct_1": 101, "acct_2": 102, "acct_3": 103, "acct_4": 104, "acct_5": 0, "acct_6": 0,
    }  # fmt: skip


async def test_wrong_lookup_is_refused_with_a_reason(metering: RunningMetering) -> None:
    async with router(metering) as one:
        for account in ("", "x" * 201, "a\x00b"):
            with pytest.raises(MeshError) as caught:
                await one.balance(account)
            assert caught.value.reason is Reason.INVALID_ARGUMENT


async def test_usage_pages_newest_first_without_gaps_or_doubles(metering: RunningMetering) -> None:
    jobs = [os.urandom(16) for _ in range(25)]
    async with scheduler(metering) as one:
        for at, job in enumerate(jobs):
            await one.ask(
                job, settle(ticket(metering.ring, job, account_id=f"acct_{at % 2}"), outcome=FAILED, reason="NODE_LOST")
            )
    stub = LedgerServiceStub(metering.channel())
    seen: list[bytes] = []
    token = ""
    for _ in range(10):
        page = await stub.ListUsage(ListUsageRequest(page_size=4, page_token=token, account_id="acct_0"), timeout=10)
        seen += [row.job_id for row in page.rows]
        token = page.next_page_token
        if not token:
            break
    assert seen == [job for at, job in enumerate(jobs) if at % 2 == 0][::-1]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListUsage(ListUsageRequest(page_token="nonsense"), timeout=10)
    assert from_grpc(caught.value).reason is Reason.INVALID_ARGUMENT


async def test_credit_repeats_once_conflicts_and_is_bounded(metering: RunningMetering) -> None:
    for _ in range(3):
        assert await credit(metering, "acct_1", 500, "c1") == 500
    for account, amount, reason in (("acct_1", 501, Reason.ALREADY_EXISTS), ("acct_2", 500, Reason.ALREADY_EXISTS)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await credit(metering, account, amount, "c1")
        assert from_grpc(caught.value).reason is reason
    for amount in (0, -1, 10**15 + 1, 2**63 - 1, -(2**63)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await credit(metering, "acct_1", amount, "c2")
        assert from_grpc(caught.value).reason is Reason.INVALID_ARGUMENT


async def test_only_the_right_identities_may_call(metering: RunningMetering) -> None:
    for uri in (service_uri("router"), service_uri("scheduler", "s"), node_uri("p", "n")):
        stub = LedgerServiceStub(metering.channel(uri))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.CheckLedger(CheckLedgerRequest(), timeout=10)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    async with peer(metering, SETTLEMENT, service_uri("router"), b"") as stranger:
        with pytest.raises((PermissionDenied, DeadlineExceeded, TimeoutError, MeshError)):
            await stranger.client.up(0.5)


async def test_garbage_settles_nothing_and_the_link_lives(metering: RunningMetering) -> None:
    rng = random.Random(3)
    job = os.urandom(16)
    async with scheduler(metering) as one:
        for _ in range(50):
            await one.settle(rng.randbytes(16), rng.randbytes(rng.randrange(200)))
        (await one.client.up(10)).send(Item(kind=ItemKind.ITEM_KIND_FRAME, id=job, body=b"?"))
        await one.settle(b"short", settle(ticket(metering.ring, b"short")))
        done = await one.ask(job, settle(ticket(metering.ring, job)))
        assert done.charge.amount_nano_usd == 200_000
        await until(lambda: len(one.answers()) == 52)
        assert {answer[0].reason for name, answer in one.answers().items() if name != job} <= {
            "TICKET_INVALID",
            "PARKED",
        }


async def test_item_that_the_database_refuses_goes_to_suspense_and_the_others_settle(metering: RunningMetering) -> None:
    jobs = [os.urandom(16) for _ in range(20)]
    async with scheduler(metering) as one:
        for at, job in enumerate(jobs):
            await one.settle(job, settle(ticket(metering.ring, job), reason="a\x00b" if at == 7 else ""))
        await until(lambda: len(one.answers()) == 20)
        reasons = {job: answer[0].reason for job, answer in one.answers().items()}
    assert reasons.pop(jobs[7]) == "INTERNAL"
    assert set(reasons.values()) == {""}


async def test_drain_answers_what_was_sent(postgres_dsn: str, tmp_path: Path) -> None:
    jobs = [os.urandom(16) for _ in range(FLUSH_ITEMS * 3)]
    async with running_metering(postgres_dsn, tmp_path) as metering, scheduler(metering) as one:
        for job in jobs:
            await one.settle(job, settle(ticket(metering.ring, job)))
        await until(lambda: bool(one.answers()))
        metering.life.stop("test")
        await until(lambda: len(one.answers()) == len(jobs) or bool(one.seen.ends))
        answered = set(one.answers())
    database = Database(postgres_dsn, "metering")
    try:
        rows = await database.fetch("SELECT job_id FROM metering.settlements")
        assert answered <= {row[0] for row in rows}, "what was answered is committed"
        assert (await PostgresLedgerStore(database).check()).violations == []
    finally:
        await database.close()


async def test_postgres_killed_and_restarted_under_load_loses_nothing_and_settles_nothing_twice(tmp_path: Path) -> None:
    server = PostgresServer(durable=True)
    await asyncio.to_thread(server.start)
    jobs = dict.fromkeys((os.urandom(16) for _ in range(1500)), b"")
    address = f"127.0.0.1:{free_port()}"
    try:
        async with running_metering(server.dsn("postgres"), tmp_path, address) as metering, scheduler(metering) as one:
            await credit(metering, "acct_1", 10**12)
            names = list(jobs)
            for job in names:
                jobs[job] = settle(ticket(metering.ring, job))
            for kill_at in (300, 900):
                for job in names[kill_at - 300 : kill_at]:
                    await one.settle(job, jobs[job])
                await until(lambda kill_at=kill_at: len(one.answers()) >= kill_at - 250)  # type: ignore[misc]  # bound now
                await asyncio.to_thread(server.stop, signal.SIGQUIT)
                before = set(one.answers())
                for job in names[kill_at : kill_at + 300]:
                    await one.settle(job, jobs[job])
                await asyncio.sleep(0.1)
                await asyncio.to_thread(server.start)
                await until(lambda before=before: len(one.answers()) > len(before), within_s=20)  # type: ignore[misc]  # as above
            for job in names:
                await one.settle(job, jobs[job])
            await until(lambda: len(one.answers()) == 1500, within_s=30)
            assert {done.charge.amount_nano_usd for answer in one.answers().values() for done in answer} == {200_000}
            stub = LedgerServiceStub(metering.channel())
            verdict = await stub.CheckLedger(CheckLedgerRequest(), timeout=60)
            assert (list(verdict.violations), verdict.settlements) == ([], 1500)
            left = await stub.GetBalances(GetBalancesRequest(owner_id="acct_1"), timeout=10)
            assert dict(left.balances_nano_usd) == {"buyer:available": 10**12 - 1500 * 200_000}
    finally:
        await asyncio.to_thread(server.remove)


async def test_metering_waits_for_a_database_that_comes_later(tmp_path: Path) -> None:
    server = PostgresServer()
    await asyncio.to_thread(server.start)
    await asyncio.to_thread(server.stop)
    try:
        start = asyncio.create_task(asyncio.to_thread(_start_later, server))
        async with running_metering(server.dsn("postgres"), tmp_path) as metering:
            assert await credit(metering, "acct_1", 5) == 5
        await start
    finally:
        await asyncio.to_thread(server.remove)


def _start_later(server: PostgresServer) -> None:
    import time  # noqa: PLC0415 -- only here

    time.sleep(0.15)
    server.start()


async def test_two_meterings_share_a_database_during_an_upgrade(postgres_dsn: str, tmp_path: Path) -> None:
    jobs = [os.urandom(16) for _ in range(200)]
    async with (
        running_metering(postgres_dsn, tmp_path) as old,
        running_metering(postgres_dsn, tmp_path) as new,
        scheduler(old) as one,
        scheduler(new) as two,
    ):
        await credit(old, "acct_1", 10**9)
        for job in jobs:
            body = settle(ticket(old.ring, job))
            await one.settle(job, body)
            await two.settle(job, body)
        await until(lambda: len(one.answers()) == 200 and len(two.answers()) == 200)
        assert await credit(new, "acct_1", 1) == 10**9 - 200 * 200_000 + 1
        verdict = await LedgerServiceStub(new.channel()).CheckLedger(CheckLedgerRequest(), timeout=30)
        assert list(verdict.violations) == []
