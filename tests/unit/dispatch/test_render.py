"""From a node's typed frames to OpenAI's JSON. The published schema is checked in tests/conformance."""

import json
import math
from typing import Any

from gpumesh.common.v1.job_pb2 import Usage
from gpumesh.node.v1.session_pb2 import Delta, FinishReason, Frame, TokenLogprob, ToolCallDelta
from gpumesh_dispatch.openai.answer import WholeAnswer
from gpumesh_dispatch.openai.pieces import AnswerHead
from gpumesh_dispatch.openai.stream import StreamRenderer

HEAD = AnswerHead("ab" * 16, 1_700_000_000, "tiny", "fp_1")
STOP = FinishReason.FINISH_REASON_STOP
USAGE = Usage(prompt_tokens=3, completion_tokens=4, cached_prompt_tokens=2, reasoning_tokens=1)


def events(data: bytes) -> list[Any]:
    """The chunks of an event stream; "[DONE]" as text."""
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line]
    return [line.decode() if line == b"[DONE]" else json.loads(line) for line in lines]


def test_consecutive_deltas_of_a_choice_become_one_chunk() -> None:
    renderer = StreamRenderer(HEAD)
    chunks = events(
        renderer.frame(Frame(deltas=[Delta(text="a"), Delta(text="b"), Delta(text="c", finish_reason=STOP)]))
    )
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": "abc"}]
    assert chunks[0]["choices"][0]["finish_reason"] == "stop"


def test_the_role_comes_once_per_choice() -> None:
    head = AnswerHead("ab" * 16, 1, "tiny", choices=2)
    renderer = StreamRenderer(head)
    data = b"".join(renderer.frame(Frame(deltas=[Delta(choice=choice, text="x")])) for choice in (0, 1, 0, 1))
    roles = [(chunk["choices"][0]["index"], "role" in chunk["choices"][0]["delta"]) for chunk in events(data)]
    assert roles == [(0, True), (1, True), (0, False), (1, False)]


def test_a_choice_without_an_end_gets_one() -> None:
    renderer = StreamRenderer(HEAD)
    renderer.frame(Frame(deltas=[Delta(text="a")]))
    last, done = events(renderer.finish())
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert done == "[DONE]"


def test_usage_comes_in_a_chunk_of_its_own_and_is_null_before() -> None:
    renderer = StreamRenderer(HEAD, usage_chunk=True)
    first = events(renderer.frame(Frame(deltas=[Delta(text="a", finish_reason=STOP)])))[0]
    usage, done = events(renderer.finish(USAGE, 77))
    assert first["usage"] is None
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 7
    assert usage["usage"]["cost_nano_usd"] == 77
    assert done == "[DONE]"


def test_what_a_node_must_not_send_is_dropped() -> None:
    renderer = StreamRenderer(HEAD)
    beyond = renderer.frame(Frame(deltas=[Delta(choice=5, text="x")]))
    renderer.frame(Frame(deltas=[Delta(text="a", finish_reason=STOP)]))
    late = renderer.frame(Frame(deltas=[Delta(text="more")]))
    assert (beyond, late) == (b"", b"")


def test_nothing_breaks_out_of_a_string() -> None:
    nasty = 'x"}\n\ndata: [DONE]\n\n\u2028\\'
    data = StreamRenderer(HEAD).frame(Frame(deltas=[Delta(text=nasty)]))
    assert data.count(b"\n\n") == 1
    assert events(data)[0]["choices"][0]["delta"]["content"] == nasty


def test_tool_calls_have_an_id_and_type_once() -> None:
    renderer = StreamRenderer(HEAD)
    calls = [ToolCallDelta(index=0, name="weather"), ToolCallDelta(index=0, arguments='{"c')]
    chunks = events(b"".join(renderer.frame(Frame(deltas=[Delta(tool_calls=[call])])) for call in calls))
    first, second = (chunk["choices"][0]["delta"]["tool_calls"][0] for chunk in chunks)
    assert first["type"] == "function"
    assert first["id"].startswith("call_")
    assert second == {"index": 0, "function": {"arguments": '{"c'}}
    assert events(renderer.finish())[0]["choices"][0]["finish_reason"] == "tool_calls"


def test_logprobs_appear_only_when_asked_for_and_are_always_numbers() -> None:
    entry = TokenLogprob(
        token="a", logprob=-math.inf, token_bytes=b"a", top=[TokenLogprob(token="b", logprob=math.nan)]
    )
    frame = Frame(deltas=[Delta(text="a", logprobs=[entry])])
    asked = AnswerHead("ab" * 16, 1, "tiny", logprobs=True)
    assert events(StreamRenderer(HEAD).frame(frame))[0]["choices"][0]["logprobs"] is None
    shown = events(StreamRenderer(asked).frame(frame))[0]["choices"][0]["logprobs"]["content"][0]
    assert (shown["logprob"], shown["bytes"]) == (-9999.0, [97])
    assert shown["top_logprobs"][0] == {"token": "b", "logprob": -9999.0, "bytes": None}


def test_a_whole_answer_is_put_together_from_frames() -> None:
    answer = WholeAnswer(AnswerHead("ab" * 16, 1, "tiny", choices=2))
    answer.frame(
        Frame(deltas=[Delta(text="Hel"), Delta(choice=1, text="Bye", finish_reason=FinishReason.FINISH_REASON_LENGTH)]),
        10,
    )
    answer.frame(Frame(deltas=[Delta(text="lo", reasoning="hm", finish_reason=STOP)]), 10)
    body = json.loads(answer.render(USAGE))
    assert [choice["message"]["content"] for choice in body["choices"]] == ["Hello", "Bye"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["choices"][0]["message"]["reasoning_content"] == "hm"
    assert "cost_nano_usd" not in body["usage"]


def test_a_tool_call_answer_has_no_content() -> None:
    answer = WholeAnswer(HEAD)
    for call in (ToolCallDelta(call_id="c1", name="w", arguments='{"a"'), ToolCallDelta(arguments=":1}")):
        answer.frame(Frame(deltas=[Delta(tool_calls=[call])]), 10)
    choice = json.loads(answer.render(USAGE))["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"a":1}'}}
    ]
    assert choice["finish_reason"] == "tool_calls"
