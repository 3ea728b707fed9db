"""What happens around serving: waiting for the database, migrations, the sweep of parked receipts, the minute's check."""

import asyncio

from gpumesh_metering.checks import quick_check
from gpumesh_metering.store import SettleStore, StoreRefusedError
from gpumesh_runtime.database import Database, MigrationError, migrate
from gpumesh_runtime.errors import Unavailable
from gpumesh_runtime.lifecycle import StartError
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.metrics import counter, gauge

log = get_logger("gpumesh.metering.start")
_SWEPT = counter("gpumesh_metering_suspended_receipts_total", "Parked receipts that went into suspense").cell
_VIOLATIONS = gauge(
    "gpumesh_metering_ledger_violations", "Invariants I1 and I2 that failed at the last check; alarm above 0"
).cell
_LOOK_S = 5.0  # how often the wait for PostgreSQL says that it still waits


async def prepare(database: Database, schema: str, wait_s: float) -> None:
    """Waits for PostgreSQL and brings the schema up to date. Raises StartError with one sentence for the operator."""
    loop = asyncio.get_running_loop()
    end = loop.time() + wait_s
    while True:
        try:
            await database.wait_ready(min(_LOOK_S, max(0.0, end - loop.time())))
            await migrate(database, schema, "gpumesh_metering.migrations")
        except Unavailable as err:
            cause = err.__cause__ or err
            if loop.time() >= end:
                raise StartError(f"PostgreSQL did not answer within {wait_s:g} s: {cause}") from err
            log.warning("waiting for PostgreSQL", cause=f"{type(cause).__name__}: {cause}"[:200])
        except MigrationError as err:
            raise StartError(str(err)) from err
        else:
            return


async def sweep_parked(store: SettleStore, park_s: float, every_s: float) -> None:
    """Moves receipts that waited too long into suspense. Runs until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        try:
            moved = await store.sweep_parked(park_s)
        except (Unavailable, StoreRefusedError) as err:
            log.warning("cannot sweep parked receipts", cause=type(err).__name__)
            continue
        if moved:
            _SWEPT.value += moved
            log.warning("receipts went into suspense", count=moved)


async def watch_ledger(database: Database, every_s: float) -> None:
    """Checks I1 and I2 now and then; a violation is an error in the log and in the metric. Runs until cancelled."""
    while True:
        await asyncio.sleep(every_s)
        try:
            found = await quick_check(database)
        except Unavailable:
            continue  # the writer says that the database is away
        _VIOLATIONS.value = len(found)
        for sentence in found:
            log.error("the ledger is broken", cause=sentence)
