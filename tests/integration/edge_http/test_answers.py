"""What clients get when all goes well, over HTTP, real links and certificates."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import aiohttp

from gpumesh.common.v1.job_pb2 import JobOutcome
from gpumesh.node.v1.session_pb2 import Delta, FinishReason, Frame, ToolCallDelta
from gpumesh_runtime import tracing
from gpumesh_runtime.link import fence
from tests.support.edge_client import CHAT, RawClient, chat_body, events_of, post, raw_request, stream, text_of
from tests.support.edge_peers import PRICE, EdgeMesh, PlayedJob, eventually, make_key

COST = (7 * PRICE.input_nano_usd_per_mtok + 2 * PRICE.output_nano_usd_per_mtok) // 1_000_000


async def test_an_answer_comes_whole(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    status, body = await post(http, mesh)
    assert status == 200
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert body["usage"]["total_tokens"] == 9
    assert body["system_fingerprint"].startswith("fp_")
    assert "cost_nano_usd" not in body["usage"]
    submit = mesh.dispatch.last.submit
    assert json.loads(submit.payload) == chat_body()
    assert not submit.streaming
    assert submit.deadline_ms > 0
    assert submit.window_bytes == 128 * 1024


async def test_an_answer_is_streamed(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    status, events = await stream(http, mesh, stream_options={"include_usage": True})
    assert status == 200
    assert text_of(events) == "Hello world"
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] == 2
    assert mesh.dispatch.last.submit.streaming


async def test_the_cost_is_shown_where_it_is_asked_for(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    _, by_field = await post(http, mesh, usage={"include": True})
    _, by_header = await post(http, mesh, headers={**mesh.headers, "X-Gpumesh-Cost": "1"})
    _, streamed = await stream(http, mesh, usage={"include": True})
    for usage in (by_field["usage"], by_header["usage"], streamed[-2]["usage"]):
        assert usage["cost_nano_usd"] == COST


async def test_the_hold_is_released_and_the_record_kept_until_acknowledged(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    mesh.dispatch.acknowledge = False
    await post(http, mesh)
    job = mesh.dispatch.last
    await eventually(lambda: len(mesh.dispatch.delivered) == 1 and job.job_id in mesh.router.releases)
    _, delivered = mesh.dispatch.delivered[0]
    assert mesh.router.releases[job.job_id] == COST
    assert delivered.ticket == b"ticket-" + job.job_id
    assert delivered.outcome == JobOutcome.JOB_OUTCOME_COMPLETED
    assert [(s.fence, s.start_token, s.end_token) for s in delivered.segments] == [(fence(1, 1), 0, 2)]
    assert list(delivered.receipt_tokens) == [b"receipt-" + job.job_id]
    assert len(mesh.edge.dispatcher.deliveries) == 1


async def test_admission_carries_what_the_router_decides_on(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    await post(http, mesh, n=2, max_tokens=5, logprobs=True)
    request = mesh.router.admits[-1]
    assert (request.key_id, len(request.key_sha256), request.model) == ("k1", 32, "tiny")
    assert (request.choices, request.max_output_tokens, request.attempt) == (2, 5, 1)
    assert len(request.features) == 2
    assert 0 < request.input_tokens_estimate < 50
    assert request.job_id == mesh.dispatch.last.job_id
    assert mesh.key.encode() not in request.SerializeToString()


async def test_a_tool_call_is_streamed(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def play(job: PlayedJob) -> None:
        job.frame(Frame(deltas=[Delta(tool_calls=[ToolCallDelta(name="weather", arguments='{"city"')])]))
        job.frame(Frame(deltas=[Delta(tool_calls=[ToolCallDelta(arguments=':"Oslo"}')])]))
        job.frame(Frame(deltas=[Delta(finish_reason=FinishReason.FINISH_REASON_TOOL_CALLS)]), 0, content=False)
        job.done()

    mesh.dispatch.play = play
    tools = [{"type": "function", "function": {"name": "weather"}}]
    _, events = await stream(http, mesh, tools=tools)
    calls = [call for event in events[:-1] for call in event["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city":"Oslo"}'
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_prompt_larger_than_a_submit_goes_in_pieces(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    model = mesh.router.models[0]
    large = type(model)()
    large.CopyFrom(model)
    large.context_tokens = 1 << 22
    mesh.router.models = [large]
    mesh.router.publish()
    find = mesh.edge.models.find
    await eventually(lambda: (found := find("tiny")) is not None and found.context_tokens == 1 << 22)
    text = "x" * 300_000
    status, _ = await post(http, mesh, messages=[{"role": "user", "content": text}])
    assert status == 200
    job = mesh.dispatch.last
    assert job.submit.payload_bytes == len(job.payload)
    assert json.loads(job.payload)["messages"][0]["content"] == text


async def test_models_are_listed_and_shown(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    async def get(path: str, **headers: str) -> tuple[int, Any]:
        async with http.get(mesh.base + path, headers=headers or mesh.headers) as answer:
            return answer.status, await answer.json()

    status, body = await get("/v1/models")
    assert (status, [model["id"] for model in body["data"]]) == (200, ["tiny"])
    assert await get("/v1/models/small") == (200, body["data"][0])
    status, body = await get("/v1/models/tinny")
    assert status == 404
    assert "tiny" in body["error"]["message"]
    assert (await get("/v1/models", Authorization="Bearer nonsense"))[0] == 401


async def test_models_are_shown_to_keys_that_a_router_knows_and_asked_about_until_one_was_admitted(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    async def get(key: str) -> tuple[int, Any]:
        async with http.get(mesh.base + "/v1/models", headers={"Authorization": f"Bearer {key}"}) as answer:
            return answer.status, await answer.json()

    stranger = make_key("k2")
    mesh.router.unknown_keys.add(hashlib.sha256(stranger.encode()).digest())
    status, body = await get(stranger)
    assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    key = mesh.headers["Authorization"].removeprefix("Bearer ")
    assert (await get(key))[0] == 200
    assert mesh.router.authenticated == 2
    assert (await post(http, mesh))[0] == 200
    assert (await get(key))[0] == 200
    assert mesh.router.authenticated == 2


async def test_health_ready_and_metrics_answer_without_a_key(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    for path, says in (("/health", "ok"), ("/ready", "ready"), ("/metrics", "gpumesh_edge_requests_total")):
        async with http.get(mesh.base + path) as answer:
            assert answer.status == 200
            assert says in await answer.text()
    async with http.get(mesh.base + "/metrics", headers={"X-Forwarded-For": "192.0.2.1"}) as answer:
        assert answer.status == 404, "what a proxy passes on did not come from this machine"
    await mesh.stop_router()
    await eventually(lambda: not mesh.health.ready)
    async with http.get(mesh.base + "/ready") as answer:
        assert answer.status == 503


async def test_a_request_id_is_given_back_and_made_where_there_is_none(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    sent = {**mesh.headers, "X-Request-Id": "abc-1.2"}
    async with http.post(mesh.base + CHAT, json=chat_body(), headers=sent) as answer:
        assert answer.headers["X-Request-Id"] == "abc-1.2"
    sent["X-Request-Id"] = "<script>" + "x" * 500
    async with http.post(mesh.base + CHAT, json=chat_body(), headers=sent) as answer:
        assert answer.headers["X-Request-Id"].startswith("req_")


async def test_one_connection_serves_many_requests_also_pipelined(mesh: EdgeMesh) -> None:
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh) * 3)
        for _ in range(3):
            status, body = await client.answer()
            assert status == 200
            assert json.loads(body)["choices"]


async def test_an_http_1_0_client_gets_its_stream_without_chunks(mesh: EdgeMesh) -> None:
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh, stream=True).replace(b"HTTP/1.1", b"HTTP/1.0"))
        status, headers = await client.head()
        assert status == 200
        assert "transfer-encoding" not in headers
        assert text_of(events_of((await client.rest()).decode())) == "Hello world"


async def test_a_client_that_waits_to_be_told_may_go_on(mesh: EdgeMesh) -> None:
    async with RawClient(mesh) as client:
        head, _, body = raw_request(mesh, extra="Expect: 100-continue\r\n").partition(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert (await client.answer())[0] == 200


@dataclass(frozen=True)
class _Always:
    trace_ratio: float
    otlp_endpoint: str = ""


async def test_a_sampled_request_carries_its_trace_to_the_scheduler(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    try:
        tracing.setup(_Always(1.0), "test")
        await post(http, mesh)
        assert tracing.sampled(mesh.dispatch.last.submit.traceparent)
        tracing.setup(_Always(0.0), "test")
        await post(http, mesh)
        assert mesh.dispatch.last.submit.traceparent == ""
    finally:
        tracing.setup(_Always(0.01), "test")
