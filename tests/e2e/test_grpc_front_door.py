"""The gRPC front door as an internal team uses it: generated stubs, TLS, an API key, nothing of ours but client.json."""

import asyncio
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gpumesh.node.v1.session_pb2 import FINISH_REASON_TOOL_CALLS
from gpumesh.router.v1 import inference_service_pb2 as pb
from gpumesh.router.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.support.gauges import Gauges
from tests.support.mesh import Mesh, Nodes

COMPLETED, CANCELLED = 1, 2
HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "use-the-grpc-front-door.md"
SLOW = "[[mock tps=50 tokens=2000]]"


class Door:
    """A client of a mesh's front door."""

    def __init__(self, mesh: Mesh, api_key: str = "") -> None:
        tls = grpc.ssl_channel_credentials(Path(mesh.client["ca_file"]).read_bytes())
        self.channel = grpc.aio.secure_channel(mesh.client["grpc_target"], tls)
        self.model = mesh.client["model"]
        self._stub: Any = InferenceServiceStub(self.channel)  # typed for blocking channels
        self.key = f"Bearer {api_key or mesh.client['api_key']}"

    def infer(self, text: str = "Hello", *, key: str | None = None, timeout: float = 30, **fields: Any) -> Any:
        """A call. fields: of InferRequest, or max_tokens and temperature of ChatInput."""
        chat = {name: fields.pop(name) for name in ("max_tokens", "temperature") if name in fields}
        if "openai_json" not in fields:
            fields["chat"] = pb.ChatInput(messages=[pb.ChatMessage(role="user", content=text)], **chat)
        request = pb.InferRequest(model=fields.pop("model", self.model), **fields)
        given = self.key if key is None else key
        return self._stub.Infer(request, timeout=timeout, metadata=[("authorization", given)] if given else [])

    async def ask(self, text: str = "Hello", **fields: Any) -> list[Any]:
        """All events of a call. Raises grpc.aio.AioRpcError."""
        events: list[Any] = []
        await self.collect(events, text, **fields)
        return events

    async def collect(self, events: list[Any], text: str, **fields: Any) -> None:
        """As ask, but what came before an error is in `events`."""
        async for event in self.infer(text, **fields):
            events.append(event)  # noqa: PERF401 -- a comprehension would lose them


@pytest.fixture
async def door(mock_mesh: Mesh, http: aiohttp.ClientSession) -> AsyncIterator[Door]:
    """The mock mesh's, at rest before and after."""
    made, gauges = Door(mock_mesh), Gauges(mock_mesh, http)
    await gauges.at_rest()
    yield made
    await made.channel.close()
    await gauges.at_rest()


@pytest.fixture
async def tiny_door(tiny_mesh: Mesh) -> AsyncIterator[Door]:
    made = Door(tiny_mesh)
    yield made
    await made.channel.close()


def info(err: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """The ErrorInfo of a failed call."""
    details = dict(err.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    found = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(found) for detail in status_pb2.Status.FromString(details).details)
    assert found.domain == "gpumesh"
    return found


def text_of(events: Sequence[Any]) -> str:
    return "".join(delta.text for event in events for delta in event.frame.deltas)


def test_the_client_of_the_how_to_is_20_lines_and_works_with_only_client_json(tiny_mesh: Mesh, tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    assert code is not None
    assert len([line for line in code[1].splitlines() if line.strip()]) <= 20
    (tmp_path / ".gpumesh").mkdir()
    (tmp_path / ".gpumesh" / "client.json").write_text(json.dumps(tiny_mesh.client))
    # No environment: nothing but the installed package and the file.
    done = subprocess.run(
        [sys.executable, "-c", code[1]],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer, last = done.stdout.strip().rsplit("\n", 1)
    assert "gpu" in answer.lower()
    tokens = re.fullmatch(r"(\d+) tokens, (\d+) nano-USD", last)
    assert tokens is not None, last
    assert 0 < int(tokens[1]) <= 60
    assert int(tokens[2]) > 0


async def test_an_answer_begins_with_its_job_and_ends_with_usage_charge_and_price(mock_mesh: Mesh, door: Door) -> None:
    before = len(await mock_mesh.settlements())
    job_id = uuid.uuid4().bytes
    events = await door.ask("[[mock tokens=9]]", job_id=job_id)
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("started", {"frame"}, "completed")
    assert (events[0].started.job_id, events[0].started.model_id) == (job_id, "mock-model")
    completed = events[-1].completed
    assert completed.usage.completion_tokens == len(text_of(events).split()) == 9
    [settled] = await mock_mesh.settled_after(before, 1)
    assert (settled["job_id"], settled["outcome"]) == (job_id, COMPLETED)
    assert settled["charge_nano_usd"] == completed.charge_nano_usd > 0
    assert settled["output_nano_usd_per_mtok"] == completed.price.output_nano_usd_per_mtok


@pytest.mark.parametrize(
    ("fields", "code", "reason", "metadata"),
    [
        ({"key": ""}, grpc.StatusCode.UNAUTHENTICATED, "MISSING_API_KEY", {}),
        ({"key": "Bearer gm_live_nothing"}, grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY", {}),
        ({"model": "mock-modle"}, grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", {"near": "mock-model"}),
        ({"temperature": 99}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", {"param": "temperature"}),
        ({"job_id": b"short"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", {"param": "job_id"}),
        ({"openai_json": b"{"}, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", {"param": "openai_json"}),
        ({"text": "word " * 60_000}, grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", {"limit": "32768"}),
        ({"text": "[[mock error=rejected]]"}, grpc.StatusCode.INVALID_ARGUMENT, "ENGINE_REJECTED", {}),
        (
            {"text": "[[mock tokens=9 die_after=3]]"},
            grpc.StatusCode.ABORTED,
            "ANSWER_INTERRUPTED",
            {"cause": "ENGINE_ERROR"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_error_has_a_status_a_reason_and_what_to_mend(
    mock_mesh: Mesh, door: Door, fields: dict[str, Any], code: grpc.StatusCode, reason: str, metadata: dict[str, str]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await door.ask(**fields)
    found = info(failed.value)
    assert (failed.value.code(), found.reason) == (code, reason)
    assert metadata.items() <= dict(found.metadata).items()
    assert failed.value.details()


async def test_an_account_without_credit_is_told_so(mock_mesh: Mesh, door: Door) -> None:
    made = json.loads(mock_mesh.cli("account", "create", "Poor", "--json").stdout)
    key = json.loads(mock_mesh.cli("key", "create", made["account_id"], "--json").stdout)["api_key"]
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await door.ask(key=f"Bearer {key}")
    assert failed.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert info(failed.value).reason == "INSUFFICIENT_BALANCE"


async def test_a_deadline_in_the_middle_of_an_answer_charges_for_what_was_delivered(
    mock_mesh: Mesh, door: Door
) -> None:
    before = len(await mock_mesh.settlements())
    events: list[Any] = []
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await door.collect(events, SLOW, timeout=1.0)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    tokens = len(text_of(events).split())
    assert tokens > 10
    [settled] = await mock_mesh.settled_after(before, 1)
    assert (settled["outcome"], settled["charge_nano_usd"] > 0) == (CANCELLED, True)
    assert tokens <= settled["completion_tokens"] <= tokens + 32


async def test_the_deadline_is_reported_by_the_mesh_with_its_reason(door: Door) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await door.ask("[[mock delay_s=30 tokens=1]]", timeout=1.0)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert info(failed.value).reason == "DEADLINE_EXCEEDED"


async def test_cancelling_a_call_or_closing_its_channel_frees_the_slot(mock_mesh: Mesh, door: Door) -> None:
    before = len(await mock_mesh.settlements())
    nodes, other = Nodes(mock_mesh), Door(mock_mesh)
    calls = [door.infer(SLOW), other.infer("[[mock delay_s=30 tokens=1]]")]
    reading = [asyncio.create_task(anext(aiter(call))) for call in calls]
    await nodes.busy(2)
    calls[0].cancel()
    await other.channel.close()
    await nodes.idle(2.0)
    await asyncio.gather(*reading, return_exceptions=True)
    settled = await mock_mesh.settled_after(before, 2)
    assert {row["outcome"] for row in settled} == {CANCELLED}
    nodes.close()


async def test_a_second_call_with_the_id_of_a_running_job_is_refused_and_the_first_goes_on(
    mock_mesh: Mesh, door: Door
) -> None:
    job_id = uuid.uuid4().bytes
    first = door.infer("[[mock tps=40 tokens=40]]", job_id=job_id)
    events = [await anext(aiter(first))]
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await door.ask("[[mock tokens=1]]", job_id=job_id)
    assert (failed.value.code(), info(failed.value).reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")
    events += [event async for event in first]
    assert len(text_of(events).split()) == 40
    assert events[-1].completed.usage.completion_tokens == 40


async def test_openai_json_brings_tools_and_json_schemas(tiny_door: Door) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Weather of a city", "parameters": parameters}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [{"type": "function", "function": function}],
        "temperature": 0,
        "max_tokens": 100,
    }
    events = await tiny_door.ask(openai_json=json.dumps(body).encode())
    deltas = [delta for event in events for delta in event.frame.deltas]
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert calls[0].name == "get_weather"
    assert json.loads("".join(call.arguments for call in calls)) == {"city": "Paris"}
    assert deltas[-1].finish_reason == FINISH_REASON_TOOL_CALLS

    person = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    body = {
        "model": tiny_door.model,
        "messages": [{"role": "user", "content": "Give me a person as JSON."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": person, "strict": True}},
        "temperature": 0,
        "max_tokens": 100,
    }
    found = json.loads(text_of(await tiny_door.ask(openai_json=json.dumps(body).encode(), model="")))
    assert set(found) == {"name", "age"}
    assert isinstance(found["age"], int)
