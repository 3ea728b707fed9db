"""Metering's composition root: settings, database, writer, listener, run. `check` verifies the ledger and exits."""

import argparse
import asyncio
import sys
from typing import Final, NoReturn

from gpumesh.metering.v1.balance_service_pb2_grpc import add_BalanceServiceServicer_to_server
from gpumesh.metering.v1.ledger_service_pb2_grpc import add_LedgerServiceServicer_to_server
from gpumesh.metering.v1.settlement_service_pb2_grpc import add_SettlementServiceServicer_to_server
from gpumesh_metering.balances import BalanceHub, watch_prices
from gpumesh_metering.config import MeteringSettings
from gpumesh_metering.intake import Intake
from gpumesh_metering.postgres import PostgresLedgerStore
from gpumesh_metering.postgres_settle import PostgresSettleStore
from gpumesh_metering.servicer import BalanceServicer, LedgerServicer, SettlementServicer
from gpumesh_metering.settlements import SettlementReceiver
from gpumesh_metering.start import prepare, sweep_parked, watch_ledger
from gpumesh_metering.writer import GroupCommitWriter
from gpumesh_runtime.clock import SystemClock
from gpumesh_runtime.database import Database
from gpumesh_runtime.errors import MeshError
from gpumesh_runtime.lifecycle import EXIT_UNAVAILABLE, Life, StartError, run
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.sealing import KeyRing, KeyRingError

SCHEMA: Final = "metering"
_PRICES_S: Final = 5.0
_SWEEP_S: Final = 15.0
_CHECK_S: Final = 60.0


async def serve(life: Life, settings: MeteringSettings) -> None:
    """The service, from start to drain."""
    dsn = settings.database_url.get_secret_value()
    try:
        key_ring = KeyRing(settings.key_ring)
    except KeyRingError as err:
        raise StartError(str(err)) from err
    tls = settings.tls()
    database = Database(dsn, SCHEMA, max_connections=4)
    await prepare(database, SCHEMA, settings.database_wait_s)

    ledger_store, settle_store = PostgresLedgerStore(database), PostgresSettleStore(dsn)
    hub = BalanceHub(ledger_store, life.spawn)
    hub.set_prices(await ledger_store.prices())
    writer = GroupCommitWriter(settle_store, Intake(key_ring.check, settings.share_bp), SystemClock(), hub.changed)
    settlement = SettlementServicer(SettlementReceiver(writer), settings.instance)
    balance = BalanceServicer(hub, settings.instance)

    server = Server("metering", settings.address, tls, development=settings.development)
    server.add(settlement, add_SettlementServiceServicer_to_server)
    server.add(balance, add_BalanceServiceServicer_to_server)
    server.add(LedgerServicer(ledger_store, hub), add_LedgerServiceServicer_to_server)
    await server.start()
    writing = life.spawn(writer.run(), "writer")
    life.spawn(watch_prices(ledger_store, hub, _PRICES_S), "prices")
    life.spawn(sweep_parked(settle_store, settings.park_s, _SWEEP_S), "parked receipts")
    life.spawn(watch_ledger(database, _CHECK_S), "ledger check")
    life.ready(address=settings.address, port=server.port)

    await life.until_stopped()
    # Schedulers are told first, then what they sent is written and answered, then the links close.
    settlement.links.goodbye()
    balance.links.goodbye()
    writer.stop()
    await asyncio.wait([writing], timeout=settings.drain_s / 2)
    await asyncio.gather(settlement.links.close(), balance.links.close())
    await server.stop(1.0)
    await settle_store.close()
    await database.close()


async def check(settings: MeteringSettings) -> int:
    """Verifies the ledger; 1 when an invariant fails, with a sentence each."""
    database = Database(settings.database_url.get_secret_value(), SCHEMA, max_connections=1, command_timeout_s=300)
    try:
        result = await PostgresLedgerStore(database).check()
    finally:
        await database.close()
    for sentence in result.violations:
        sys.stdout.write(f"{sentence}\n")
    verdict = "broken" if result.violations else "sound"
    sys.stdout.write(f"{verdict}: {result.transfers} transfers, {result.settlements} settlements\n")
    return 1 if result.violations else 0


def main(argv: list[str] | None = None) -> NoReturn:
    """`gpumesh-metering` serves, `gpumesh-metering check` verifies the ledger (exit code 1 when it is broken, 69
    without database).
    """
    parser = argparse.ArgumentParser(
        prog="gpumesh-metering", description="The mesh's ledger. Settings: GPUMESH_METERING_*."
    )
    parser.add_argument("command", nargs="?", choices=["serve", "check"], default="serve")
    command = parser.parse_args(argv).command
    settings = MeteringSettings.load()
    if command == "check":
        sys.exit(_exit_of_check(settings))
    run(lambda life: serve(life, settings), settings, "metering")


def _exit_of_check(settings: MeteringSettings) -> int:
    try:
        return asyncio.run(check(settings))
    except MeshError as err:
        sys.stderr.write(f"metering: {err.message}\n")
        return EXIT_UNAVAILABLE


if __name__ == "__main__":
    main()
