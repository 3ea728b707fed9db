"""The built-in engine with the shipped model: a real llama.cpp in a real child process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gpumesh.node.v1 import session_pb2
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.engines.llamacpp import LlamaCppEngine, LlamaCppSettings
from tests.support.node_process import node_settings, running_node
from tests.support.node_scheduler import FENCE, FakeScheduler, NodeCertificates, chat

GGUF = Path(__file__).parents[3] / "deploy/local/src/gpumesh_local/model/gpumesh-tiny.gguf"
pytestmark = pytest.mark.skipif(not GGUF.is_file(), reason="the shipped model is not built")
SPEC: dict[str, Any] = {
    "kind": "llamacpp",
    "model_id": "m",
    "path": str(GGUF),
    "slots": 2,
    "context_tokens": 512,
    "quantisation": "F16",
}


@asynccontextmanager
async def scheduler_with_engine(folder: Path) -> AsyncIterator[FakeScheduler]:
    """A scheduler whose node runs the built-in engine."""
    certificates = NodeCertificates(folder)
    async with (
        FakeScheduler(certificates.scheduler) as scheduler,
        running_node(node_settings(folder, certificates.node(), [scheduler.address], [SPEC])),
    ):
        await scheduler.ready()
        yield scheduler


def child_pid() -> int:
    """The engine's process: the only child of this one that runs llamacpp_child."""
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(line for line in path.read_text().splitlines() if line.startswith("PPid:")).split()[1]
            if int(parent) == os.getpid() and "llamacpp_child" in (path.parent / "cmdline").read_text():
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError("no engine process")


async def test_answers_streamed_and_whole_with_the_engines_usage(tmp_path: Path) -> None:
    async with scheduler_with_engine(tmp_path) as scheduler:
        streamed = await scheduler.completed(
            scheduler.offer(chat("Hello", temperature=0, ignore_eos=True), max_output_tokens=20)
        )
        assert streamed.done.usage.completion_tokens == 20
        assert streamed.done.usage.prompt_tokens > 0
        assert streamed.deltas[-1].finish_reason == session_pb2.FINISH_REASON_LENGTH
        assert streamed.done.build.engine_name == "llama.cpp"
        assert streamed.done.build.engine_version.startswith("b")
        payload = chat("Hello", temperature=0, ignore_eos=True)
        whole = await scheduler.completed(scheduler.offer(payload, streaming=False, max_output_tokens=20))
        assert whole.text == streamed.text
        assert len(whole.frames) == 1


async def test_choices_log_probabilities_and_context_errors_are_normalised(tmp_path: Path) -> None:
    async with scheduler_with_engine(tmp_path) as scheduler:
        payload = chat("Hi", n=3, logprobs=True, ignore_eos=True, seed=5)
        job = await scheduler.completed(scheduler.offer(payload, max_output_tokens=6))
        assert {delta.choice for delta in job.deltas} == {0, 1, 2}
        assert job.done.usage.completion_tokens == 18
        logprobs = [item for delta in job.deltas for item in delta.logprobs]
        assert len(logprobs) == 18
        assert not any(item.top for item in logprobs)
        asked = chat("Hi", logprobs=True, top_logprobs=2, ignore_eos=True)
        job = await scheduler.completed(scheduler.offer(asked, max_output_tokens=3, streaming=False))
        assert [len(item.top) for delta in job.deltas for item in delta.logprobs] == [2, 2, 2]
        too_long = await scheduler.ended(scheduler.offer(chat("word " * 3000)))
        assert too_long.failure.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert too_long.failure.metadata["limit"] == "512"


async def test_a_structured_answer_is_json(tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "temperature": 0,
    }
    async with scheduler_with_engine(tmp_path) as scheduler:
        job = await scheduler.completed(scheduler.offer(chat("Give me n", **fields), max_output_tokens=200))
        assert isinstance(json.loads(job.text)["n"], int)


async def test_a_cancel_frees_the_slot(tmp_path: Path) -> None:
    async with scheduler_with_engine(tmp_path) as scheduler:
        link = await scheduler.up()
        for streaming in (True, False):
            jobs = [
                scheduler.offer(
                    chat("x", ignore_eos=True), max_output_tokens=480, streaming=streaming, window_bytes=2048
                )
                for _ in range(2)
            ]
            await scheduler.until(lambda jobs=jobs: all(job.kinds for job in jobs))  # type: ignore[misc]  # bound now
            for job in jobs:
                link.cancel(job.id, "CLIENT_GONE", fence=FENCE)
            await scheduler.until(lambda jobs=jobs: all(job.cancel_acks or job.dones for job in jobs))  # type: ignore[misc]  # bound now
        await scheduler.completed(scheduler.offer(max_output_tokens=4))


async def test_the_engine_comes_back_after_its_process_was_killed(tmp_path: Path) -> None:
    async with scheduler_with_engine(tmp_path) as scheduler:
        job = scheduler.offer(chat("x", ignore_eos=True), max_output_tokens=480, window_bytes=1024)
        await scheduler.until(lambda: job.frames)
        old = child_pid()
        os.kill(old, signal.SIGKILL)
        scheduler.window(job, 10_000, 1 << 20)
        await scheduler.ended(job)
        assert (job.failure.reason, job.failure.retryable) == ("ENGINE_ERROR", False)
        states = session_pb2.ModelState
        await scheduler.until(lambda: scheduler.statuses[-1].models[0].state == states.MODEL_STATE_FAILED)
        await scheduler.until(lambda: scheduler.statuses[-1].models[0].state == states.MODEL_STATE_READY)
        await scheduler.completed(scheduler.offer(max_output_tokens=4))
        assert child_pid() != old


async def test_a_job_of_many_choices_that_is_not_read_holds_up_nobody(tmp_path: Path) -> None:
    async with scheduler_with_engine(tmp_path) as scheduler:
        link = await scheduler.up()
        greedy = scheduler.offer(chat("x", n=16, ignore_eos=True), max_output_tokens=400, window_bytes=512)
        await scheduler.until(lambda: greedy.frames)
        await scheduler.completed(scheduler.offer(max_output_tokens=4))
        link.cancel(greedy.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: greedy.cancel_acks)
        await scheduler.completed(scheduler.offer(max_output_tokens=4))


async def test_a_broken_file_is_a_state_and_a_reason_in_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF not really")
    engine = LlamaCppEngine(LlamaCppSettings("broken", str(broken), ServedModel("m", 1)))
    failed = asyncio.Event()
    engine.on_change = failed.set
    run = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(20):
            await failed.wait()
        assert engine.models()[0].state is ModelState.FAILED
    finally:
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
    assert "engine did not start" in capfd.readouterr().out


_NODE = """
import asyncio, sys
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.engines.llamacpp import LlamaCppEngine, LlamaCppSettings

async def main():
    engine = LlamaCppEngine(LlamaCppSettings("e", sys.argv[1], ServedModel("m", 1, context_tokens=256)))
    engine.on_change = lambda: print(engine.pid, engine.models()[0].state.name, flush=True)
    await engine.run()

asyncio.run(main())
"""


def test_the_engine_dies_with_a_node_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _NODE, str(GGUF)], stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        pid = 0
        for line in node.stdout:
            if line.endswith("READY\n"):
                pid = int(line.split()[0])
                break
        assert pid
        node.kill()
        deadline = time.monotonic() + 10
        while alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
