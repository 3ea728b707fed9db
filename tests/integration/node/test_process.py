"""The node as its own process: signals, exit codes, no core dumps, and no word of a prompt in what it writes."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpumesh.common.v1.link_pb2 import GoodbyeReason
from tests.support.node_scheduler import FENCE, FakeScheduler, NodeCertificates, chat

MARKER = "violet-marker-4711"


def environment(
    folder: Path, certificates: NodeCertificates, scheduler: FakeScheduler, engine: dict[str, Any]
) -> dict[str, str]:
    """Of a node process with a ready certificate."""
    tls = certificates.node()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GPUMESH_")}
    return inherited | {
        "GPUMESH_NODE_STATE_DIR": str(folder / "state"),
        "GPUMESH_NODE_TLS_CERT": str(tls.cert_file),
        "GPUMESH_NODE_TLS_KEY": str(tls.key_file),
        "GPUMESH_NODE_TLS_CA": str(tls.ca_file),
        "GPUMESH_NODE_SCHEDULER_ADDRESSES": scheduler.address,
        "GPUMESH_NODE_ENGINES": json.dumps([engine]),
        "GPUMESH_NODE_RECONNECT_MIN_S": "0.05",
        "GPUMESH_NODE_RECONNECT_MAX_S": "0.2",
        "GPUMESH_NODE_LOG_LEVEL": "debug",
        "GPUMESH_NODE_DRAIN_S": "5",
    }


@asynccontextmanager
async def node_process(env: dict[str, str], log: Path) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """`python -m gpumesh_node`, ended at the end whatever happens."""
    with log.open("ab") as output:
        # Popen, not asyncio's: uvloop's fork beside a live gRPC aborts the child now and then (see gpumesh_node.child).
        process = subprocess.Popen([sys.executable, "-m", "gpumesh_node"], env=env, stdout=output, stderr=output)  # noqa: ASYNC220 -- vfork
    try:
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def written(folder: Path) -> bytes:
    """Everything in a folder, as one."""
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


async def test_sigterm_drains_and_leaves_with_zero(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path / "ca")
    async with FakeScheduler(certificates.scheduler) as scheduler:
        env = environment(tmp_path, certificates, scheduler, {"kind": "mock", "model_id": "m"})
        async with node_process(env, tmp_path / "log") as process:
            await scheduler.ready()
            job = scheduler.offer(chat("[[mock tokens=10 tps=40]]"))
            await scheduler.until(lambda: job.frames)
            process.send_signal(signal.SIGTERM)
            await scheduler.completed(job)
            assert await asyncio.to_thread(process.wait, 10) == 0
            assert scheduler.goodbyes


async def test_a_wrong_setting_is_one_clear_line_and_exit_code_78(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path / "ca")
    async with FakeScheduler(certificates.scheduler) as scheduler:
        env = environment(tmp_path, certificates, scheduler, {"kind": "mock", "slots": 0})
        async with node_process(env, tmp_path / "log") as process:
            assert await asyncio.to_thread(process.wait, 20) == 78
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "GPUMESH_NODE_ENGINES: entry 1, mock.slots" in line]


async def test_a_node_whose_identity_was_taken_over_ends_with_an_error(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path / "ca")
    async with FakeScheduler(certificates.scheduler) as scheduler:
        env = environment(tmp_path, certificates, scheduler, {"kind": "mock", "model_id": "m"})
        async with node_process(env, tmp_path / "log") as process:
            link = await scheduler.up()
            link.goodbye(GoodbyeReason.GOODBYE_REASON_REPLACED)
            assert await asyncio.to_thread(process.wait, 20) == 1
    assert "SessionReplacedError" in (tmp_path / "log").read_text()


async def test_prompts_and_answers_leave_no_trace(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path / "ca")
    state = tmp_path / "node"
    state.mkdir()
    log = state / "log"
    async with FakeScheduler(certificates.scheduler) as scheduler:
        env = environment(state, certificates, scheduler, {"kind": "mock", "model_id": "m"})
        async with node_process(env, log) as process:
            await scheduler.ready()
            limits = Path(f"/proc/{process.pid}/limits").read_text()  # noqa: ASYNC240 -- /proc does not block
            (core,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
            assert core.split()[4:6] == ["0", "0"]
            done = await scheduler.completed(scheduler.offer(chat(f"{MARKER} [[mock echo=1]]")))
            assert MARKER in done.text
            for text in (
                f"{MARKER} [[mock error=engine]]",
                f"{MARKER} [[mock die_after=1]]",
                f"{MARKER} [[mock {MARKER}=1]]",
            ):
                await scheduler.ended(scheduler.offer(chat(text)))
            await scheduler.ended(scheduler.offer(f'{{"messages": [{{"content": "{MARKER}'.encode()))
            stalled = scheduler.offer(chat(f"{MARKER} [[mock stall_after=1]]"))
            await scheduler.until(lambda: stalled.frames)
            link = await scheduler.up()
            link.cancel(stalled.id, "CLIENT_GONE", fence=FENCE)
            await scheduler.until(lambda: stalled.cancel_acks)
            last = scheduler.offer(chat(f"{MARKER} [[mock stall_after=1]]"))
            await scheduler.until(lambda: last.frames)
            process.send_signal(signal.SIGABRT)
            await asyncio.to_thread(process.wait, 10)
    everything = written(state)
    assert len(everything) > 500
    for form in (MARKER, base64.b64encode(MARKER.encode())[:-2].decode(), json.dumps(MARKER)[1:-1]):
        assert form.encode() not in everything
