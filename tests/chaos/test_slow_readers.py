"""Clients that read slowly or not at all: memory stays bounded, the node waits, nothing is lost, others are not disturbed."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest

from gpumesh_node.domain.mock_script import Prompt, read_script, words
from gpumesh_node.domain.mock_script import Script as MockScript
from tests.chaos.conftest import STALL_S
from tests.support.gauges import Gauges
from tests.support.mesh import Mesh
from tests.support.raw_http import Clients, RawHttp

CANCELLED = 2
STALLED = 20
TOKENS = 10_000
LONG = f"[[mock tokens={TOKENS} token_bytes=300]]"  # 3 MB
SHORT = "[[mock tokens=3000 token_bytes=300]]"
BUFFER = 4096  # SO_RCVBUF of a reader, so that the kernel takes little
HELD = 256 * 1024  # what one slow reader may make us hold beyond the kernel's buffers (issue 2)
SLACK = 10 * 1024 * 1024  # what a process grows by on its own under any load


@pytest.fixture
async def gauges(wide_mesh: Mesh, http: aiohttp.ClientSession) -> AsyncIterator[Gauges]:
    """A mesh at rest before and after, whose ledger adds up."""
    made = Gauges(wide_mesh, http)
    await made.at_rest()
    yield made
    await made.at_rest()
    wide_mesh.check_ledger()


async def frames(gauges: Gauges) -> float:
    """Frames that both nodes have sent."""
    name = "gpumesh_node_frames_total"
    return await gauges.value("node", name) + await gauges.value("node-2", name)


async def sizes(gauges: Gauges) -> dict[str, float]:
    """Resident memory by process, bytes."""
    name = "process_resident_memory_bytes"
    return {process: await gauges.value(process, name) for process in ("edge-http", "scheduler", "node", "node-2")}


async def until_quiet(gauges: Gauges) -> None:
    """Waits until the nodes have sent nothing for a while."""
    async with asyncio.timeout(STALL_S / 2):
        seen, since = -1.0, time.monotonic()
        while time.monotonic() - since < 0.3:
            now = await frames(gauges)
            if now != seen:
                seen, since = now, time.monotonic()
            await asyncio.sleep(0.03)


def text_of(client: RawHttp) -> str:
    """What the events carry."""
    parts = (json.loads(event) for event in client.events() if event != "[DONE]")
    return "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])


def check_whole(client: RawHttp, question: str, tokens: int) -> None:
    """The answer is complete: each word that mock-model says, in order, once, with its count and [DONE]."""
    events = client.events()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == tokens
    script = read_script(question, MockScript())
    assert text_of(client) == "".join(words(script, Prompt(question, len(question.split()), None), 0))


async def steady(mesh: Mesh, http: aiohttp.ClientSession, tokens: int) -> float:
    """An ordinary stream of 100 tokens a second; returns the longest wait for a piece of it, seconds."""
    longest, last, count = 0.0, 0.0, 0
    async for chunk in mesh.stream(http, f"[[mock tps=100 tokens={tokens}]]"):
        now = time.monotonic()
        longest, last = max(longest, now - last if last else 0.0), now
        if isinstance(chunk, dict):
            count += sum(len((choice["delta"].get("content") or "").split()) for choice in chunk["choices"])
    assert count == tokens
    return longest


async def test_twenty_readers_that_stop_cost_256_kib_each_and_get_all_of_it_when_they_read_again(
    wide_mesh: Mesh, gauges: Gauges, http: aiohttp.ClientSession
) -> None:
    usage = {"include_usage": True}
    with Clients(wide_mesh) as clients:
        # Once at full speed, so that what each process needs anyway is there.
        warm = await asyncio.gather(*(clients.ask(LONG, stream_options=usage) for _ in range(STALLED)))
        await asyncio.gather(*(client.read_whole() for client in warm))
        await gauges.at_rest()
        before, produced = await sizes(gauges), await frames(gauges)
        whole = produced / STALLED  # frames of one answer, at most: the launcher's probe is in it
        settled = len(await wide_mesh.settlements())

        asked = (clients.ask(LONG, receive_buffer=BUFFER, stream_options=usage) for _ in range(STALLED))
        readers = await asyncio.gather(*asked)
        await until_quiet(gauges)
        held, sent = await sizes(gauges), await frames(gauges) - produced
        # The window closed: with the kernel's buffers an answer may be a quarter through, never further.
        assert sent < STALLED * whole / 4, f"{sent} frames for {STALLED} readers, {whole} make an answer"
        assert await steady(wide_mesh, http, 100) < 1.0
        grown = {process: held[process] - before[process] for process in before}
        assert all(size < STALLED * HELD + SLACK for size in grown.values()), grown
        print(f"\ngrown by (KiB): { {process: round(size / 1024) for process, size in grown.items()} }")
        assert len(await wide_mesh.settlements()) - settled <= 1  # the steady stream's; all others go on

        await asyncio.gather(*(reader.read_whole() for reader in readers))
    for reader in readers:
        check_whole(reader, LONG, TOKENS)
    rows = await wide_mesh.settled_after(settled, STALLED + 1)
    assert Counter((row["outcome"], row["completion_tokens"]) for row in rows) == {(1, TOKENS): STALLED, (1, 100): 1}


async def slowly(clients: Clients) -> float:
    """Reads 4 KiB at a time for longer than a reader may stall; returns how long it took, seconds."""
    began = time.monotonic()
    client = await clients.ask(SHORT, receive_buffer=BUFFER, stream_options={"include_usage": True})
    while not client.received.endswith(b"\r\n0\r\n\r\n"):
        if time.monotonic() - began < STALL_S + 3:
            await asyncio.sleep(0.1)
        assert await client.read(4096), bytes(client.received[-500:])
    check_whole(client, SHORT, 3000)
    return time.monotonic() - began


async def test_a_reader_that_stalls_for_too_long_is_cut_and_cancelled_and_one_that_is_only_slow_is_not(
    wide_mesh: Mesh, gauges: Gauges, http: aiohttp.ClientSession
) -> None:
    before = len(await wide_mesh.settlements())
    cut = await gauges.value("edge-http", "gpumesh_edge_write_stalls")
    with Clients(wide_mesh) as clients:
        stalled = await clients.ask(LONG, receive_buffer=BUFFER)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            slow = group.create_task(slowly(clients))
            others = group.create_task(steady(wide_mesh, http, 800))
            await gauges.reaches("edge-http", "gpumesh_edge_write_stalls", cut + 1, STALL_S + 5)
            assert time.monotonic() - began >= STALL_S - 0.1
            [row] = await wide_mesh.settled_after(before, 1)
            assert (row["outcome"], row["reason"]) == (CANCELLED, "CLIENT_TOO_SLOW")
            assert 0 < row["completion_tokens"] < TOKENS
            assert not slow.done()
            await stalled.read_to_the_end()
            assert b"[DONE]" not in stalled.received
        assert others.result() < 1.0
        assert slow.result() > STALL_S
    assert await gauges.value("edge-http", "gpumesh_edge_write_stalls") == cut + 1
    assert {row["outcome"] for row in (await wide_mesh.settled_after(before, 3))[1:]} == {1}


async def test_an_answer_of_many_tokens_a_frame_does_not_stand_still_behind_its_window(
    wide_mesh: Mesh, gauges: Gauges
) -> None:
    question = "[[mock tokens=12000]]"
    with Clients(wide_mesh) as clients:
        client = await clients.ask(question, stream_options={"include_usage": True})
        async with asyncio.timeout(15):  # 0.2 s; one that stands still is given up after 20 s
            await client.read_whole()
    check_whole(client, question, 12_000)
