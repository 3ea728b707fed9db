"""`make up` as a person and a script meet it: ready, used, broken, ended. The mesh runs mock-model, which starts fastest."""

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.mesh import Mesh, until
from tests.support.ports import free_port_block

SERVICES = ["edge-http", "router", "scheduler", "node", "metering", "registry", "postgres"]


@pytest.fixture
def bare() -> Iterator[Mesh]:
    """A mesh that was never started, in a folder of its own; ended at the end whatever the test did."""
    mesh = Mesh(Path(tempfile.mkdtemp(prefix="gpumesh-up-")), free_port_block(48))
    try:
        yield mesh
    finally:
        mesh.stop()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One mesh for the tests that leave it running."""
    made = Mesh.start("--engine", "mock")
    try:
        yield made
    finally:
        made.stop()


def alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_the_mesh_answers_once_up_has_returned(mesh: Mesh, http: aiohttp.ClientSession) -> None:
    status, body = await mesh.chat(http)
    assert status == 200
    assert body["choices"][0]["message"]["content"]


def test_client_json_holds_what_a_program_needs_and_is_private(mesh: Mesh) -> None:
    path = mesh.home / "client.json"
    assert set(mesh.client) == {"base_url", "api_key", "model", "grpc_target", "ca_file"}
    assert mesh.client["base_url"] == f"http://127.0.0.1:{mesh.port}/v1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Path(mesh.client["ca_file"]).read_text().startswith("-----BEGIN CERTIFICATE-----")


def test_a_second_up_says_that_it_runs_already(mesh: Mesh) -> None:
    for arguments in (["up"], ["up", "--detach"]):
        done = mesh.local(*arguments)
        assert done.returncode == 0
        assert "runs already" in done.stdout
        assert mesh.client["api_key"] in done.stdout


@pytest.mark.parametrize("name", SERVICES)
async def test_a_service_that_is_killed_comes_back_and_the_mesh_answers(
    mesh: Mesh, http: aiohttp.ClientSession, name: str
) -> None:
    old = mesh.kill(name)
    await mesh.restarted(name, old)

    async def answered() -> bool:
        try:
            return (await mesh.chat(http))[0] == 200
        except aiohttp.ClientError:
            return False

    async with asyncio.timeout(40):
        while not await answered():
            await asyncio.sleep(0.1)
    log = (mesh.home / "logs" / "launcher.log").read_text()
    assert f"{name} ended unexpectedly (killed by SIGKILL); starting it again" in log


def test_down_leaves_nothing_running_and_the_next_up_finds_the_data(bare: Mesh) -> None:
    bare.up("--engine", "mock")
    key = bare.client["api_key"]
    assert bare.cli("account", "create", "Ann", "--id", "acct_ann").returncode == 0
    pids = [bare.pid(name) for name in [*SERVICES, "launcher"]]
    done = bare.local("down")
    assert (done.returncode, "stopped" in done.stdout) == (0, True)
    assert not [pid for pid in pids if alive(pid)]
    assert not list((bare.home / "pids").iterdir())
    bare.up("--engine", "mock")
    assert bare.client["api_key"] == key
    accounts = json.loads(bare.cli("account", "list", "--json").stdout)
    assert {account["account_id"] for account in accounts} == {"acct_local", "acct_ann"}
    balances = json.loads(bare.cli("balance", "acct_local", "--json").stdout)
    (available,) = [row["balance_nano_usd"] for row in balances if row["ledger_account"] == "buyer:available"]
    assert 9_990_000_000 < available < 10_000_000_000  # credited once; each start asks for one short completion


def test_down_with_nothing_running_is_not_an_error(bare: Mesh) -> None:
    done = bare.local("down")
    assert (done.returncode, "nothing runs" in done.stdout) == (0, True)


async def test_what_a_killed_launcher_left_is_ended_by_the_next_up_or_down(bare: Mesh) -> None:
    await asyncio.to_thread(bare.up, "--engine", "mock")
    pids = [bare.pid(name) for name in SERVICES]
    launcher = bare.kill("launcher")
    await until(lambda: not alive(launcher))
    assert alive(pids[0])
    done = bare.local("down")
    assert (done.returncode, "edge-http" in done.stdout) == (0, True)
    assert not [pid for pid in pids if alive(pid)]


def test_a_busy_port_is_named_and_nothing_is_left(bare: Mesh) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", bare.port + 3))
        listener.listen()
        done = bare.local("up", "--detach", "--engine", "mock")
    assert done.returncode == 1
    assert f"Port {bare.port + 3} (for the registry) is taken" in done.stderr
    assert not list((bare.home / "pids").iterdir())


def test_a_service_that_cannot_start_gives_one_message_with_its_log(bare: Mesh) -> None:
    bare.env["GPUMESH_ROUTER_SUBMIT_S"] = "soon"
    done = bare.local("up", "--detach", "--engine", "mock")
    assert done.returncode == 1
    assert "router could not start (exit code 78)" in done.stderr
    assert "GPUMESH_ROUTER_SUBMIT_S" in done.stderr
    assert not list((bare.home / "pids").iterdir())


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_gives_one_message(bare: Mesh) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", bare.home], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this container may not mount a small disk")
    try:
        done = bare.local("up", "--detach", "--engine", "mock")
        assert done.returncode == 1
        assert "The disk of" in done.stderr
        assert "is full" in done.stderr
    finally:
        subprocess.run(["umount", "-l", bare.home], check=False)


async def test_ctrl_c_in_the_foreground_drains_and_exits_with_0(bare: Mesh) -> None:
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).parent / "gpumesh-local"),
        *("up", "--engine", "mock"),
        env=bare.env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(60):
        while "Ctrl-C" not in said:
            line = await process.stdout.readline()
            assert line, said
            said += line.decode()
    assert (bare.home / "client.json").exists()
    process.send_signal(signal.SIGINT)
    rest, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert "stopped; the data stays in" in rest.decode()
    assert not list((bare.home / "pids").iterdir())
