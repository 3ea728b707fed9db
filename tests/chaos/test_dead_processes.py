"""Processes of a whole mesh die, by kill -9; what their buyers and providers see of it. Money is read from PostgreSQL."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import asyncpg
import pytest

from tests.support.mesh import Mesh, Nodes, text_of

COMPLETED, CANCELLED, FAILED = 1, 2, 3
SLOW_START = "[[mock delay_s=1 tokens=5]]"


@pytest.fixture
async def nodes(mock_mesh: Mesh) -> AsyncIterator[Nodes]:
    """Both nodes of the mock mesh, ready and idle before and after."""
    seen = Nodes(mock_mesh)
    await seen.ready(2)
    await seen.idle()
    yield seen
    await seen.ready(2)
    await seen.idle()
    seen.close()
    mock_mesh.check_ledger()


async def broken_stream(
    mesh: Mesh, http: aiohttp.ClientSession, text: str, kill_at: int, name: str, **fields: Any
) -> list[Any]:
    """Streams and kills a process at the n-th chunk; returns what the client saw."""
    chunks: list[Any] = []
    async for chunk in mesh.stream(http, text, **fields):
        chunks.append(chunk)
        if len(chunks) == kill_at:
            mesh.kill(name)
    return chunks


async def test_node_killed_before_the_first_token_is_not_seen_by_the_client_and_billed_once(
    mock_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    before = len(await mock_mesh.settlements())
    asking = asyncio.ensure_future(mock_mesh.chat(http, SLOW_START))
    name = mock_mesh.node_name(await nodes.busy())
    dead = mock_mesh.kill(name)
    status, answer = await asking
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 5
    [settled] = await mock_mesh.settled_after(before, 1)
    assert (settled["outcome"], settled["completion_tokens"]) == (COMPLETED, 5)
    assert settled["charge_nano_usd"] > 0
    segments = await mock_mesh.sql("SELECT * FROM metering.segments WHERE job_id = $1", settled["job_id"])
    assert len(segments) == 1
    assert mock_mesh.node_name(segments[0]["node_id"]) != name
    await mock_mesh.restarted(name, dead)


async def test_node_killed_after_content_ends_the_stream_with_an_error_and_nobody_pays(
    mock_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    before = len(await mock_mesh.settlements())
    chunks: list[Any] = []
    name, dead = "", 0
    async for chunk in mock_mesh.stream(http, "[[mock tps=50 tokens=500]]", max_tokens=500):
        chunks.append(chunk)
        if len(chunks) == 5:
            name = mock_mesh.node_name(await nodes.busy())
            dead = mock_mesh.kill(name)
    assert "[DONE]" not in chunks
    assert chunks[-1]["error"]["code"] == "answer_interrupted"
    assert "not charged" in chunks[-1]["error"]["message"]
    [settled] = await mock_mesh.settled_after(before, 1)
    assert (settled["outcome"], settled["charge_nano_usd"]) == (FAILED, 0)
    pays = await mock_mesh.sql(
        "SELECT sum(pay_nano_usd) AS pay FROM metering.segments WHERE job_id = $1", settled["job_id"]
    )
    assert not pays[0]["pay"]
    await mock_mesh.restarted(name, dead)


async def test_scheduler_killed_with_jobs_queued_places_them_again_and_settles_each_once(
    mock_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    before = len(await mock_mesh.settlements())
    asking = [asyncio.ensure_future(mock_mesh.chat(http, SLOW_START)) for _ in range(24)]
    await nodes.busy(16)
    dead = mock_mesh.kill("scheduler")
    await mock_mesh.restarted("scheduler", dead)
    answers = await asyncio.gather(*asking)
    assert [status for status, _ in answers] == [200] * 24, [body for status, body in answers if status != 200]
    settled = await mock_mesh.settled_after(before, 24)
    assert {row["outcome"] for row in settled} == {COMPLETED}
    assert len({row["job_id"] for row in settled}) == 24


async def test_receipts_unsettled_when_the_scheduler_dies_settle_exactly_once_afterwards(
    mock_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    before = len(await mock_mesh.settlements())
    mock_mesh.signal("metering", signal.SIGSTOP)
    try:
        answers = await asyncio.gather(*(mock_mesh.chat(http, "[[mock tokens=3]]") for _ in range(12)))
        assert [status for status, _ in answers] == [200] * 12
        dead = mock_mesh.kill("scheduler")
    finally:
        mock_mesh.signal("metering", signal.SIGCONT)
    await mock_mesh.restarted("scheduler", dead)
    settled = await mock_mesh.settled_after(before, 12)
    assert {(row["outcome"], row["completion_tokens"]) for row in settled} == {(COMPLETED, 3)}
    await nodes.ready(2)


async def with_metering_down(mesh: Mesh, http: aiohttp.ClientSession, text: str, down_s: float) -> None:
    """Requests while metering is dead for `down_s` seconds: all are answered, and each is settled once afterwards."""
    before = len(await mesh.settlements())
    assert (await mesh.chat(http, text))[0] == 200
    await mesh.settled_after(before, 1)
    mesh.signal("launcher", signal.SIGSTOP)  # or it would start metering again at once
    try:
        dead = mesh.kill("metering")
        sent, until = 0, time.monotonic() + down_s
        while time.monotonic() < until:
            status, answer = await mesh.chat(http, text)
            assert status == 200, answer
            sent += 1
            await asyncio.sleep(0.15)
    finally:
        mesh.signal("launcher", signal.SIGCONT)
    await mesh.restarted("metering", dead)
    settled = await mesh.settled_after(before, 1 + sent)
    assert {row["outcome"] for row in settled} == {COMPLETED}
    mesh.check_ledger()


async def with_postgresql_restarted(mesh: Mesh, http: aiohttp.ClientSession, text: str, jobs: int) -> None:
    """Requests while every connection of the database breaks: all are answered, and each is settled once afterwards."""
    before = len(await mesh.settlements())
    assert (await mesh.chat(http, text))[0] == 200
    await mesh.settled_after(before, 1)
    dead = mesh.signal("postgres", signal.SIGINT)  # fast shutdown
    answers = await asyncio.gather(*(mesh.chat(http, text) for _ in range(jobs)))
    assert [status for status, _ in answers] == [200] * jobs
    await mesh.restarted("postgres", dead)
    async with asyncio.timeout(30):
        while True:
            try:
                settled = await mesh.settled_after(before, 1 + jobs)
                break
            except (OSError, asyncpg.PostgresError):
                await asyncio.sleep(0.1)
    assert {row["outcome"] for row in settled} == {COMPLETED}
    mesh.check_ledger()


@pytest.mark.timeout(180)
async def test_requests_go_on_while_metering_is_down_for_twenty_seconds_and_settle_once_later(
    mock_mesh: Mesh, tiny_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    await asyncio.gather(
        with_metering_down(mock_mesh, http, "[[mock tokens=2]]", 20),
        with_metering_down(tiny_mesh, http, "Hello!", 20),
    )


@pytest.mark.timeout(180)
async def test_requests_go_on_while_postgresql_restarts_and_settle_once_later(
    mock_mesh: Mesh, tiny_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    await asyncio.gather(
        with_postgresql_restarted(mock_mesh, http, "[[mock delay_s=0.1 tokens=2]]", 20),
        with_postgresql_restarted(tiny_mesh, http, "Hello!", 8),
    )


async def test_a_revoked_key_is_refused_within_five_seconds(
    mock_mesh: Mesh, nodes: Nodes, http: aiohttp.ClientSession
) -> None:
    account = (await mock_mesh.sql("SELECT account_id FROM registry.accounts LIMIT 1"))[0]["account_id"]
    made = mock_mesh.cli("key", "create", account, "--name", "short-lived", "--json")
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)
    assert (await mock_mesh.chat(http, "[[mock tokens=1]]", key=key["api_key"]))[0] == 200
    revoked = mock_mesh.cli("key", "revoke", key["key_id"])
    assert revoked.returncode == 0, revoked.stderr
    started = time.monotonic()
    while (answer := await mock_mesh.chat(http, "[[mock tokens=1]]", key=key["api_key"]))[0] != 401:
        assert time.monotonic() - started < 5
    assert answer[1]["error"]["code"] == "revoked_api_key"


async def test_a_node_of_the_shipped_model_killed_before_the_first_token_is_not_seen_by_the_client(
    tiny_mesh: Mesh, http: aiohttp.ClientSession
) -> None:
    before = len(await tiny_mesh.settlements())
    tiny_mesh.signal("node", signal.SIGSTOP)  # the engine is too fast to be caught otherwise
    asking = asyncio.ensure_future(tiny_mesh.chat(http, temperature=0))
    seen = Nodes(tiny_mesh)
    await seen.busy()
    dead = tiny_mesh.kill("node")
    await tiny_mesh.restarted("node", dead)
    status, answer = await asking
    seen.close()
    assert status == 200, answer
    assert "gpu" in answer["choices"][0]["message"]["content"].lower()
    [settled] = await tiny_mesh.settled_after(before, 1)
    assert settled["outcome"] == COMPLETED
    tiny_mesh.check_ledger()


async def test_a_node_of_the_shipped_model_killed_after_content_ends_the_stream_with_an_error(
    tiny_mesh: Mesh, http: aiohttp.ClientSession
) -> None:
    before = len(await tiny_mesh.settlements())
    dead = tiny_mesh.pid("node")
    chunks = await broken_stream(
        tiny_mesh, http, "Tell me a long story", 2, "node", max_tokens=1800, ignore_eos=True, temperature=0
    )
    assert chunks[-1]["error"]["code"] == "answer_interrupted"
    assert text_of(chunks)
    [settled] = await tiny_mesh.settled_after(before, 1)
    assert (settled["outcome"], settled["charge_nano_usd"]) == (FAILED, 0)
    await tiny_mesh.restarted("node", dead)
    seen = Nodes(tiny_mesh)
    await seen.ready(1)
    seen.close()


async def test_a_scheduler_killed_under_the_shipped_model_loses_no_settlement(
    tiny_mesh: Mesh, http: aiohttp.ClientSession
) -> None:
    before = len(await tiny_mesh.settlements())
    asking = [asyncio.ensure_future(tiny_mesh.chat(http, "Tell me a long story", max_tokens=200)) for _ in range(10)]
    await asyncio.sleep(0.05)
    dead = tiny_mesh.kill("scheduler")
    answers = await asyncio.gather(*asking)
    await tiny_mesh.restarted("scheduler", dead)
    assert [status for status, _ in answers] == [200] * 10, [body for status, body in answers if status != 200]
    settled = await tiny_mesh.settled_after(before, 10)
    assert {row["outcome"] for row in settled} == {COMPLETED}
    tiny_mesh.check_ledger()
