"""Whole processes: how they start, drain and die, by their exit codes and their words."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gpumesh_runtime.identity import service_uri
from tests.support.certificates import Certificates

FILES = {"cert": "router.crt", "key": "router.key", "ca": "ca.crt"}


class Probe:
    """One run of tests.support.lifecycle_process."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.process = process
        self.ready_file = folder / "ready"

    async def ready(self) -> dict[str, Any]:
        """What the ready file says, once it is there."""
        async with asyncio.timeout(20):
            while not self.ready_file.exists():
                if self.process.returncode is not None:
                    raise AssertionError(f"ended before it was ready: {(await self.words())[-2000:]}")
                await asyncio.sleep(0.01)
        found: dict[str, Any] = json.loads(self.ready_file.read_text())
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """Exit code and stderr."""
        async with asyncio.timeout(20):
            words = await self.words()
            return await self.process.wait(), words

    async def words(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()

    @property
    def drained(self) -> bool:
        return (self.folder / "trace").exists()


class Starter:
    """Starts probes and kills what is left at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[Probe] = []

    async def __call__(self, what: str, **env: str) -> Probe:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GPUMESH_")}
        environment |= {
            "PROBE_TRACE": str(self.folder / "trace"),
            "GPUMESH_PROBE_READY_FILE": str(self.folder / "ready"),
        }
        environment |= {"GPUMESH_PROBE_LOG_FORMAT": "json", **env}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.lifecycle_process",
            what,
            env=environment,
            stderr=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        probe = Probe(self.folder, process)
        self.started.append(probe)
        return probe


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Starter]:
    made = Starter(tmp_path)
    yield made
    for probe in made.started:
        if probe.process.returncode is None:
            probe.process.kill()
            await probe.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_ends_with_0(start: Starter, number: signal.Signals) -> None:
    probe = await start("plain")
    assert (await probe.ready())["pid"] == probe.process.pid
    probe.signal(number)
    code, words = await probe.end()
    assert code == 0
    assert probe.drained
    assert not probe.ready_file.exists()
    events = [json.loads(line)["event"] for line in words.splitlines()]
    assert events == ["ready", "draining", "stopped"]


async def test_a_second_signal_ends_at_once(start: Starter) -> None:
    probe = await start("slow")
    await probe.ready()
    probe.signal(signal.SIGTERM)
    assert probe.process.stderr is not None
    while b"draining" not in (line := await asyncio.wait_for(probe.process.stderr.readline(), 10)):
        assert line
    probe.signal(signal.SIGTERM)
    code, _ = await probe.end()
    assert code == 128 + signal.SIGTERM
    assert not probe.ready_file.exists()


@pytest.mark.parametrize("what", ["spawned", "bug"])
async def test_an_error_that_nobody_handles_is_a_loud_death(start: Starter, what: str) -> None:
    code, words = await (await start(what)).end()
    assert code == 1
    lines = [json.loads(line) for line in words.splitlines()]
    errors = [line for line in lines if line["level"] == "error"]
    assert len(errors) == 1
    assert errors[0]["error_type"] == "ValueError"
    assert "lifecycle_process.py" in errors[0]["traceback"]
    assert "the prompt" not in words


async def test_a_task_of_ours_that_dies_unwatched_is_a_loud_death_too(start: Starter) -> None:
    code, words = await (await start("unwatched_ours")).end()
    assert code == 1
    assert "task died" in words


async def test_an_error_in_a_task_that_is_not_ours_is_logged_and_survived(start: Starter) -> None:
    probe = await start("unwatched")
    await probe.ready()
    probe.signal(signal.SIGTERM)
    code, words = await probe.end()
    assert code == 0
    assert "error outside any task of ours" in words
    assert "the prompt" not in words


async def test_what_the_operator_can_mend_is_one_sentence_and_69(start: Starter) -> None:
    code, words = await (await start("unstartable")).end()
    assert (code, words) == (69, "probe: the cellar is full; make room in /cellar\n")


async def test_a_busy_port_is_one_sentence_and_69(start: Starter, tmp_path: Path) -> None:
    Certificates(tmp_path).ca.issue_files("router", service_uri("router"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        tls = {f"GPUMESH_PROBE_TLS_{name.upper()}": str(tmp_path / file) for name, file in FILES.items()}
        code, words = await (await start("busy", GPUMESH_PROBE_ADDRESS=address, **tls)).end()
    assert code == 69
    assert words == f"probe: cannot listen on {address}: the port is taken or the address is not this machine's\n"


async def test_a_missing_certificate_is_named_and_78(start: Starter) -> None:
    code, words = await (await start("busy", GPUMESH_PROBE_ADDRESS="127.0.0.1:0")).end()
    assert code == 78
    assert "configuration: GPUMESH_PROBE_TLS_CERT: is not set; give the path of a PEM file\n" in words


async def test_a_drain_that_takes_too_long_ends_with_1(start: Starter) -> None:
    probe = await start("slow", GPUMESH_PROBE_DRAIN_S="0")
    await probe.ready()
    probe.signal(signal.SIGTERM)
    code, words = await probe.end()
    assert code == 1
    assert "TimeoutError" in words


async def test_no_core_is_dumped_because_it_would_hold_prompts(start: Starter) -> None:
    assert (await (await start("core")).ready())["core"] == 0


async def test_a_process_at_rest_with_rpc_loaded_leaves_room_for_its_service(start: Starter) -> None:
    assert (await (await start("rss")).ready())["rss_bytes"] < 65e6  # the goal is 80 MB for a whole service


async def http(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    return int(text.split()[1]), text.partition("\r\n\r\n")[2]


async def test_metrics_health_and_readiness_are_served_on_loopback(start: Starter) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    probe = await start("slow", GPUMESH_PROBE_METRICS_ADDRESS=f"127.0.0.1:{port}")
    await probe.ready()
    assert (await http(port, "/health"))[0] == 200
    assert await http(port, "/ready") == (200, '{"status": "ready"}\n')
    status, text = await http(port, "/metrics?x=1")
    assert status == 200
    assert "process_resident_memory_bytes" in text
    assert "gpumesh_loop_lag_seconds" in text
    assert (await http(port, "/other"))[0] == 404
    probe.signal(signal.SIGTERM)
    async with asyncio.timeout(5):
        while (await http(port, "/ready"))[0] != 503:
            await asyncio.sleep(0.01)
