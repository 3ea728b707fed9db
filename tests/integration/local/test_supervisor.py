"""The supervisor with real child processes."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh_local.errors import LocalError
from gpumesh_local.home import Home
from gpumesh_local.plan import Process
from gpumesh_local.supervisor import ROTATE_BYTES, Supervisor
from tests.support.mesh import until

# Becomes ready, then runs until SIGTERM; says in a file in which order it ended.
SERVICE = """
import pathlib, signal, sys, time
name, home = sys.argv[1], pathlib.Path(sys.argv[2])
def end(*_):
    with (home / "ended").open("a") as file:
        file.write(name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
(home / "run" / (name + ".ready")).write_text("")
while True:
    time.sleep(60)
"""
STUBBORN = SERVICE.replace("def end(*_):", "def end(*_):\n    return")
BROKEN = "import sys; print('the answer is 42', flush=True); sys.exit(3)"
FULL = "print('OSError: [Errno 28] No space left on device', flush=True); raise SystemExit(1)"


class Lines:
    """A report that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def step(self, text: str) -> None:
        """Not looked at."""

    def note(self, text: str) -> None:
        """Kept."""
        self.notes.append(text)

    def ready(self, text: str, client: object) -> None:
        """Not looked at."""

    def failed(self, text: str, exit_code: int) -> None:
        """Not looked at."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path)
    made.create()
    return made


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
async def supervisor(home: Home, lines: Lines) -> AsyncIterator[Supervisor]:
    made = Supervisor(home, lines)
    yield made
    hurry = asyncio.Event()
    hurry.set()
    await made.stop(hurry)


def process(home: Home, name: str, code: str = SERVICE, grace_s: float = 10.0) -> Process:
    return Process(name, name, [sys.executable, "-c", code, name, str(home.path)], dict(os.environ), grace_s)


async def replaced(home: Home, name: str, pid: int) -> int:
    await until(lambda: home.read_pid(name) not in (0, pid) and home.ready(name).exists())
    return home.read_pid(name)


async def test_a_process_that_dies_is_started_again_and_one_line_says_so(
    home: Home, lines: Lines, supervisor: Supervisor
) -> None:
    await supervisor.start(process(home, "router"))
    await supervisor.until_ready("router", 10)
    first = home.read_pid("router")
    os.kill(first, signal.SIGKILL)
    await replaced(home, "router", first)
    assert lines.notes == ["router ended unexpectedly (killed by SIGKILL); starting it again in 0.2 s"]
    assert not supervisor.failed.done()


async def test_a_process_that_cannot_start_fails_with_the_tail_of_its_log(home: Home, supervisor: Supervisor) -> None:
    await supervisor.start(process(home, "router", BROKEN))
    with pytest.raises(LocalError, match=r"router could not start \(exit code 3\)[\s\S]*the answer is 42"):
        await supervisor.until_ready("router", 10)


async def test_a_full_disk_in_a_log_is_said_first(home: Home, supervisor: Supervisor) -> None:
    await supervisor.start(process(home, "metering", FULL))
    with pytest.raises(LocalError, match=r"metering could not start[^\n]*\nThe disk of .* is full"):
        await supervisor.until_ready("metering", 10)


async def test_a_process_that_keeps_dying_ends_everything(home: Home, lines: Lines, supervisor: Supervisor) -> None:
    await supervisor.start(process(home, "router"))
    await supervisor.until_ready("router", 10)
    pid = home.read_pid("router")
    for death in range(5):
        os.kill(pid, signal.SIGKILL)
        if death < 4:
            pid = await replaced(home, "router", pid)
    error = await asyncio.wait_for(asyncio.shield(supervisor.failed), 10)
    assert str(error).startswith("router died 5 times within 30 s (last: killed by SIGKILL).")
    assert len(lines.notes) == 4


async def test_processes_end_in_order_and_leave_no_pid_files(home: Home, supervisor: Supervisor) -> None:
    names = ["registry", "node", "edge-http", "metering", "scheduler", "router"]
    for name in names:
        await supervisor.start(process(home, name))
    for name in names:
        await supervisor.until_ready(name, 10)
    pids = [home.read_pid(name) for name in names]
    await supervisor.stop(asyncio.Event())
    ended = (home.path / "ended").read_text().split()
    assert ended == ["edge-http", "router", "scheduler", "node", "metering", "registry"]
    assert not list(home.pids.iterdir())
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_process_that_does_not_end_is_killed_after_its_time(
    home: Home, lines: Lines, supervisor: Supervisor
) -> None:
    await supervisor.start(process(home, "router", STUBBORN, grace_s=0.1))
    await supervisor.until_ready("router", 10)
    await supervisor.stop(asyncio.Event())
    assert lines.notes == ["router did not end within 0.1 s and was killed"]


async def test_a_log_that_grew_large_is_put_aside_while_its_process_goes_on_writing(
    home: Home, supervisor: Supervisor
) -> None:
    writer = SERVICE.replace(
        "while True:\n    time.sleep(60)", "while True:\n    print('line', flush=True)\n    time.sleep(0.01)"
    )
    await supervisor.start(process(home, "router", writer))
    await supervisor.until_ready("router", 10)
    with home.log("router").open("ab") as log:
        log.truncate(ROTATE_BYTES + 1)  # sparse: takes no disk
    keeping = asyncio.create_task(supervisor.keep_logs_small())
    await until(lambda: home.log("router").with_suffix(".log.1").exists())
    await until(lambda: 0 < home.log("router").stat().st_size < 10_000)
    keeping.cancel()
    assert home.log("router").read_text().startswith("line\n")
