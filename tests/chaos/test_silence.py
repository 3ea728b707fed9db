"""A node that is there but says nothing (SIGSTOP, as a cut cable would look) is told from one that thinks for a minute."""

import asyncio
import signal
import time
from typing import Any

import aiohttp
import pytest

from tests.support.gauges import Gauges
from tests.support.mesh import Mesh, Nodes, text_of

COMPLETED, FAILED = 1, 3
LOST_S = 25.0  # a silent node is given up after this (issue 2)
MARGIN_S = 5.0
PREFILL_S = 60


class Scene:
    """Who runs what, and how long things took since the node fell silent."""

    def __init__(self, mesh: Mesh, http: aiohttp.ClientSession) -> None:
        self.mesh = mesh
        self.http = http
        self.gauges = Gauges(mesh, http)
        self.silent_at = 0.0
        self.silent = ""

    async def where(self, jobs: int) -> dict[str, int]:
        """Jobs in slots by process, once there are so many in all."""
        name = "gpumesh_node_jobs_running"
        async with asyncio.timeout(10):
            while sum((seen := {n: int(await self.gauges.value(n, name)) for n in ("node", "node-2")}).values()) < jobs:
                await asyncio.sleep(0.01)
        return seen

    def since(self) -> float:
        """Seconds of silence."""
        return time.monotonic() - self.silent_at

    async def think(self) -> float:
        """A prompt that is read for a minute without a word; returns when its answer had come, seconds after its start."""
        began = time.monotonic()
        question = f"[[mock delay_s={PREFILL_S} tokens=2]]"
        chunks = [chunk async for chunk in self.mesh.stream(self.http, question, max_tokens=20_000)]
        assert len(text_of(chunks).split()) == 2
        assert chunks[-1] == "[DONE]"
        return time.monotonic() - began

    async def read_stream(self, started: asyncio.Event) -> float:
        """An answer in the middle of which its node falls silent; returns after how much silence its reader was told."""
        chunks: list[Any] = []
        async for chunk in self.mesh.stream(self.http, "[[mock tps=20 tokens=1000]]", max_tokens=1000):
            chunks.append(chunk)
            if len(chunks) == 5:
                started.set()
        assert "[DONE]" not in chunks
        assert chunks[-1]["error"]["code"] == "answer_interrupted"
        return self.since()

    async def wait_for_first(self) -> float:
        """A question to the node that falls silent before it says a word; returns after how much silence it was answered all the same."""
        status, answer = await self.mesh.chat(self.http, "[[mock delay_s=2 tokens=7]]", max_tokens=7)
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 7
        return self.since()

    async def ask_on(self, until: asyncio.Event) -> int:
        """Small questions all the time, each answered: in time, or after one try of 2 s at the silent node."""
        asked = 0
        while not until.is_set():
            began = time.monotonic()
            status, answer = await self.mesh.chat(self.http, "[[mock tokens=1]]", max_tokens=1)
            assert (status, time.monotonic() - began < 5) == (200, True), answer
            asked += 1
            await asyncio.sleep(0.19)
        return asked


@pytest.mark.timeout(180)
async def test_a_silent_node_is_given_up_within_25_s_while_a_silent_prefill_of_60_s_goes_on(
    mock_mesh: Mesh, http: aiohttp.ClientSession
) -> None:
    scene, nodes = Scene(mock_mesh, http), Nodes(mock_mesh)
    await nodes.ready(2)
    await scene.gauges.at_rest()
    before = len(await mock_mesh.settlements())
    started, lost = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        thinking = group.create_task(scene.think())
        healthy = max(held := await scene.where(1), key=lambda name: held[name])
        scene.silent = "node" if healthy == "node-2" else "node-2"
        # The least loaded node is taken, so the following go to the other one.
        reading = group.create_task(scene.read_stream(started))
        await started.wait()
        waiting = group.create_task(scene.wait_for_first())
        assert await scene.where(3) == {healthy: 1, scene.silent: 2}
        mock_mesh.signal(scene.silent, signal.SIGSTOP)
        scene.silent_at = time.monotonic()
        try:
            asking = group.create_task(scene.ask_on(lost))
            async with asyncio.timeout(LOST_S + MARGIN_S):
                while len(await nodes.running()) > 1:
                    await asyncio.sleep(0.1)
            gone_after = scene.since()
            lost.set()
            assert await reading < LOST_S + MARGIN_S
            assert await waiting < LOST_S + MARGIN_S + 3
        finally:
            mock_mesh.signal(scene.silent, signal.SIGCONT)
        await nodes.ready(2)
        print(f"\nlost after {gone_after:.1f} s, {await asking} other questions answered meanwhile")
        await comes_back(scene)
    assert PREFILL_S <= thinking.result() < PREFILL_S + MARGIN_S
    await check_books(scene, before, asking.result())
    await nodes.idle()
    nodes.close()


async def comes_back(scene: Scene) -> None:
    """The node that was away serves again, and has dropped what it held."""
    name = 'gpumesh_node_jobs_total{model="mock-model",outcome="completed"}'
    before = await scene.gauges.value(scene.silent, name)
    async with asyncio.timeout(20):
        while await scene.gauges.value(scene.silent, name) == before:
            assert (await scene.mesh.chat(scene.http, "[[mock tokens=1]]", max_tokens=2))[0] == 200
    await scene.gauges.reaches(scene.silent, "gpumesh_node_jobs_running", 0)


async def check_books(scene: Scene, before: int, asked: int) -> None:
    """Each job is settled once, the broken one for nothing, the retried one at the node that answered it."""
    await scene.gauges.at_rest()
    rows = (await scene.mesh.settlements())[before:]
    assert len(rows) >= asked + 3
    assert len({row["job_id"] for row in rows}) == len(rows)
    [broken] = [row for row in rows if row["outcome"] != COMPLETED]
    assert (broken["outcome"], broken["charge_nano_usd"]) == (FAILED, 0)
    [retried] = [row for row in rows if row["completion_tokens"] == 7]
    paid = await scene.mesh.sql("SELECT * FROM metering.segments WHERE job_id = $1", retried["job_id"])
    assert [scene.mesh.node_name(segment["node_id"]) for segment in paid] != [scene.silent]
    assert len(paid) == 1
    scene.mesh.check_ledger()
