"""What clients write and engines answer is nowhere but on its way: not in logs, traces, metrics, database, WAL, journals, temporary
files or core dumps, whatever goes wrong. And a trace tells of a request without it.

One mesh with debug logging, every request traced, core dumps allowed by the shell and all temporary files in its folder.
"""

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpumesh_client.client import Client
from gpumesh_runtime.errors import MeshError
from tests.support.gauges import Gauges
from tests.support.leaks import Search, ascii_marker, forms, hard_marker
from tests.support.mesh import Mesh, Nodes
from tests.support.otlp_collector import Collector, attributes, collector
from tests.support.ports import free_port_block
from tests.support.raw_http import Clients

SERVICES = ("REGISTRY", "METERING", "ROUTER", "SCHEDULER", "EDGE_HTTP", "NODE")


class Secret:
    """Text that must not stay anywhere."""

    def __init__(self) -> None:
        self.easy, self.hard = ascii_marker(), hard_marker()
        self.text = f"{self.easy} {self.hard}"
        self.search = Search((self.easy, self.hard))


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    """Where all processes send their spans."""
    with collector() as made:
        yield made


def talkative(spans: Collector, *args: str) -> Mesh:
    """A mesh that says as much as it can, with its temporary files and core dumps below its own folder."""
    mesh = Mesh(Path(tempfile.mkdtemp(prefix="gpumesh-test-")), free_port_block(48))
    mesh.cwd = mesh.home / "cwd"
    mesh.cwd.mkdir()
    temporary = mesh.home / "tmp"
    temporary.mkdir()
    mesh.env["TMPDIR"] = str(temporary)
    for service in SERVICES:
        mesh.env |= {
            f"GPUMESH_{service}_LOG_LEVEL": "debug",
            f"GPUMESH_{service}_OTLP_ENDPOINT": spans.endpoint,
            f"GPUMESH_{service}_TRACE_RATIO": "1",
        }
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        mesh.up(*args)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))
    return mesh


@pytest.fixture(scope="module")
def secret() -> Secret:
    """What all tests here say."""
    return Secret()


@pytest.fixture(scope="module")
def mesh(spans: Collector, secret: Secret) -> Iterator[Mesh]:
    """Two nodes of mock-model. What they leave when they stop is searched too."""
    made = talkative(spans, "--engine", "mock", "--nodes", "2")
    try:
        yield made
        assert made.local("down").returncode == 0
        assert secret.search.folder(made.home) == []
    finally:
        made.stop()


@pytest.fixture
def tiny(spans: Collector, secret: Secret) -> Iterator[Mesh]:
    """The shipped model on llama.cpp."""
    made = talkative(spans)
    try:
        yield made
    finally:
        made.stop()


def wordy(secret: Secret) -> dict[str, Any]:
    """A valid request with the secret in every place where a client may write."""
    schema = {
        "type": "object",
        "description": secret.text,
        "properties": {secret.easy: {"type": "string", "enum": [secret.hard]}},
    }
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": json.dumps(secret.text)}}
    return {
        "messages": [
            {"role": "system", "content": f"{secret.text} system"},
            {"role": "user", "content": [{"type": "text", "text": secret.text}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": secret.text},
            {"role": "user", "content": f"[[mock echo=1]] {secret.text}"},
        ],
        "tools": [{"type": "function", "function": {"name": "look", "description": secret.text, "parameters": schema}}],
        "stop": [secret.hard[:8] + "never"],
        "user": secret.easy,
        "metadata": {"note": secret.text},
        "unknown_field": secret.text,
    }


async def post(
    mesh: Mesh, http: aiohttp.ClientSession, body: Any, path: str = "/chat/completions", **headers: str
) -> tuple[int, str]:
    """Status and text; a dict is sent as JSON, other data as it is."""
    data = body if isinstance(body, bytes) else json.dumps({"model": mesh.client["model"], **body}).encode()
    given = {**mesh.headers(), "Content-Type": "application/json", **headers}
    async with http.post(mesh.client["base_url"] + path, data=data, headers=given) as answer:
        return answer.status, await answer.text()


async def talk(mesh: Mesh, http: aiohttp.ClientSession, secret: Secret) -> None:
    """Requests that succeed, over HTTP and gRPC, short and in pieces."""
    status, text = await post(mesh, http, wordy(secret))
    assert status == 200, text
    assert secret.text in json.loads(text)["choices"][0]["message"]["content"]
    status, text = await post(mesh, http, {**wordy(secret), "stream": True})
    assert (status, secret.easy in text) == (200, True), text
    status, text = await post(mesh, http, mesh.body(f"[[mock tokens=3]] {secret.text * 1500}"))  # 80 KB
    assert status == 200, text
    with Client.from_file(mesh.home / "client.json") as client:
        answer = await asyncio.to_thread(client.chat, [("user", f"[[mock echo=1]] {secret.text}")])
    assert secret.text in answer.text


async def go_wrong(mesh: Mesh, http: aiohttp.ClientSession, secret: Secret) -> None:
    """Requests that fail, in each layer."""
    user = [{"role": "user", "content": secret.text}]
    refused: list[dict[str, Any] | bytes] = [
        {"messages": user, "temperature": secret.text},
        {"messages": user, "temperature": 99},
        {"messages": user, "n": secret.text},
        {"messages": user, "tools": [{"type": secret.text}]},
        {"messages": user, "model": secret.text},
        {"messages": user, "response_format": {"type": "json_schema", "json_schema": {"name": secret.easy}}},
        {"messages": user, "tool_choice": {"type": "function", "function": {"name": secret.easy}}},
        {"messages": [{"role": secret.text, "content": secret.text}]},
        {"messages": secret.text},
        {"messages": [{"role": "user", "content": f"{secret.text} " * 5_000}]},  # beyond the context
        f'{{"messages": ["{secret.easy}"'.encode(),
        secret.text.encode(),
    ]
    for body in refused:
        status, text = await post(mesh, http, body)
        assert 400 <= status < 500, text
    assert (await post(mesh, http, {"messages": user}, Authorization=f"Bearer gm_live_{secret.easy}"))[0] == 401
    assert (await post(mesh, http, {"messages": user}, Authorization=secret.easy))[0] == 401
    assert (await post(mesh, http, {"messages": user}, **{"Content-Type": secret.easy}))[0] == 415
    assert (await post(mesh, http, {"messages": user}, f"/{secret.easy}"))[0] == 404
    for fault in (
        "error=engine",
        "error=rejected",
        "error=context",
        "die_after=2",
        "garbage_after=2",
        f"tokens={secret.easy}",
    ):
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": f"[[mock {fault}]] {secret.text}"}], "stream": stream}
            _, text = await post(mesh, http, body)
            assert '"error"' in text, (fault, text)
    with Client.from_file(mesh.home / "client.json") as client:
        for question, model in ((f"[[mock error=rejected]] {secret.text}", ""), (secret.text, secret.easy)):
            with pytest.raises(MeshError):
                await asyncio.to_thread(client.chat, [("user", question)], model=model)


async def read(mesh: Mesh, http: aiohttp.ClientSession, body: dict[str, Any]) -> None:
    """Reads a stream until whatever ends it."""
    try:
        await post(mesh, http, {**body, "stream": True})
    except aiohttp.ClientError:
        return


async def break_down(mesh: Mesh, http: aiohttp.ClientSession, secret: Secret) -> None:
    """Clients leave and processes die in the middle of answers."""
    slow = {"messages": [{"role": "user", "content": "[[mock echo=1 tps=20]] " + f"{secret.text} " * 400}]}
    nodes = Nodes(mesh)
    with Clients(mesh) as clients:
        client = await clients.ask(slow["messages"][0]["content"])
        await client.read_events(8)
    await nodes.idle()
    waits = {"messages": [{"role": "user", "content": f"[[mock delay_s=60]] {secret.text}"}]}
    for deaths in (
        {"node": signal.SIGSEGV, "node-2": signal.SIGKILL},
        {"scheduler": signal.SIGSEGV, "router": signal.SIGABRT},
        {"edge-http": signal.SIGSEGV},
        {"edge-http": signal.SIGKILL, "scheduler": signal.SIGKILL},
    ):
        # 16 slots: some of these wait in the scheduler's queue.
        reading = [asyncio.create_task(read(mesh, http, slow)) for _ in range(8)]
        waiting = [asyncio.create_task(read(mesh, http, waits)) for _ in range(12)]
        await nodes.busy(16)
        dead = {name: mesh.signal(name, number) for name, number in deaths.items()}
        for name, pid in dead.items():
            await mesh.restarted(name, pid)
        for task in (*reading, *waiting):
            task.cancel()
        await asyncio.gather(*reading, *waiting, return_exceptions=True)
        await nodes.ready(2)
        await serves(mesh, http)
    nodes.close()


async def serves(mesh: Mesh, http: aiohttp.ClientSession) -> None:
    """Waits until a request is answered again."""
    async with asyncio.timeout(30):
        while True:
            try:
                if (await mesh.chat(http, "[[mock tokens=1]]"))[0] == 200:
                    return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)


async def rows(mesh: Mesh) -> str:
    """Every row of every table, as text: pages on disk may be compressed."""
    tables = await mesh.sql(
        "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables "
        "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
    )
    assert len(tables) > 8
    texts: list[str] = []
    for table in tables:
        texts += [str(row["text"]) for row in await mesh.sql(f"SELECT t::text AS text FROM {table['name']} t")]
    return "\n".join(texts)


async def everything(mesh: Mesh, http: aiohttp.ClientSession, spans: Collector, search: Search) -> list[str]:
    """Where a secret is found, of all places that outlive a request."""
    await mesh.sql("CHECKPOINT")
    hits = search.folder(mesh.home)
    hits += search.data("a database row", (await rows(mesh)).encode())
    hits += search.data("a span", b"".join(spans.raw))
    gauges = Gauges(mesh, http)
    for process in {path.stem for path in (mesh.home / "pids").glob("*.pid")} - {"postgres", "launcher", "supervisor"}:
        hits += search.data(f"metrics of {process}", (await gauges.text(process)).encode())
    return hits


async def prove_that_the_search_works(mesh: Mesh, http: aiohttp.ClientSession, spans: Collector) -> None:
    """Plants other markers where the search looks, in each form, and finds each of them."""
    control = Secret()
    planted = mesh.home / "tmp" / "planted"
    for marker in (control.easy, control.hard):
        for name, form in forms(marker).items():
            planted.write_bytes(b"\0\1 something before: " + form + b" and after")
            hits = control.search.folder(mesh.home)
            assert [hit for hit in hits if hit.startswith("tmp/planted: ")], name
    planted.unlink()
    await mesh.sql("CREATE TABLE public.planted (text text)")
    await mesh.sql("INSERT INTO public.planted VALUES ($1)", control.text)
    places = " ".join(await everything(mesh, http, spans, control.search))
    assert all(place in places for place in ("pg/base/", "/pg_wal/", "a database row: plain")), places
    await mesh.sql("DROP TABLE public.planted")
    assert b"chat" in b"".join(spans.raw)


def prove_that_core_dumps_would_be_found(mesh: Mesh) -> None:
    """A process of ours without our precautions leaves its memory in the folder that is searched, unless this machine collects dumps."""
    control = ascii_marker()
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if hard == 0 or pattern.startswith(("|", "/")):
        return
    limits = Path(f"/proc/{mesh.pid('launcher')}/limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4] != "0"
    code = "import os, sys; kept = [sys.argv[1] * 2]; os.abort()"
    subprocess.run(
        ["/bin/sh", "-c", 'ulimit -c "$(ulimit -Hc)"; exec "$@"', "sh", sys.executable, "-c", code, control],
        cwd=mesh.cwd,
        check=False,
        capture_output=True,
    )
    hits = Search([control]).folder(mesh.home)
    assert [hit for hit in hits if "core" in hit], hits
    for path in mesh.home.glob("cwd/core*"):
        path.unlink()


@pytest.mark.parametrize("stream", [False, True])
async def test_one_trace_leads_from_http_over_the_session_to_the_engine(
    mesh: Mesh, http: aiohttp.ClientSession, spans: Collector, stream: bool
) -> None:
    status, text = await post(mesh, http, {**mesh.body("[[mock tokens=7]]"), "stream": stream})
    assert status == 200, text
    answer = json.loads(text.split("\n")[0].removeprefix("data: "))
    trace_id = await logged_trace_id(mesh, answer["id"].removeprefix("chatcmpl-"))
    async with asyncio.timeout(10):
        while len(found := [(name, span) for name, span in spans.spans if span.trace_id.hex() == trace_id]) < 3:
            await asyncio.sleep(0.05)
    assert len(found) == 3
    by_service = dict(found)
    edge, scheduler, node = (by_service[name] for name in ("edge-http", "scheduler", "node"))
    assert (edge.parent_span_id, scheduler.parent_span_id, node.parent_span_id) == (
        b"",
        edge.span_id,
        scheduler.span_id,
    )
    assert edge.start_time_unix_nano <= scheduler.start_time_unix_nano <= node.start_time_unix_nano
    assert node.end_time_unix_nano <= edge.end_time_unix_nano
    model = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "mock-model"}
    usage = {"gen_ai.usage.input_tokens": 2, "gen_ai.usage.output_tokens": 7}
    assert attributes(edge).items() >= {**model, **usage, "http.response.status_code": 200}.items()
    assert attributes(scheduler).items() >= model.items()
    assert attributes(node).items() >= {**model, **usage, "gen_ai.provider.name": "mock-model"}.items()


async def test_the_trace_of_a_request_that_fails_says_why(
    mesh: Mesh, http: aiohttp.ClientSession, spans: Collector
) -> None:
    before = len(spans.spans)
    status, _ = await post(mesh, http, mesh.body("[[mock error=rejected]]"))
    assert status == 400
    async with asyncio.timeout(10):
        while len({name for name, _ in spans.spans[before:]}) < 3:
            await asyncio.sleep(0.05)
    assert {attributes(span)["error.type"] for _, span in spans.spans[before:]} == {"ENGINE_REJECTED"}
    assert {span.status.code for _, span in spans.spans[before:]} == {2}


async def logged_trace_id(mesh: Mesh, job_id: str) -> str:
    """Of a request, from the edge's log line: that is how a person finds its trace."""
    async with asyncio.timeout(5):
        while True:
            for line in (mesh.home / "logs" / "edge-http.log").read_text().splitlines():
                if job_id in line:
                    return str(json.loads(line)["trace_id"])
            await asyncio.sleep(0.02)


@pytest.mark.timeout(240)
async def test_no_text_of_clients_or_engines_stays_anywhere(
    mesh: Mesh, http: aiohttp.ClientSession, spans: Collector, secret: Secret
) -> None:
    await talk(mesh, http, secret)
    await go_wrong(mesh, http, secret)
    await break_down(mesh, http, secret)
    prove_that_core_dumps_would_be_found(mesh)
    await prove_that_the_search_works(mesh, http, spans)
    logs = "".join(path.read_text() for path in (mesh.home / "logs").glob("*.log"))
    assert logs.count('"event":"request"') > 50
    assert not list(mesh.home.glob("**/core*")), "a process that held prompts left its memory"
    assert await everything(mesh, http, spans, secret.search) == []


async def test_no_text_stays_anywhere_when_llama_cpp_answers_and_dies(
    tiny: Mesh, http: aiohttp.ClientSession, spans: Collector, secret: Secret
) -> None:
    schema = {"type": "object", "properties": {secret.easy: {"type": "string"}}, "required": [secret.easy]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for more in ({}, {"response_format": form, "max_tokens": 40}, {"temperature": secret.easy}):
        status, text = await post(tiny, http, {"messages": [{"role": "user", "content": secret.text}], **more})
        assert status == (400 if "temperature" in more else 200), text
    story = {"messages": [{"role": "user", "content": f"Tell me a long story about {secret.text}"}]}
    for victim in (engine_pid(tiny), tiny.pid("node")):
        reading = asyncio.create_task(read(tiny, http, {**story, "max_tokens": 1800, "ignore_eos": True}))
        nodes = Nodes(tiny)
        await nodes.busy()
        os.kill(victim, signal.SIGSEGV)
        await reading
        await nodes.ready(1)
        nodes.close()
    assert not list(tiny.home.glob("**/core*")), "a process that held prompts left its memory"
    assert await everything(tiny, http, spans, secret.search) == []


def engine_pid(mesh: Mesh) -> int:
    """The process of llama.cpp: the node's only child."""
    [child] = Path(f"/proc/{mesh.pid('node')}/task/{mesh.pid('node')}/children").read_text().split()
    return int(child)
