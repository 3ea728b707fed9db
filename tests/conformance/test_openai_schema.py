"""Every body and every chunk against OpenAI's published API description, over HTTP, with everything that a node may send."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema_rs
import pytest

from gpumesh.node.v1.session_pb2 import Delta, FinishReason, Frame, TokenLogprob, ToolCallDelta
from gpumesh_runtime.errors import MeshError, Reason
from tests.support.edge_client import CHAT, chat_body, events_of
from tests.support.edge_peers import EdgeMesh, PlayedJob

SPEC = Path(__file__).parents[3] / "shared" / "openai" / "openapi.json"
pytestmark = pytest.mark.skipif(not SPEC.exists(), reason=f"SKIPPED LOUDLY: OpenAI's API description is not at {SPEC}")

STOP, LENGTH, TOOLS = (
    FinishReason.FINISH_REASON_STOP,
    FinishReason.FINISH_REASON_LENGTH,
    FinishReason.FINISH_REASON_TOOL_CALLS,
)


def _nullable(node: Any) -> Any:
    """3.1 has no `nullable`: such schemas become anyOf with null."""
    if isinstance(node, list):
        return [_nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [made, {"type": "null"}]} if node.get("nullable") is True else made


@pytest.fixture(scope="module")
def schemas() -> Callable[[str], Any]:
    """Validators by component name."""
    components = _nullable(json.loads(SPEC.read_text())["components"])
    made: dict[str, Any] = {}

    def validator(name: str) -> Any:
        if name not in made:
            schema = {"$ref": f"#/components/schemas/{name}", "components": components}
            made[name] = jsonschema_rs.Draft202012Validator(schema)
        return made[name]

    return validator


def _logprob(token: str) -> TokenLogprob:
    other = TokenLogprob(token="?", logprob=-3.5)
    return TokenLogprob(token=token, logprob=-0.1, token_bytes=token.encode(), top=[other])


def _plain(job: PlayedJob) -> None:
    job.say("Hello", tokens=1)
    job.say(" world", finish=STOP)
    job.done()


def _bare(job: PlayedJob) -> None:
    job.done()


def _no_finish(job: PlayedJob) -> None:
    job.say("x")
    job.done()


def _choices(job: PlayedJob) -> None:
    job.frame(Frame(deltas=[Delta(choice=1, text="b", finish_reason=LENGTH), Delta(choice=0, text="a")]), 2)
    job.frame(Frame(deltas=[Delta(choice=0, finish_reason=STOP)]), 0, content=False)
    job.done()


def _logprobs(job: PlayedJob) -> None:
    job.say("a", logprobs=[_logprob("a")])
    job.say("é", logprobs=[_logprob("é")], finish=STOP)
    job.done()


def _tools(job: PlayedJob) -> None:
    calls = [ToolCallDelta(index=0, call_id="c0", name="weather"), ToolCallDelta(index=1, name="time", arguments="{}")]
    job.frame(Frame(deltas=[Delta(tool_calls=calls)]))
    job.frame(Frame(deltas=[Delta(tool_calls=[ToolCallDelta(index=0, arguments='{"a":1}')], finish_reason=TOOLS)]))
    job.done()


def _reasoning(job: PlayedJob) -> None:
    job.frame(Frame(deltas=[Delta(reasoning="let me think")]))
    job.say("42", finish=STOP)
    job.done()


def _refusal(job: PlayedJob) -> None:
    job.frame(Frame(deltas=[Delta(refusal="I will not.", finish_reason=FinishReason.FINISH_REASON_CONTENT_FILTER)]))
    job.done()


PLAYS: dict[str, tuple[Callable[[PlayedJob], None], dict[str, Any]]] = {
    "plain": (_plain, {}),
    "no frame": (_bare, {}),
    "no finish reason": (_no_finish, {}),
    "two choices": (_choices, {"n": 2}),
    "logprobs": (_logprobs, {"logprobs": True, "top_logprobs": 1}),
    "tools": (_tools, {"tools": [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]}),
    "reasoning": (_reasoning, {}),
    "refusal": (_refusal, {}),
    "cost": (_plain, {"usage": {"include": True}}),
}


@pytest.fixture(params=list(PLAYS.values()), ids=list(PLAYS))
def played(request: pytest.FixtureRequest) -> tuple[Callable[[PlayedJob], None], dict[str, Any]]:
    """What the node does and what the client asks for."""
    play, fields = request.param
    return play, copy.deepcopy(fields)


async def test_whole_answers_validate(
    tmp_path: Path, schemas: Callable[[str], Any], played: tuple[Callable[[PlayedJob], None], dict[str, Any]]
) -> None:
    play, fields = played
    async with EdgeMesh(tmp_path) as mesh, aiohttp.ClientSession() as http:
        mesh.dispatch.play = play
        async with http.post(mesh.base + CHAT, json=chat_body(**fields), headers=mesh.headers) as answer:
            assert answer.status == 200
            schemas("CreateChatCompletionResponse").validate(await answer.json())


@pytest.mark.parametrize("usage", [False, True], ids=["without usage", "with usage"])
async def test_every_chunk_validates(
    tmp_path: Path,
    schemas: Callable[[str], Any],
    played: tuple[Callable[[PlayedJob], None], dict[str, Any]],
    usage: bool,
) -> None:
    play, fields = played
    fields |= {"stream": True} | ({"stream_options": {"include_usage": True}} if usage else {})
    async with EdgeMesh(tmp_path) as mesh, aiohttp.ClientSession() as http:
        mesh.dispatch.play = play
        async with http.post(mesh.base + CHAT, json=chat_body(**fields), headers=mesh.headers) as answer:
            events = events_of(await answer.text())
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        schemas("CreateChatCompletionStreamResponse").validate(event)


async def test_errors_and_models_validate(tmp_path: Path, schemas: Callable[[str], Any]) -> None:
    async with EdgeMesh(tmp_path) as mesh, aiohttp.ClientSession() as http:
        for body, headers in (
            (chat_body(temperature=99), mesh.headers),
            (chat_body(model="x"), mesh.headers),
            (chat_body(), {}),
        ):
            async with http.post(mesh.base + CHAT, json=body, headers=headers) as answer:
                assert answer.status >= 400
                schemas("ErrorResponse").validate(await answer.json())
        async with http.get(mesh.base + "/v1/models", headers=mesh.headers) as answer:
            schemas("ListModelsResponse").validate(await answer.json())
        async with http.get(mesh.base + "/v1/models/tiny", headers=mesh.headers) as answer:
            schemas("Model").validate(await answer.json())

        def breaks(job: PlayedJob) -> None:
            job.say("a")
            job.fail(MeshError.of(Reason.ANSWER_INTERRUPTED, "It broke."))

        mesh.dispatch.play = breaks
        async with http.post(mesh.base + CHAT, json=chat_body(stream=True), headers=mesh.headers) as answer:
            schemas("ErrorResponse").validate(events_of(await answer.text())[-1])


def test_the_schema_would_notice(schemas: Callable[[str], Any]) -> None:
    wrong = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0}]}
    with pytest.raises(jsonschema_rs.ValidationError):
        schemas("CreateChatCompletionResponse").validate(wrong)
