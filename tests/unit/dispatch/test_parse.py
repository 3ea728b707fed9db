"""Reading OpenAI chat bodies: what is refused names the parameter and says what to do, what is unknown passes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.common.v1.job_pb2 import Feature
from gpumesh_dispatch.openai.depth import too_deep
from gpumesh_dispatch.openai.parse import MAX_BODY_BYTES, parse_chat
from gpumesh_runtime.errors import InvalidArgument, PayloadTooLarge, Reason

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def body(**fields: Any) -> bytes:
    """A good body with changes; None leaves a field out."""
    chat = {"model": "tiny", "messages": [USER], **fields}
    return json.dumps({key: value for key, value in chat.items() if value is not ...}).encode()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 99}, "temperature", "0 to 2"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 1.5}, "top_p", "0 to 1"),
    ({"n": 0}, "n", "1 to 128"),
    ({"n": 1.5}, "n", "whole number"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "one of them"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "1 to 4"),
    ({"presence_penalty": 3}, "presence_penalty", "-2 to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-2 to 2"),
    ({"logit_bias": {"5": 200}}, "logit_bias[...]", "-100 to 100"),
    ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"seed": 2**64}, "seed", "64 bits"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
    ({"messages": []}, "messages", "at least one"),
    ({"messages": ...}, "messages", "Missing"),
    ({"model": ...}, "model", "Missing"),
    ({"model": ""}, "model", "GET /v1/models"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "needs text"),
    ({"messages": [USER, {"role": "user", "content": 5}]}, "messages[1].content", "Give a string"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least one part"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url", "url"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
        "messages[0].content[0].image_url.url",
        "http",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "tool call"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "tool_calls"),
    ({"tools": []}, "tools", "1 to 128"),
    ({"tools": [{"type": "web"}]}, "tools[0].type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
    ({"tools": [TOOL, TOOL]}, "tools[1].function.name", "differ"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
        "tools[0].function.parameters",
        "JSON schema",
    ),
    ({"tool_choice": "required"}, "tool_choice", "tools"),
    (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice.function.name",
        "names",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
    ({"stream": "yes"}, "stream", "true or false"),
]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=[param for _, param, _ in REFUSED])
def test_a_bad_field_is_named_with_what_to_do(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_chat(body(**fields))
    assert caught.value.metadata["param"] == param
    assert says in caught.value.message
    assert "`" not in caught.value.message


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'"x"', b'{"model": "m", "messages": [{}]', b"\xff{}", b"null"])
def test_what_is_not_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument):
        parse_chat(text)


def test_unknown_fields_pass_untouched() -> None:
    raw = body(top_k=40, chat_template_kwargs={"enable_thinking": False})
    assert parse_chat(raw).body is raw


def test_audio_is_refused_as_unsupported() -> None:
    for fields in (
        {"modalities": ["text", "audio"]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    ):
        with pytest.raises(InvalidArgument) as caught:
            parse_chat(body(**fields))
        assert caught.value.reason is Reason.FEATURE_UNSUPPORTED


def test_features_follow_from_fields() -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}
    chat = parse_chat(
        body(
            tools=[TOOL],
            n=2,
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "json_object"},
            messages=[image],
            stream=True,
            stream_options={"include_usage": True},
            usage={"include": True},
            max_completion_tokens=9,
        )
    )
    assert set(chat.features) == {
        Feature.FEATURE_TOOLS,
        Feature.FEATURE_MULTIPLE_CHOICES,
        Feature.FEATURE_LOGPROBS,
        Feature.FEATURE_STRUCTURED,
        Feature.FEATURE_VISION,
    }
    assert (chat.stream, chat.include_usage, chat.include_cost, chat.logprobs) == (True, True, True, True)
    assert (chat.choices, chat.max_output_tokens) == (2, 9)


def test_a_plain_chat_needs_no_feature() -> None:
    chat = parse_chat(body(temperature=None, stop=None, tools=None, tool_choice="auto", stream=None, seed=-5))
    assert chat.features == ()
    assert (chat.stream, chat.choices, chat.max_output_tokens) == (False, 1, None)


@given(st.text(max_size=200))
def test_prompt_bytes_bound_the_text(text: str) -> None:
    encoded = text.encode("utf-8", "surrogatepass")
    try:
        chat = parse_chat(body(messages=[{"role": "user", "content": text}]))
    except InvalidArgument:
        return  # lone surrogates are not JSON
    assert chat.prompt_bytes >= len(encoded)


def test_a_body_over_8_mib_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PayloadTooLarge):
        parse_chat(b" " * (MAX_BODY_BYTES + 1))


def nested(depth: int) -> bytes:
    """A body that nests `depth` levels, itself included."""
    return (
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    )


def test_nesting_is_bounded_at_32_levels() -> None:
    assert parse_chat(nested(32))
    for depth in (33, 500, 100_000):
        with pytest.raises(InvalidArgument) as caught:
            parse_chat(nested(depth))
        assert "nest" in caught.value.message


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((_depth(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(item) for item in value), default=0)
    return 0


JSON = st.recursive(
    st.text(alphabet='a"\\[]{}é', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='a"\\[{', max_size=4), inner, max_size=3)
    ),
    max_leaves=30,
)


@given(JSON, st.integers(0, 6), st.booleans())
def test_depth_is_counted_right_whatever_strings_hold(value: Any, limit: int, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert too_deep(text, limit) == (_depth(value) > limit)
