"""Clients that leave, at every point of a request: the node stops, the slot returns, nothing leaks, each job is settled once."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.chaos.conftest import SLOTS
from tests.support.gauges import Gauges
from tests.support.mesh import Mesh, Nodes
from tests.support.raw_http import Clients

CANCELLED = 2
LIVE = 128
LONG = "[[mock tps=50 tokens=4000]]"  # one token each 20 ms, for 80 s
MORE = 32  # tokens that may be billed beyond what the client has read (mechanisms.md 1)
# The target is 0.5 s (mechanisms.md 1); a machine that does other things too gets more.
SLOT_BACK_S = 2.0


@pytest.fixture
async def gauges(wide_mesh: Mesh, http: aiohttp.ClientSession) -> AsyncIterator[Gauges]:
    """A mesh at rest before and after, whose ledger adds up."""
    made = Gauges(wide_mesh, http)
    await made.at_rest()
    yield made
    await made.at_rest()
    wide_mesh.check_ledger()


async def price(mesh: Mesh, prompt: int, completion: int) -> int:
    """Nano-USD, rounded half up."""
    [row] = await mesh.sql("SELECT * FROM metering.prices WHERE model_id = $1", mesh.client["model"])
    raw = prompt * row["input_nano_usd_per_mtok"] + completion * row["output_nano_usd_per_mtok"]
    return int((raw + 500_000) // 1_000_000)


@pytest.fixture
async def clients(wide_mesh: Mesh) -> AsyncIterator[Clients]:
    """Clients of the wide mesh."""
    with Clients(wide_mesh) as made:
        yield made


async def running(gauges: Gauges) -> int:
    """Jobs that hold a slot, over both nodes."""
    name = "gpumesh_node_jobs_running"
    return int(sum([await gauges.value("node", name), await gauges.value("node-2", name)]))


async def runs(gauges: Gauges, jobs: int, timeout_s: float = 10.0) -> None:
    """Waits until so many jobs hold slots and their nodes have had time to say so: Accept may wait 10 ms for a first frame."""
    async with asyncio.timeout(timeout_s):
        while await running(gauges) != jobs:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.15)


async def slot_is_back(gauges: Gauges) -> float:
    """Seconds until no job holds a slot. Fails after SLOT_BACK_S."""
    began = time.monotonic()
    await runs(gauges, 0, SLOT_BACK_S)
    return time.monotonic() - began


async def test_a_client_that_leaves_in_the_middle_of_its_upload_leaves_nothing(
    wide_mesh: Mesh, gauges: Gauges, clients: Clients
) -> None:
    before = len(await wide_mesh.settlements())
    gone = 'gpumesh_edge_refused_total{reason="CLIENT_GONE"}'
    counted = await gauges.value("edge-http", gone)
    connected = await gauges.value("edge-http", "gpumesh_edge_connections")
    text = "word " * 100_000
    leaving = [await clients.ask(text, send_only=share) for share in (0.0, 0.3, 0.9)]
    leaving[0].close()
    leaving[1].close()
    leaving[2].reset()
    await gauges.reaches("edge-http", gone, counted + 3)
    await gauges.reaches("edge-http", "gpumesh_edge_connections", connected)
    assert await gauges.value("edge-http", "gpumesh_dispatch_running_jobs") == 0
    assert len(await wide_mesh.settlements()) == before


async def test_a_client_that_leaves_the_queue_pays_nothing_and_never_reaches_a_node(
    wide_mesh: Mesh, gauges: Gauges, clients: Clients
) -> None:
    before = len(await wide_mesh.settlements())
    holders = await asyncio.gather(*(clients.ask(LONG) for _ in range(2 * SLOTS)))
    await runs(gauges, 2 * SLOTS)
    queued = [await clients.ask(LONG, stream=stream) for stream in (True, False)]
    await gauges.reaches("scheduler", "gpumesh_scheduler_queued_jobs", 2)
    for client in queued:
        client.close()
    await gauges.reaches("scheduler", "gpumesh_scheduler_queued_jobs", 0, SLOT_BACK_S)
    settled = await wide_mesh.settled_after(before, 2)
    assert {(row["outcome"], row["charge_nano_usd"], row["prompt_tokens"]) for row in settled} == {(CANCELLED, 0, 0)}
    assert await running(gauges) == 2 * SLOTS  # those who read on are not disturbed
    for client in holders:
        client.close()
    await slot_is_back(gauges)
    settled = await wide_mesh.settled_after(before, 2 + 2 * SLOTS)
    assert {row["outcome"] for row in settled} == {CANCELLED}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_the_first_token_pays_for_its_prompt_only(
    wide_mesh: Mesh, gauges: Gauges, clients: Clients, stream: bool
) -> None:
    before = len(await wide_mesh.settlements())
    client = await clients.ask("one two three [[mock delay_s=60 tokens=5]]", stream=stream)
    await runs(gauges, 1)
    client.close()
    await slot_is_back(gauges)
    [settled] = await wide_mesh.settled_after(before, 1)
    assert (settled["outcome"], settled["completion_tokens"]) == (CANCELLED, 0)
    assert settled["prompt_tokens"] == 6  # words, as mock-model counts them
    assert settled["charge_nano_usd"] == await price(wide_mesh, 6, 0) > 0


async def test_a_client_that_leaves_its_stream_pays_for_what_it_was_sent(
    wide_mesh: Mesh, gauges: Gauges, clients: Clients
) -> None:
    before = len(await wide_mesh.settlements())
    client = await clients.ask(LONG)
    await client.read_events(12)
    seen = sum('"content":"' in event and '"content":""' not in event for event in client.events())
    assert seen >= 10
    client.close()
    await slot_is_back(gauges)
    [settled] = await wide_mesh.settled_after(before, 1)
    assert settled["outcome"] == CANCELLED
    assert seen <= settled["completion_tokens"] <= seen + MORE
    assert settled["charge_nano_usd"] == await price(wide_mesh, settled["prompt_tokens"], settled["completion_tokens"])
    segments = await wide_mesh.sql("SELECT * FROM metering.segments WHERE job_id = $1", settled["job_id"])
    assert [segment["end_token"] for segment in segments] == [settled["completion_tokens"]]
    assert 0 < segments[0]["pay_nano_usd"] <= settled["charge_nano_usd"]


async def test_a_client_that_does_not_wait_for_a_whole_answer_pays_for_its_prompt_only(
    wide_mesh: Mesh, gauges: Gauges, clients: Clients
) -> None:
    before = len(await wide_mesh.settlements())
    client = await clients.ask(LONG, stream=False)
    await runs(gauges, 1)
    client.close()
    await slot_is_back(gauges)
    [settled] = await wide_mesh.settled_after(before, 1)
    assert (settled["outcome"], settled["completion_tokens"]) == (CANCELLED, 0)
    assert settled["charge_nano_usd"] == await price(wide_mesh, settled["prompt_tokens"], 0) > 0


async def test_slots_of_128_streams_left_at_once_are_back_in_time(
    wide_mesh: Mesh, gauges: Gauges, clients: Clients, record_property: Any
) -> None:
    before = len(await wide_mesh.settlements())
    reading = await asyncio.gather(*(clients.ask(LONG) for _ in range(LIVE)))
    await asyncio.gather(*(client.read_events(4) for client in reading))
    assert await running(gauges) == LIVE
    began = time.monotonic()
    for client in reading:
        client.close()
    back: list[float] = []  # when each slot was back, seconds; the resolution is one scrape of both nodes
    while len(back) < LIVE:
        left = await running(gauges)
        now = time.monotonic() - began
        assert now < SLOT_BACK_S, f"{left} of {LIVE} streams still hold a slot after {now:.2f} s"
        back += [now] * (LIVE - left - len(back))
    p50, p99 = back[LIVE // 2 - 1], back[int(LIVE * 0.99)]
    record_property("slot_back_ms", {"p50": round(p50 * 1000, 1), "p99": round(p99 * 1000, 1)})
    print(f"\nslot back after {LIVE} FINs: p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms")
    settled = await wide_mesh.settled_after(before, LIVE)
    assert {row["outcome"] for row in settled} == {CANCELLED}
    assert all(row["completion_tokens"] >= 3 for row in settled)
    await gauges.reaches("router", "gpumesh_router_holds", 0, 20)  # what a caller was granted in advance lapses in 5 s


async def test_a_client_that_leaves_a_story_of_the_shipped_model_gives_the_slot_back(
    tiny_mesh: Mesh, http: aiohttp.ClientSession
) -> None:
    gauges = Gauges(tiny_mesh, http)
    await gauges.at_rest()
    before = len(await tiny_mesh.settlements())
    nodes = Nodes(tiny_mesh)
    with Clients(tiny_mesh) as clients:
        client = await clients.ask("Tell me a long story", max_tokens=1800, ignore_eos=True, temperature=0)
        await client.read_events(10)
        assert sum((await nodes.running()).values()) == 1
        client.close()
        await gauges.reaches("node", "gpumesh_node_jobs_running", 0, SLOT_BACK_S)
    await nodes.idle(SLOT_BACK_S)
    nodes.close()
    [settled] = await tiny_mesh.settled_after(before, 1)
    assert settled["outcome"] == CANCELLED
    assert 8 <= settled["completion_tokens"] < 1800
    await gauges.at_rest()
    # The slot serves again at once.
    status, answer = await tiny_mesh.chat(http, max_tokens=20, temperature=0)
    assert status == 200, answer
    tiny_mesh.check_ledger()
