"""Stores and a whole metering on a real PostgreSQL."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh_metering.postgres import PostgresLedgerStore
from gpumesh_metering.postgres_settle import PostgresSettleStore
from gpumesh_runtime.database import Database, migrate
from tests.support.metering import RunningMetering, running_metering


@pytest.fixture
async def database(postgres_dsn: str) -> AsyncIterator[Database]:
    """A migrated database of the test's own."""
    made = Database(postgres_dsn, "metering", max_connections=4)
    await migrate(made, "metering", "gpumesh_metering.migrations")
    yield made
    await made.close()


@pytest.fixture
def ledger_store(database: Database) -> PostgresLedgerStore:
    """The operators' store."""
    return PostgresLedgerStore(database)


@pytest.fixture
async def settle_store(database: Database, postgres_dsn: str) -> AsyncIterator[PostgresSettleStore]:
    """The writer's store."""
    made = PostgresSettleStore(postgres_dsn)
    yield made
    await made.close()


@pytest.fixture
async def metering(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[RunningMetering]:
    """A whole metering, over mTLS."""
    async with running_metering(postgres_dsn, tmp_path) as running:
        yield running
