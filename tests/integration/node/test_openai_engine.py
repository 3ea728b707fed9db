"""The OpenAI-compatible adapter against a server that misbehaves in every way that real ones do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpumesh.node.v1 import session_pb2
from gpumesh_node.domain.deltas import Delta, FinishReason
from gpumesh_node.domain.failures import EngineFailure
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.domain.request import EngineRequest
from gpumesh_node.engines.openai_http import HttpEngineSettings, OpenAiHttpEngine
from tests.support.node_openai import Answerer, FakeOpenAi, Request, delta, finish, speak, sse, usage
from tests.support.node_process import node_settings, running_node
from tests.support.node_scheduler import FENCE, FakeScheduler, NodeCertificates, chat

MODEL = ServedModel("m", 4)


def request(payload: bytes | None = None, *, streaming: bool = True, cap: int = 32) -> EngineRequest:
    """One job as the adapter gets it."""
    return EngineRequest(payload or chat("hi"), "m", cap, streaming)


@asynccontextmanager
async def engine(server: FakeOpenAi, **settings: Any) -> AsyncIterator[OpenAiHttpEngine]:
    """An adapter whose pool is open and whose models were looked up."""
    made = OpenAiHttpEngine(replace(HttpEngineSettings("e", server.base_url, {"engine-model": MODEL}), **settings))
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def everything(made: OpenAiHttpEngine, asked: EngineRequest) -> tuple[list[Delta], Any]:
    """All deltas of an answer, and the answer."""
    answer = await made.generate(asked)
    deltas: list[Delta] = []
    try:
        while more := await answer.read():
            deltas += more
    except EngineFailure:
        answer.abort()
        raise
    await answer.release()
    return deltas, answer


def text(deltas: list[Delta]) -> str:
    """Their text."""
    return "".join(item.text for item in deltas)


def raw(*pieces: bytes) -> Callable[[Request, Answerer], Awaitable[None]]:
    """A stream in exactly these pieces, each written when the loop has turned."""

    async def serve(_: Request, answer: Answerer) -> None:
        await answer.head()
        for piece in pieces:
            await answer.chunk(piece)
            await asyncio.sleep(0.002)
        await answer.end()

    return serve


async def test_a_stream_becomes_deltas_and_usage_is_the_engines() -> None:
    async with FakeOpenAi() as server, engine(server) as made:
        deltas, answer = await everything(made, request())
        assert text(deltas) == "Hello world"
        assert deltas[-1].finish is FinishReason.STOP
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)


async def test_what_the_engine_gets_is_capped_and_names_its_own_model() -> None:
    async with FakeOpenAi() as server, engine(server, api_key="k") as made:
        await everything(made, request(chat("hi", max_completion_tokens=99, custom=[1, {"a": None}]), cap=32))
        await everything(made, request(chat("hi", max_tokens=5), streaming=False))
        first, second = server.requests
        assert (first.body["model"], first.body["max_tokens"], first.body["stream"]) == ("engine-model", 32, True)
        assert first.body["stream_options"] == {"include_usage": True}
        assert "max_completion_tokens" not in first.body
        assert first.body["custom"] == [1, {"a": None}]
        assert first.headers["authorization"] == "Bearer k"
        assert (second.body["max_tokens"], second.body["stream"]) == (5, False)
        assert "stream_options" not in second.body


async def test_connections_are_used_again() -> None:
    async with FakeOpenAi() as server, engine(server) as made:
        for streaming in (True, False, True, True):
            await everything(made, request(streaming=streaming))
        assert server.connections == 1


async def test_a_connection_that_closed_while_idle_is_replaced() -> None:
    async def serve(asked: Request, answer: Answerer) -> None:
        await speak(["ok"], asked, answer)
        answer.writer.close()  # as llama.cpp after 5 s, but at once

    async with FakeOpenAi(serve) as server, engine(server) as made:
        for _ in range(5):
            assert text((await everything(made, request()))[0]) == "ok"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
async def test_events_may_be_cut_anywhere(size: int) -> None:
    stream = b"".join(sse(event) for event in (delta("Grüße "), delta("世界 🌍"), finish(), usage(2, 9), "[DONE]"))
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    async with FakeOpenAi(raw(*pieces)) as server, engine(server) as made:
        deltas, answer = await everything(made, request())
        assert text(deltas) == "Grüße 世界 🌍"
        assert answer.usage.completion_tokens == 9


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([b"data: {garbage\n\n"], "ENGINE_ERROR"),
        ([b"data: [1]\n\n"], "ENGINE_ERROR"),
        ([sse(delta("a")), b'data: {"choices": "x"}\n\n'], "ENGINE_ERROR"),
        ([sse(delta("a"))], "ENGINE_ERROR"),
        ([sse(delta("a")), b"data: [DONE]\n\n"], "ENGINE_ERROR"),
        ([sse(delta("a", index=5))], "ENGINE_ERROR"),
        ([sse({"error": {"message": "CUDA out of memory", "code": 500}})], "ENGINE_ERROR"),
        ([sse({"error": {"message": "x", "type": "exceed_context_size_error"}})], "CONTEXT_LENGTH_EXCEEDED"),
    ],
)
async def test_an_answer_that_is_none_is_a_failure(pieces: list[bytes], reason: str) -> None:
    async with FakeOpenAi(raw(*pieces)) as server, engine(server) as made:
        with pytest.raises(EngineFailure) as caught:
            await everything(made, request())
        assert caught.value.reason == reason


async def test_a_stream_without_done_is_complete_when_its_choices_are() -> None:
    async with FakeOpenAi(raw(sse(delta("a")), sse(finish("length")).rstrip(b"\n"))) as server, engine(server) as made:
        deltas, _ = await everything(made, request())
        assert (text(deltas), deltas[-1].finish) == ("a", FinishReason.LENGTH)


async def test_a_server_that_does_not_stream_is_taken_as_it_is() -> None:
    async def serve(asked: Request, answer: Answerer) -> None:
        asked.body["stream"] = False
        await speak(["whole"], asked, answer)

    async with FakeOpenAi(serve) as server, engine(server) as made:
        assert text((await everything(made, request()))[0]) == "whole"


@pytest.mark.parametrize(
    ("status", "body", "reason", "retryable"),
    [
        (500, {"error": "boom"}, "ENGINE_ERROR", True),
        (503, "not even an object", "ENGINE_ERROR", True),
        (429, {}, "ENGINE_ERROR", True),
        (404, {"error": {"message": "model not found"}}, "ENGINE_UNAVAILABLE", True),
        (401, {}, "ENGINE_UNAVAILABLE", True),
        (400, {"error": {"message": "bad", "param": "stop"}}, "ENGINE_REJECTED", False),
        (
            400,
            {"error": {"message": "This model's maximum context length is 2048 tokens.", "code": 400}},
            "CONTEXT_LENGTH_EXCEEDED",
            False,
        ),
    ],
)
async def test_statuses_mean_what_they_mean_to_the_buyer(
    status: int, body: object, reason: str, retryable: bool
) -> None:
    async def serve(_: Request, answer: Answerer) -> None:
        await answer.json(body, status)

    async with FakeOpenAi(serve) as server, engine(server) as made:
        with pytest.raises(EngineFailure) as caught:
            await made.generate(request())
        assert (caught.value.reason, caught.value.retryable) == (reason, retryable)


async def test_nobody_listening_is_retryable() -> None:
    async with FakeOpenAi() as server:
        address = server.base_url
    made = OpenAiHttpEngine(HttpEngineSettings("e", address, {"engine-model": MODEL}))
    await made.open()
    try:
        with pytest.raises(EngineFailure) as caught:
            await made.generate(request())
        assert caught.value.retryable
        assert not await made.look()
        assert made.models()[0].state is ModelState.FAILED
    finally:
        await made.close()


async def test_a_look_finds_models_that_come_and_go() -> None:
    async with FakeOpenAi() as server, engine(server) as made:
        changes: list[int] = []
        made.on_change = lambda: changes.append(1)
        assert await made.look()
        assert made.models()[0].state is ModelState.READY
        server.models = []
        assert not await made.look()
        assert made.models()[0].state is ModelState.FAILED
        assert len(changes) == 2


async def test_a_reset_in_the_middle_is_a_failure() -> None:
    async def serve(_: Request, answer: Answerer) -> None:
        await answer.head()
        await answer.events(delta("a"))
        answer.cut()

    async with FakeOpenAi(serve) as server, engine(server) as made:
        with pytest.raises(EngineFailure) as caught:
            await everything(made, request())
        assert caught.value.retryable


async def test_always_stream_merges_for_a_client_that_wants_it_whole() -> None:
    async with FakeOpenAi() as server, engine(server, always_stream=True) as made:
        answer = await made.generate(request(streaming=False))
        deltas = await answer.read()
        assert [(item.text, item.finish) for item in deltas] == [("Hello world", FinishReason.STOP)]
        assert not await answer.read()
        assert server.requests[0].body["stream"] is True


@pytest.mark.parametrize("streaming", [True, False])
async def test_split_choices_are_one_answer(streaming: bool) -> None:
    async with FakeOpenAi() as server, engine(server, split_choices=True) as made:
        deltas, answer = await everything(made, request(chat("hi", n=3, seed=7), streaming=streaming))
        assert [request.body["n"] for request in server.requests] == [1, 1, 1]
        assert sorted(request.body["seed"] for request in server.requests) == [7, 8, 9]
        for choice in range(3):
            assert text([item for item in deltas if item.choice == choice]) == "Hello world"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
        assert streaming or len(deltas) == 3


async def test_more_choices_than_an_engine_can_split_are_refused() -> None:
    async with FakeOpenAi() as server, engine(server, split_choices=True) as made:
        with pytest.raises(EngineFailure) as caught:
            await made.generate(request(chat("hi", n=17)))
        assert caught.value.metadata == {"param": "n", "limit": "16"}


# --- through a whole node -------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def node_with(server: FakeOpenAi, folder: Path) -> AsyncIterator[FakeScheduler]:
    """A scheduler whose node uses the server."""
    certificates = NodeCertificates(folder)
    spec = {"kind": "openai", "base_url": server.base_url, "models": {"engine-model": "m"}, "slots": 4}
    async with (
        FakeScheduler(certificates.scheduler) as scheduler,
        running_node(node_settings(folder, certificates.node(), [scheduler.address], [spec])),
    ):
        await scheduler.ready()
        yield scheduler


async def test_a_cancel_closes_the_engines_connection(tmp_path: Path) -> None:
    async def serve(_: Request, answer: Answerer) -> None:
        await answer.head()
        await answer.events(delta("a"))
        await answer.closed.wait()

    async with FakeOpenAi(serve) as server, node_with(server, tmp_path) as scheduler:
        link = await scheduler.up()
        job = scheduler.offer()
        await scheduler.until(lambda: job.frames)
        link.cancel(job.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: job.cancel_acks)
        await server.until(lambda: server.disconnects == 1)
        assert job.cancel_ack.usage.completion_tokens == 1


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_cancel_during_silent_prefill_closes_it_too(tmp_path: Path, streaming: bool) -> None:
    async def serve(_: Request, answer: Answerer) -> None:
        await answer.closed.wait()

    async with FakeOpenAi(serve) as server, node_with(server, tmp_path) as scheduler:
        link = await scheduler.up()
        job = scheduler.offer(streaming=streaming)
        await server.until(lambda: server.requests)
        link.cancel(job.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: job.cancel_acks)
        await server.until(lambda: server.disconnects == 1)


async def test_a_burst_of_the_engine_is_few_frames_and_a_slow_reader_holds_the_engine_back(tmp_path: Path) -> None:
    sent = 0

    async def serve(_: Request, answer: Answerer) -> None:
        nonlocal sent
        await answer.head()
        for _step in range(20_000):
            await answer.events(*[delta("x" * 20)] * 10)
            sent += 10
        await answer.events(finish(), usage(1, 200_000), "[DONE]")
        await answer.end()

    async with FakeOpenAi(serve) as server, node_with(server, tmp_path) as scheduler:
        job = scheduler.offer(window_bytes=64 * 1024, max_output_tokens=300_000)
        await scheduler.until(lambda: len(job.deltas) >= 150)
        before = -1
        while sent != before:  # until the engine's socket is full
            before = sent
            await asyncio.sleep(0.1)
        assert (
            sum(len(item.body) + 256 * len(session_pb2.Frame.FromString(item.body).deltas) for item in job.frames)
            <= 64 * 1024
        )
        assert len(job.frames) < len(job.deltas) / 3
        assert sent < 200_000
        link = await scheduler.up()
        link.cancel(job.id, "CLIENT_GONE", fence=FENCE)
        await scheduler.until(lambda: job.cancel_acks)


async def test_a_large_answer_travels_in_several_frames(tmp_path: Path) -> None:
    words = ["абвгд" * 2000] * 20

    async with (
        FakeOpenAi(lambda asked, answer: speak(words, asked, answer)) as server,
        node_with(server, tmp_path) as scheduler,
    ):
        job = await scheduler.completed(scheduler.offer(streaming=False, window_bytes=1 << 30))
        assert job.text == "".join(words)
        assert len(job.frames) > 4
        assert max(len(item.body) for item in job.frames) <= 48 * 1024
