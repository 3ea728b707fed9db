"""Pool, transactions and migrations on a real PostgreSQL."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from gpumesh_runtime.database import Database, MigrationError, migrate, read_migrations
from gpumesh_runtime.errors import Reason, Unavailable
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.postgres


@pytest.fixture
async def database(postgres_dsn: str) -> AsyncIterator[Database]:
    made = Database(postgres_dsn, "shop")
    yield made
    await made.close()


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    (tmp_path / "0001_start.sql").write_text(
        "create table item (id int primary key, name text);\ninsert into item values (1, 'a');"
    )
    (tmp_path / "0002_more.sql").write_text("alter table item add column price bigint not null default 0;")
    return tmp_path


async def test_migrations_run_once_in_order_and_in_the_service_schema(database: Database, migrations: Path) -> None:
    assert await migrate(database, "shop", migrations) == 2
    assert await migrate(database, "shop", migrations) == 0
    row = await database.fetchrow("select name, price from shop.item")
    assert row is not None
    assert dict(row) == {"name": "a", "price": 0}
    assert await database.fetchval("select count(*) from item") == 1  # the search path of the pool is the schema


async def test_replicas_that_start_together_migrate_once(postgres_dsn: str, migrations: Path) -> None:
    replicas = [Database(postgres_dsn, "shop") for _ in range(4)]
    ran = await asyncio.gather(*(migrate(replica, "shop", migrations) for replica in replicas))
    assert sorted(ran) == [0, 0, 0, 2]
    for replica in replicas:
        await replica.close()


async def test_a_migration_that_was_edited_after_it_ran_is_refused(database: Database, migrations: Path) -> None:
    await migrate(database, "shop", migrations)
    (migrations / "0001_start.sql").write_text("create table item (id bigint);")
    with pytest.raises(MigrationError, match="0001_start was changed"):
        await migrate(database, "shop", migrations)


async def test_a_migration_that_fails_leaves_nothing_behind_and_can_be_mended(
    database: Database, migrations: Path
) -> None:
    (migrations / "0002_more.sql").write_text("create table half (id int); select 1/0;")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(database, "shop", migrations)
    assert await database.fetchval("select to_regclass('shop.half')") is None
    (migrations / "0002_more.sql").write_text("create table whole (id int);")
    assert await migrate(database, "shop", migrations) == 1


async def test_migrations_of_a_newer_version_are_left_alone(database: Database, migrations: Path) -> None:
    await migrate(database, "shop", migrations)
    (migrations / "0002_more.sql").unlink()
    assert await migrate(database, "shop", migrations) == 0


def test_gaps_in_the_numbers_are_refused(migrations: Path) -> None:
    (migrations / "0004_gap.sql").write_text("select 1")
    with pytest.raises(MigrationError, match="without gaps"):
        read_migrations(migrations)


async def test_a_transaction_that_raises_is_rolled_back(database: Database, migrations: Path) -> None:
    await migrate(database, "shop", migrations)

    async def half_done() -> None:
        async with database.transaction() as connection:
            await connection.execute("insert into item values (2, 'b')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await half_done()
    assert await database.fetchval("select count(*) from item") == 1


async def test_errors_of_the_statement_itself_pass_unchanged(database: Database) -> None:
    with pytest.raises(asyncpg.UndefinedTableError):
        await database.fetch("select * from nowhere")


async def test_a_database_that_is_away_is_unavailable_and_found_again_when_it_returns() -> None:
    server = await asyncio.to_thread(PostgresServer(durable=True).start)
    database = Database(server.dsn("postgres"))
    try:
        await database.wait_ready(5)
        await asyncio.to_thread(server.stop, signal.SIGKILL)
        with pytest.raises(Unavailable) as caught:
            await database.fetchval("select 1")
        assert caught.value.reason is Reason.DATABASE_UNAVAILABLE
        assert caught.value.retryable
        with pytest.raises(Unavailable):
            await database.wait_ready(0.3)
        starting = asyncio.create_task(asyncio.to_thread(server.start))
        await database.wait_ready(20)
        await starting
        assert await database.fetchval("select 1") == 1
    finally:
        await database.close()
        await asyncio.to_thread(server.remove)
