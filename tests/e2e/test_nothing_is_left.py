"""`up` is ready within a minute and `down` lets answers finish, then leaves no process, no port and no engine behind."""

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.support.mesh import Mesh, text_of, until
from tests.support.ports import free_port_block

MARK = "GPUMESHTESTMARK"  # not one of our own settings: every process inherits it, engines too
PORTS = 48


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """A mesh that is not up yet, whose processes can be told by their environment."""
    made = Mesh(Path(tempfile.mkdtemp(prefix="gpumesh-down-")), free_port_block(PORTS))
    made.env[MARK] = str(made.home)
    try:
        yield made
    finally:
        made.stop()


def processes(mesh: Mesh) -> dict[int, str]:
    """Live processes that the mesh's launcher or its children began, PostgreSQL's by their folder: pid to command line."""
    mark = f"{MARK}={mesh.home}".encode()
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            ours = mark in (folder / "environ").read_bytes().split(b"\0")
            if ours or (folder / "cwd").readlink().is_relative_to(mesh.home):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it ended, or is not ours to read
            continue
    return found


def listening(mesh: Mesh) -> set[int]:
    """Ports of the mesh on which somebody listens."""
    found = set()
    for port in range(mesh.port, mesh.port + PORTS):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                found.add(port)
    return found


def engines(mesh: Mesh) -> set[int]:
    """Processes of llama.cpp: children of the node."""
    node = mesh.pid("node")
    return {pid for pid in processes(mesh) if parent(pid) == node}


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read the environment of a node, which forbids core dumps")
async def test_up_is_ready_in_a_minute_and_down_finishes_answers_and_leaves_nothing(
    mesh: Mesh, http: aiohttp.ClientSession
) -> None:
    began = time.monotonic()
    await asyncio.to_thread(mesh.up)
    assert time.monotonic() - began < 60
    assert len(processes(mesh)) >= 12  # the launcher, five services, the node, its engine, PostgreSQL and its helpers
    assert len(listening(mesh)) >= 8

    # A node that dies takes its engine along.
    old = engines(mesh)
    assert old
    dead = mesh.kill("node")
    await until(lambda: not old & processes(mesh).keys())
    await mesh.restarted("node", dead)
    async with asyncio.timeout(30):
        while (await mesh.chat(http, max_tokens=5))[0] != 200:
            await asyncio.sleep(0.1)

    # An answer that runs when `down` is asked for is finished and paid for.
    story = mesh.stream(http, "Tell me a long story", max_tokens=1500, ignore_eos=True)
    chunks = [await anext(story)]
    ending = asyncio.create_task(asyncio.to_thread(mesh.local, "down"))
    chunks += [chunk async for chunk in story]
    done = await ending
    assert done.returncode == 0, done.stderr
    assert chunks[-1] == "[DONE]", chunks[-1]
    assert len(text_of(chunks)) > 1000

    assert processes(mesh) == {}
    assert listening(mesh) == set()
    assert not list((mesh.home / "pids").iterdir())

    # And the books are closed: the answer is there after the next start.
    await asyncio.to_thread(mesh.up)
    rows = await mesh.settlements()
    assert [row["completion_tokens"] for row in rows].count(1500) == 1
