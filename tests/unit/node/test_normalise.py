"""What engines say, as deltas: one shape out of many."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh_node.domain.deltas import Delta, FinishReason, TokenLogprob, ToolCallDelta, Usage
from gpumesh_node.domain.failures import EngineFailure
from gpumesh_node.domain.merge import halve, merge
from gpumesh_node.domain.normalise import Normaliser
from gpumesh_node.domain.request import EngineBody, EngineRequest
from gpumesh_runtime.reasons import Reason


def event(delta: dict[str, Any], finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    """One stream event."""
    return json.dumps({"choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}).encode()


def test_the_opening_role_chunk_is_no_delta() -> None:
    normaliser = Normaliser()
    assert (
        normaliser.stream([event({"role": "assistant", "content": None}), event({"role": "assistant", "content": ""})])
        == []
    )
    assert normaliser.tokens == 0


def test_text_reasoning_and_end_are_deltas() -> None:
    normaliser = Normaliser()
    deltas = normaliser.stream(
        [
            event({"reasoning_content": "hm"}),
            event({"reasoning": "so"}),
            event({"content": "Yes"}),
            event({}, "stop"),
            b"[DONE]",
        ]
    )
    assert deltas == [
        Delta(0, reasoning="hm"),
        Delta(0, reasoning="so"),
        Delta(0, "Yes"),
        Delta(0, finish=FinishReason.STOP),
    ]
    assert normaliser.done
    assert normaliser.tokens == 3
    assert normaliser.usage == Usage(completion_tokens=3)


def test_the_engines_usage_replaces_our_count() -> None:
    normaliser = Normaliser()
    normaliser.stream([event({"content": "ab"}, "stop")])
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 1},
    }
    normaliser.stream([json.dumps({"choices": [], "usage": usage}).encode()])
    assert normaliser.usage == Usage(7, 2, 4, 1)
    assert normaliser.tokens == 2


def test_a_running_count_of_the_engine_is_followed_and_never_goes_back() -> None:
    normaliser = Normaliser()
    for count, expected in ((5, 5), (3, 5), (9, 9)):
        body = json.loads(event({"content": "x"}))
        normaliser.stream([json.dumps({**body, "usage": {"completion_tokens": count}}).encode()])
        assert normaliser.tokens == max(expected, normaliser.tokens)
    assert normaliser.tokens >= 9


def test_tool_calls_keep_their_index_name_and_pieces() -> None:
    normaliser = Normaliser()
    call = {"index": 1, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    deltas = normaliser.stream(
        [
            event({"tool_calls": [call]}),
            event({"tool_calls": [{"index": 1, "function": {"arguments": '{"a'}}]}),
            event({"tool_calls": [{"index": 1, "function": {"arguments": '":1}'}}]}),
            event({}, "tool_calls"),
        ]
    )
    assert deltas[0].tool_calls == (ToolCallDelta(1, "c1", "f"),)
    (merged,) = merge(deltas)
    assert merged.tool_calls == (ToolCallDelta(1, "c1", "f", '{"a":1}'),)
    assert merged.finish is FinishReason.TOOL_CALLS


def test_tool_calls_without_index_take_their_place() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    (delta,) = Normaliser().whole(json.dumps(body).encode())
    assert [(call.index, call.name) for call in delta.tool_calls] == [(0, "f"), (1, "g")]


def test_log_probabilities_are_cut_to_what_was_asked() -> None:
    entry = {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [{"token": t, "logprob": None} for t in "abc"],
    }
    body = event({"content": "é"}, logprobs={"content": [entry]})
    (two,) = Normaliser(1, 2).stream([body])
    assert two.logprobs == (
        TokenLogprob("é", -0.5, b"\xc3\xa9", (TokenLogprob("a", -9999.0, b"a"), TokenLogprob("b", -9999.0, b"b"))),
    )
    (none,) = Normaliser(1, 0).stream([body])
    assert none.logprobs[0].top == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{",
        b'{"choices": 5}',
        b'{"choices": [{"index": 1, "delta": {"content": "x"}}]}',
        b'{"choices": [{"index": -1, "delta": {"content": "x"}}]}',
        b'{"choices": [{"index": 0, "delta": {"content": {}}}]}',
        b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}',
        b'{"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 99999}]}}]}',
        b'{"choices": [{"index": 0, "delta": {"content": "x"}, "token_ids": [-1]}]}',
        b'{"choices": [{"index": 0, "delta": {"content": "\xff"}}]}',
        b'{"choices": [{"index": 0, "delta": {"content": "\\ud800"}}]}',
        b'{"error": "boom"}',
        b'{"x":' + b"[" * 100_000,
    ],
)
def test_what_is_no_answer_is_an_engine_error_that_quotes_nothing(data: bytes) -> None:
    with pytest.raises(EngineFailure) as caught:
        Normaliser().stream([data])
    assert caught.value.reason is Reason.ENGINE_ERROR
    assert caught.value.retryable
    assert caught.value.__cause__ is None


def test_the_end_needs_a_finish_reason_of_every_choice() -> None:
    normaliser = Normaliser(2)
    normaliser.stream([event({"content": "a"}, "stop")])
    with pytest.raises(EngineFailure):
        normaliser.end()
    normaliser.stream([event({"content": "b"}, "length", 1)])
    normaliser.end()
    assert normaliser.done


_texts = st.text(max_size=40)
_deltas = st.builds(
    Delta,
    choice=st.integers(0, 2),
    text=_texts,
    reasoning=_texts,
    tool_calls=st.lists(st.builds(ToolCallDelta, st.integers(0, 2), arguments=_texts), max_size=2).map(tuple),
    logprobs=st.lists(st.builds(TokenLogprob, _texts, st.floats(-50, 0)), max_size=5).map(tuple),
    token_ids=st.lists(st.integers(0, 100), max_size=5).map(tuple),
    finish=st.sampled_from(FinishReason),
    refusal=_texts,
)


@given(_deltas)
def test_halves_add_up_to_the_whole(delta: Delta) -> None:
    halves = halve(delta)
    if halves is not None:
        assert merge(halves) == merge([delta])


@given(st.lists(_deltas, max_size=6))
def test_merging_is_the_same_in_one_step_or_two(deltas: list[Delta]) -> None:
    assert merge(merge(deltas[:3]) + merge(deltas[3:])) == merge(deltas)


# --- the request ----------------------------------------------------------------------------------------------------------------


def test_the_body_is_rewritten_at_the_top_only() -> None:
    prompt = {"role": "user", "content": 'brackets } and "quotes" ☃', "n": 5}
    body = EngineBody(json.dumps({"messages": [prompt], "max_completion_tokens": 9, "stream": True, "x": 1.5}).encode())
    written = json.loads(body.write("own name", body.cap(20), streaming=False))
    assert written == {"messages": [prompt], "x": 1.5, "model": "own name", "max_tokens": 9, "stream": False}


@pytest.mark.parametrize(
    ("fields", "limit", "cap"),
    [({}, 10, 10), ({"max_tokens": 4}, 10, 4), ({"max_tokens": 40}, 10, 10), ({"max_tokens": 0}, 10, 1)],
)
def test_a_cap_is_always_there(fields: dict[str, int], limit: int, cap: int) -> None:
    assert EngineBody(json.dumps(fields).encode()).cap(limit) == cap


@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b'{"a":', b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused_without_a_quote(payload: bytes) -> None:
    with pytest.raises(EngineFailure) as caught:
        EngineBody(payload)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert not caught.value.retryable


@pytest.mark.parametrize("n", [0, 129, "x", 1.5])
def test_a_wrong_number_of_choices_is_named(n: object) -> None:
    with pytest.raises(EngineFailure) as caught:
        _ = EngineBody(json.dumps({"n": n}).encode()).choices
    assert caught.value.metadata == {"param": "n"}


def test_a_request_does_not_show_its_prompt() -> None:
    assert "secret" not in repr(EngineRequest(b'{"secret": 1}', "m", 1, True))
