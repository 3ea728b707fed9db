"""The metering process as an operator runs it: `python -m gpumesh_metering [check]`."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from gpumesh.metering.v1.ledger_service_pb2 import CreditRequest
from gpumesh.metering.v1.ledger_service_pb2_grpc import LedgerServiceStub
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.database import Database
from gpumesh_runtime.identity import operator_uri, service_uri
from gpumesh_runtime.rpc.client import channel
from tests.support.metering import key_ring

pytestmark = pytest.mark.postgres


def environment(folder: Path, dsn: str, **more: str) -> dict[str, str]:
    ca = FileCa.load_or_create(folder / "ca")
    identity = ca.issue_files("metering", service_uri("metering"))
    settings = {
        "DATABASE_URL": dsn,
        "ADDRESS": "127.0.0.1:0",
        "KEY_RING": str(key_ring(folder).path),
        "TLS_CERT": str(identity.cert_file),
        "TLS_KEY": str(identity.key_file),
        "TLS_CA": str(identity.ca_file),
        "READY_FILE": str(folder / "ready"),
        **more,
    }
    return {**os.environ, **{f"GPUMESH_METERING_{name}": value for name, value in settings.items()}}


async def start(env: dict[str, str], *arguments: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gpumesh_metering", *arguments, env=env, stdout=pipe, stderr=pipe
    )


async def finish(process: asyncio.subprocess.Process) -> tuple[int, str]:
    """Exit code and everything that it said."""
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode() + err.decode()


async def test_process_serves_drains_on_sigterm_and_its_ledger_checks_out(postgres_dsn: str, tmp_path: Path) -> None:
    env = environment(tmp_path, postgres_dsn)
    process = await start(env)
    async with asyncio.timeout(60):
        while not (tmp_path / "ready").exists():
            assert process.returncode is None
            await asyncio.sleep(0.02)
    port = json.loads((tmp_path / "ready").read_text())["port"]
    operator = FileCa(tmp_path / "ca").issue_files("operator", operator_uri("test"))
    async with channel(f"localhost:{port}", operator) as made:
        request = CreditRequest(account_id="a", amount_nano_usd=7, credit_id="c")
        assert (await LedgerServiceStub(made).Credit(request, timeout=20)).balance.available_nano_usd == 7
    process.send_signal(signal.SIGTERM)
    code, said = await finish(process)
    assert code == 0, said
    assert await finish(await start(env, "check")) == (0, "sound: 1 transfers, 0 settlements\n")
    database = Database(postgres_dsn, "metering")
    await database.execute("UPDATE metering.balances SET posted_nano_usd = 8 WHERE account = 'buyer:available'")
    await database.close()
    code, said = await finish(await start(env, "check"))
    assert code == 1
    assert "I1: all balances sum to 1 nano-USD instead of 0." in said
    assert "I7: buyer:available of a shows 8 posted" in said
    assert said.endswith("broken: 1 transfers, 0 settlements\n")


async def test_process_without_a_database_says_so_and_gives_up_in_time(tmp_path: Path) -> None:
    dsn = f"postgresql://postgres@/nothing?host={tmp_path}"
    env = environment(tmp_path, dsn, DATABASE_WAIT_S="0.5")
    serve, check = await start(env), await start(env, "check")
    code, said = await finish(serve)
    assert code == 69, said
    assert "PostgreSQL did not answer within 0.5 s" in said
    code, said = await finish(check)
    assert code == 69
    assert "metering: The database cannot be reached now." in said


async def test_wrong_settings_end_the_process_with_one_line_each(postgres_dsn: str, tmp_path: Path) -> None:
    env = environment(tmp_path, postgres_dsn, PROVIDER_SHARE_PERCENT="101", DATABASE_ULR="x")
    code, said = await finish(await start(env))
    assert code == 78
    assert "GPUMESH_METERING_PROVIDER_SHARE_PERCENT: " in said
    assert (
        "GPUMESH_METERING_DATABASE_ULR: is not a setting of this process; did you mean GPUMESH_METERING_DATABASE_URL?"
        in said
    )
    assert postgres_dsn not in said


async def test_missing_key_ring_is_named(postgres_dsn: str, tmp_path: Path) -> None:
    env = environment(tmp_path, postgres_dsn, KEY_RING=str(tmp_path / "absent.json"))
    code, said = await finish(await start(env))
    assert code == 69
    assert "absent.json" in said
