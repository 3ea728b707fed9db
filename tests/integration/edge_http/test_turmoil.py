"""Many clients while the mesh behind the edge is cut again and again: each gets a whole answer or a clear error; nothing stays."""

import asyncio
import json
import random
from pathlib import Path

import aiohttp
import pytest

from gpumesh.common.v1.job_pb2 import JobOutcome
from gpumesh.node.v1.session_pb2 import FinishReason
from tests.support.edge_client import CHAT, chat_body, events_of, text_of
from tests.support.edge_peers import EdgeMesh, PlayedJob, eventually

WORDS = [f"w{number} " for number in range(20)]


class Storyteller:
    """Tells twenty words, a few milliseconds apart, as long as its link lives."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.tasks: set[asyncio.Task[None]] = set()

    def __call__(self, job: PlayedJob) -> None:
        task = asyncio.get_running_loop().create_task(self._tell(job, self._rng.random() * 0.2))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _tell(self, job: PlayedJob, prefill_s: float) -> None:
        await asyncio.sleep(min(prefill_s, 0.19))
        for word in WORDS:
            if job.link.end is not None or job.cancelled:
                return
            finish = FinishReason.FINISH_REASON_STOP if word == WORDS[-1] else FinishReason.FINISH_REASON_UNSPECIFIED
            job.say(word, finish=finish)
            await asyncio.sleep(0.003)
        if job.link.end is None:
            job.done()


async def _client(mesh: EdgeMesh, http: aiohttp.ClientSession, rng: random.Random) -> str:
    """One client, which may lose patience; what became of it."""
    body = chat_body(stream=rng.random() < 0.7)
    try:
        async with asyncio.timeout(0.1 if rng.random() < 0.15 else 25):
            async with http.post(mesh.base + CHAT, json=body, headers=mesh.headers) as answer:
                text = await answer.text()
    except TimeoutError:
        return "gone"
    if answer.status != 200:
        assert answer.status in (502, 503), text
        assert json.loads(text)["error"]["message"]
        return "refused"
    if not body["stream"]:
        assert json.loads(text)["choices"][0]["message"]["content"] == "".join(WORDS)
        return "whole"
    events = events_of(text)
    told = text_of(events)
    assert "".join(WORDS).startswith(told)
    if events[-1] == "[DONE]":
        assert told == "".join(WORDS)
        return "whole"
    assert events[-1]["error"]["code"]
    return "broken off"


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_client_gets_a_whole_answer_or_a_clear_error(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    connector = aiohttp.TCPConnector(limit=0)
    async with EdgeMesh(tmp_path) as mesh, aiohttp.ClientSession(connector=connector) as http:
        story = Storyteller(rng)
        mesh.dispatch.play = story
        clients = []
        for _ in range(4):
            clients += [asyncio.create_task(_client(mesh, http, rng)) for _ in range(15)]
            await asyncio.sleep(rng.random() * 0.15)
            port = await mesh.stop_dispatch()
            await mesh.start_dispatch(port)
            if rng.random() < 0.5:
                await mesh.start_router(await mesh.stop_router())
        clients += [asyncio.create_task(_client(mesh, http, rng)) for _ in range(15)]
        ends = await asyncio.gather(*clients)
        await eventually(lambda: not mesh.edge.dispatcher.jobs and not mesh.edge.app.sinks, 10)
        await eventually(lambda: len(mesh.edge.dispatcher.deliveries) == 0, 10)
        await eventually(lambda: not story.tasks, 10)
        assert ends.count("whole") >= len(ends) // 2, ends
        # The first record of a job counts; what a client was told agrees with it.
        first: dict[bytes, int] = {}
        for job_id, record in mesh.dispatch.delivered:
            first.setdefault(job_id, record.outcome)
            assert first[job_id] == record.outcome
        completed = list(first.values()).count(JobOutcome.JOB_OUTCOME_COMPLETED)
        # A client that lost patience in the very moment of the last byte counts for either.
        assert ends.count("whole") <= completed <= ends.count("whole") + ends.count("gone")
