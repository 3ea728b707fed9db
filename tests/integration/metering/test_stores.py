"""The stores on a real PostgreSQL, judged by the ledger's core in memory."""

import asyncio
import itertools
import os
import random
import uuid
from pathlib import Path

import asyncpg
import pytest

from gpumesh_metering.checks import quick_check
from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, BUYER_LEASED, PROVIDER_PENDING, Account
from gpumesh_metering.domain.ledger import INT64_MAX, Ledger, LedgerError, Transfer, TransferKind
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.intake import Decided, Intake
from gpumesh_metering.postgres import PostgresLedgerStore, append
from gpumesh_metering.postgres_settle import PostgresSettleStore
from gpumesh_metering.store import Evidence, SettleBatch, StoreRefusedError
from gpumesh_runtime.database import Database
from gpumesh_runtime.errors import AlreadyExists
from gpumesh_runtime.sealing import KeyRing
from tests.support.metering import FENCE, key_ring, paid, settle, ticket
from tests.support.metering_store import MemorySettleStore

pytestmark = pytest.mark.postgres
WORLD = Account("external:operator", "operator")
BUYER = Account(BUYER_AVAILABLE, "b1")
PROVIDER = Account(PROVIDER_PENDING, "p1")


def batch_of(ring: KeyRing, jobs: dict[bytes, bytes]) -> SettleBatch:
    """Settle bodies as a batch."""
    batch = SettleBatch()
    intake = Intake(ring.check, 8_000)
    for job_id, body in jobs.items():
        assert isinstance(intake.add(batch, job_id, body, 0.0), Decided)
    return batch


def simple(ring: KeyRing, count: int, **fields: object) -> SettleBatch:
    """`count` jobs of $0.0002 each."""
    jobs = [os.urandom(16) for _ in range(count)]
    return batch_of(ring, {job: settle(ticket(ring, job, **fields)) for job in jobs})


async def rows_of(database: Database, table: str) -> list[tuple[object, ...]]:
    """Every row of a table, ordered, without times."""
    rows = await database.fetch(f"SELECT * FROM {table}")
    return sorted((tuple(value for value in row.values() if not hasattr(value, "tzinfo")) for row in rows), key=repr)


async def test_batch_settles_in_one_transaction_and_moves_each_balance_once(
    settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, tmp_path: Path
) -> None:
    await ledger_store.credit("c1", "acct_1", 10**9, "", "test")
    result = await settle_store.settle(simple(key_ring(tmp_path), 20))
    assert result.repeated == ()
    assert [(row.account_id, row.available, row.version) for row in result.balances] == [
        ("acct_1", 10**9 - 4_000_000, 2)
    ]
    assert await ledger_store.owner_balances("prov_1") == {PROVIDER_PENDING: 3_200_000}
    assert (await ledger_store.owner_balances("platform"))["platform:fees"] == 800_000
    assert (await ledger_store.check()).violations == []


async def test_replays_change_no_row_at_all(
    settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, database: Database, tmp_path: Path
) -> None:
    await ledger_store.credit("c1", "acct_1", 10**9, "", "test")
    batch = simple(key_ring(tmp_path), 5)
    await settle_store.settle(batch)
    tables = ["settlements", "segments", "node_counts", "transfers", "balances"]
    before = [await rows_of(database, table) for table in tables]
    for _ in range(3):
        result = await settle_store.settle(batch)
        assert list(result.repeated) == [1, 2, 3, 4, 5]
        assert result.balances == []
        assert [await rows_of(database, table) for table in tables] == before


async def test_random_batches_give_the_same_ledger_as_the_core_in_memory(
    settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, database: Database, tmp_path: Path
) -> None:
    rng = random.Random(7)
    ring = key_ring(tmp_path)
    memory = MemorySettleStore()
    for account in ("a1", "a2", "a3"):
        amount = rng.randrange(100_000, 3_000_000)
        await ledger_store.credit(f"credit {account}", account, amount, "", "test")
        memory.credit(account, amount)
    known: list[bytes] = []
    for _ in range(12):
        jobs: dict[bytes, bytes] = {}
        for _ in range(rng.randrange(1, 25)):
            again = known and rng.random() < 0.15
            job = rng.choice(known) if again else rng.randbytes(16)
            cuts = sorted({0, *(rng.randrange(1, 900) for _ in range(rng.randrange(1, 4)))})
            segments = [
                paid(start, end, fence=at + 1, provider=f"prov_{rng.randrange(3)}")
                for at, (start, end) in enumerate(itertools.pairwise(cuts))
            ]
            sealed = ticket(ring, job, account_id=rng.choice(["a1", "a2", "a3", "a4"]))
            jobs[job] = settle(sealed, outcome=rng.choice([1, 1, 1, 2, 3]), completion=cuts[-1], segments=segments)  # type: ignore[arg-type]  # an enum's number
        known += jobs
        batch = batch_of(ring, jobs)
        theirs, ours = await settle_store.settle(batch), await memory.settle(batch)
        assert sorted(theirs.repeated) == sorted(ours.repeated)
        assert {(row.account_id, row.available) for row in theirs.balances} == {
            (row.account_id, row.available) for row in ours.balances
        }
    transfers = {
        (row[0], row[1], row[2], row[3], row[4], row[5], row[6])
        for row in await database.fetch(
            "SELECT transfer_id, debit_account, debit_owner, credit_account, credit_owner, amount_nano_usd, job_id"
            " FROM metering.transfers WHERE purpose <> 'credit'"
        )
    }
    wanted = {
        (line.id, *line.debit, *line.credit, line.amount, line.job_id)
        for line in memory.ledger.transfers.values()
        if line.purpose != "credit"
    }
    assert transfers == wanted
    assert memory.violations() == []
    assert (await ledger_store.check()).violations == []
    assert memory.available("platform:insurance", "platform") < 0, "the seed makes some buyer run dry"


async def test_two_writers_settle_the_same_jobs_once(
    database: Database, postgres_dsn: str, ledger_store: PostgresLedgerStore, tmp_path: Path
) -> None:
    await ledger_store.credit("c1", "acct_1", 10**9, "", "test")
    ring = key_ring(tmp_path)
    jobs = {job: settle(ticket(ring, job)) for job in (os.urandom(16) for _ in range(60))}
    names = list(jobs)
    writers = [PostgresSettleStore(postgres_dsn) for _ in range(4)]
    fresh = 0
    try:
        for start in range(0, 60, 20):
            part = names[start : start + 20]
            orders = [random.Random(seed).sample(part, len(part)) for seed in range(4)]
            batches = [batch_of(ring, {job: jobs[job] for job in order}) for order in orders]
            results = await asyncio.gather(
                *(writer.settle(batch) for writer, batch in zip(writers, batches, strict=True))
            )
            fresh += sum(20 - len(result.repeated) for result in results)
    finally:
        for writer in writers:
            await writer.close()
    assert fresh == 60
    assert await ledger_store.owner_balances("acct_1") == {BUYER_AVAILABLE: 10**9 - 60 * 200_000}
    assert (await ledger_store.check()).violations == []


async def test_credits_and_settlements_at_once_lose_nothing_and_do_not_deadlock(
    settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, tmp_path: Path
) -> None:
    ring = key_ring(tmp_path)
    await ledger_store.credit("first", "acct_1", 10**9, "", "test")

    async def credit() -> None:
        for at in range(30):
            await ledger_store.credit(f"c{at}", f"acct_{at % 3}", 1_000, "", "test")

    async def settlements() -> None:
        for at in range(30):
            await settle_store.settle(simple(ring, 3, account_id=f"acct_{at % 3}"))

    await asyncio.gather(credit(), settlements())
    assert await ledger_store.owner_balances("acct_1") == {BUYER_AVAILABLE: 10**9 + 10_000 - 30 * 200_000}
    assert (await ledger_store.check()).violations == []


async def test_credit_that_commits_while_a_settlement_waits_for_it_is_spent(
    settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, database: Database, tmp_path: Path
) -> None:
    ring = key_ring(tmp_path)
    await ledger_store.credit("c1", "acct_1", 200_000, "", "test")
    await settle_store.settle(simple(ring, 1))
    async with database.transaction() as connection:
        line = Transfer(uuid.uuid4(), TransferKind.DIRECT, WORLD, Account(BUYER_AVAILABLE, "acct_1"), 1_000_000, "test")
        await append(connection, [line])
        waiting = asyncio.create_task(settle_store.settle(simple(ring, 4)))
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        async with asyncio.timeout(10):
            while not await database.fetchval(query):
                await asyncio.sleep(0.01)
    result = await waiting
    assert [(row.account_id, row.available) for row in result.balances] == [("acct_1", 200_000)]
    assert "platform:insurance" not in await ledger_store.owner_balances("platform")
    assert (await ledger_store.check()).violations == []


async def test_amounts_up_to_the_limits_settle_and_beyond_are_refused_alone(
    settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, database: Database, tmp_path: Path
) -> None:
    ring = key_ring(tmp_path)
    largest = {"hold_nano_usd": 10**15, "price": _price(10**12), "max_output_tokens": 2**62}
    await ledger_store.credit("c1", "acct_1", 10**15, "", "test")
    job = os.urandom(16)
    body = settle(ticket(ring, job, **largest), completion=2**62, segments=[paid(0, 2**62)])
    await settle_store.settle(batch_of(ring, {job: body}))
    assert await ledger_store.owner_balances("acct_1") == {BUYER_AVAILABLE: 0}
    await database.execute(
        "UPDATE metering.balances SET posted_nano_usd = $1 WHERE account = 'provider:pending'", INT64_MAX
    )
    with pytest.raises(StoreRefusedError, match="22003"):
        await settle_store.settle(simple(ring, 1))
    zero = simple(ring, 3, hold_nano_usd=0)
    assert (await settle_store.settle(zero)).balances == []


async def test_unprintable_text_is_refused_and_leaves_no_trace(
    settle_store: PostgresSettleStore, database: Database, tmp_path: Path
) -> None:
    ring = key_ring(tmp_path)
    job = os.urandom(16)
    batch = batch_of(ring, {job: settle(ticket(ring, job), reason="a\x00b")})
    with pytest.raises(StoreRefusedError):
        await settle_store.settle(batch)
    assert await rows_of(database, "settlements") == []
    await settle_store.suspend([Evidence(job, 0, b"evidence")], "why")
    await settle_store.suspend([Evidence(job, 0, b"evidence")], "why")
    assert len(await rows_of(database, "suspense")) == 1


async def test_stored_settlement_is_what_was_answered(settle_store: PostgresSettleStore, tmp_path: Path) -> None:
    ring = key_ring(tmp_path)
    job = os.urandom(16)
    body = settle(ticket(ring, job), segments=[paid(0, 10, 1, "p1"), paid(10, 50, 2, "p2")])
    await settle_store.settle(batch_of(ring, {job: body}))
    found = await settle_store.stored([job, os.urandom(16)])
    assert list(found) == [job]
    assert found[job].price == Price(3, 10**9, 2 * 10**9)
    assert (found[job].charge, found[job].fee, list(found[job].pays)) == (200_000, 40_000, [(1, 96_000), (2, 64_000)])


async def test_parked_receipts_wait_then_go_to_suspense_unless_the_job_settled(
    settle_store: PostgresSettleStore, database: Database, tmp_path: Path
) -> None:
    ring = key_ring(tmp_path)
    orphan, late = os.urandom(16), os.urandom(16)
    for _ in range(3):
        await settle_store.park([Evidence(orphan, FENCE, b"r"), Evidence(late, FENCE, b"r")])
    assert await settle_store.sweep_parked(600) == 0
    assert len(await rows_of(database, "parked_receipts")) == 2
    await settle_store.settle(batch_of(ring, {late: settle(ticket(ring, late))}))
    assert await settle_store.sweep_parked(-1) == 1
    assert await rows_of(database, "parked_receipts") == []
    assert [row[1:4] for row in await rows_of(database, "suspense")] == [
        (orphan, FENCE, "receipt without a delivered record")
    ]
    await settle_store.park([Evidence(orphan, FENCE, b"r")])
    assert await rows_of(database, "parked_receipts") == [], "what is in suspense is not parked again"


async def test_credit_is_idempotent_and_another_amount_under_its_id_conflicts(
    ledger_store: PostgresLedgerStore,
) -> None:
    for _ in range(3):
        row = await ledger_store.credit("c1", "acct_1", 500, "memo", "test")
        assert (row.available, row.version) == (500, 1)
    for other in (("acct_1", 501, "memo"), ("acct_2", 500, "memo"), ("acct_1", 500, "other")):
        with pytest.raises(AlreadyExists):
            await ledger_store.credit("c1", *other, "test")
    assert await ledger_store.owner_balances("acct_1") == {BUYER_AVAILABLE: 500}


async def test_same_credit_from_many_sides_at_once_credits_once(ledger_store: PostgresLedgerStore) -> None:
    rows = await asyncio.gather(*(ledger_store.credit("c1", "acct_1", 500, "", "test") for _ in range(4)))
    assert {row.available for row in rows} == {500}


async def test_prices_are_versioned_and_the_same_price_is_one_version(ledger_store: PostgresLedgerStore) -> None:
    assert await ledger_store.set_price("m", 1, 2, "test") == Price(1, 1, 2)
    assert await ledger_store.set_price("m", 1, 2, "test") == Price(1, 1, 2)
    assert await ledger_store.set_price("m", 3, 2, "test") == Price(2, 3, 2)
    assert await ledger_store.set_price("n", 0, 10**12, "test") == Price(1, 0, 10**12)
    made = await asyncio.gather(*(ledger_store.set_price("m", 4, at, "test") for at in range(4)))
    assert sorted(price.version for price in made) == [3, 4, 5, 6]
    current = max(made)
    assert await ledger_store.prices() == {"m": current, "n": Price(1, 0, 10**12)}


async def test_random_two_phase_transfers_agree_with_the_core(
    ledger_store: PostgresLedgerStore, database: Database
) -> None:
    rng = random.Random(11)
    core = Ledger()
    accounts = [WORLD, BUYER, Account(BUYER_LEASED, "b1"), PROVIDER]
    pendings: list[Transfer] = []
    taken = refused = 0
    for _ in range(150):
        if pendings and rng.random() < 0.4:
            held = rng.choice(pendings)
            amount = rng.choice([0, 1, held.amount // 2, held.amount, held.amount + 1])
            kind = TransferKind.POST if amount else TransferKind.VOID
            line = Transfer(uuid.UUID(int=rng.getrandbits(128)), kind, held.debit, held.credit, amount, "test", held.id)
        else:
            debit, credit = rng.sample(accounts, 2)
            kind = rng.choice([TransferKind.DIRECT, TransferKind.PENDING])
            line = Transfer(uuid.UUID(int=rng.getrandbits(128)), kind, debit, credit, rng.randrange(1, 100), "test")
        try:
            core.apply(line)
        except LedgerError:
            refused += 1
            with pytest.raises(StoreRefusedError):
                await ledger_store.apply([line])
        else:
            taken += 1
            await ledger_store.apply([line])
            await ledger_store.apply([line])
            if kind is TransferKind.PENDING:
                pendings.append(line)
    assert taken > 30
    assert refused > 30
    stored = {
        Account(row[0], row[1]): (row[2], row[3])
        for row in await database.fetch(
            "SELECT account, owner_id, posted_nano_usd, reserved_nano_usd FROM metering.balances"
        )
    }
    wanted = {account: (balance.posted, balance.reserved) for account, balance in core.balances.items()}
    assert {account: value for account, value in stored.items() if value != (0, 0)} == {
        account: value for account, value in wanted.items() if value != (0, 0)
    }
    assert (await ledger_store.check()).violations == []


@pytest.mark.parametrize("table", ["transfers", "settlements", "segments", "node_counts", "credits", "prices"])
async def test_history_cannot_be_edited(
    table: str, database: Database, settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, tmp_path: Path
) -> None:
    await ledger_store.credit("c1", "acct_1", 500, "", "test")
    await ledger_store.set_price("m", 1, 2, "test")
    await settle_store.settle(simple(key_ring(tmp_path), 1))
    column = (await database.fetchrow(f"SELECT * FROM {table} LIMIT 1")).keys()  # type: ignore[union-attr]  # there is a row
    first = next(iter(column))
    for statement in (f"UPDATE {table} SET {first} = {first}", f"DELETE FROM {table}", f"TRUNCATE {table} CASCADE"):
        with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
            await database.execute(statement)


async def test_checker_finds_each_kind_of_damage(
    database: Database, settle_store: PostgresSettleStore, ledger_store: PostgresLedgerStore, tmp_path: Path
) -> None:
    await ledger_store.credit("c1", "acct_1", 10**9, "", "test")
    await settle_store.settle(simple(key_ring(tmp_path), 3))
    assert (await ledger_store.check()).violations == []
    # Somebody with the rights of the owner, who switches the guards off first.
    await database.execute(
        "ALTER TABLE balances DROP CONSTRAINT never_negative; ALTER TABLE segments DISABLE TRIGGER append_only;"
        "ALTER TABLE transfers DISABLE TRIGGER append_only;"
        "UPDATE balances SET posted_nano_usd = -7 WHERE account = 'buyer:available';"
        "UPDATE segments SET start_token = 5 WHERE job_id = (SELECT job_id FROM segments LIMIT 1);"
        "DELETE FROM transfers WHERE transfer_id = (SELECT transfer_id FROM transfers WHERE purpose = 'settle.pay' LIMIT 1)"
    )
    found = (await ledger_store.check()).violations
    assert {sentence[:2] for sentence in found} == {"I1", "I2", "I4", "I5", "I7"}
    assert all(sentence.endswith(".") for sentence in found)
    assert {sentence[:2] for sentence in await quick_check(database)} == {"I1", "I2"}


def _price(per_mtok: int) -> object:
    from gpumesh.common.v1.job_pb2 import Price as WirePrice  # noqa: PLC0415 -- two Prices in one module confuse

    return WirePrice(version=1, input_nano_usd_per_mtok=per_mtok, output_nano_usd_per_mtok=per_mtok)
