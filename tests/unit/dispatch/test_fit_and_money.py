"""Prompt sizes against contexts, names near each other, and the price of a job."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from gpumesh.common.v1.job_pb2 import Model, Price, Usage
from gpumesh.router.v1.admission_service_pb2 import Catalogue
from gpumesh_dispatch.models import Models
from gpumesh_dispatch.money import charge_nano_usd, within_bounds
from gpumesh_dispatch.openai.fit import counted, measure, text_of, uncounted
from gpumesh_dispatch.openai.parse import ParsedChat, parse_chat
from gpumesh_dispatch.tokens import TokenCounter
from gpumesh_metering.domain.pricing import Price as MeteringPrice
from gpumesh_metering.domain.pricing import charge_of
from gpumesh_runtime.errors import InvalidArgument, NotFound, Reason

TINY = Model(model_id="tiny", aliases=["small"], context_tokens=100, template_overhead_tokens=4)


def chat(text: str, **fields: Any) -> ParsedChat:
    """A chat of one message."""
    return parse_chat(json.dumps({"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}).encode())


def test_a_short_prompt_fits_by_its_bytes_alone() -> None:
    size = measure(chat("x" * 30), TINY)
    assert size is not None
    assert 30 <= size.bound < 100
    assert 0 < size.estimate <= size.bound


def test_a_prompt_near_the_limit_must_be_counted() -> None:
    assert measure(chat("x" * 100), TINY) is None


def test_a_counted_prompt_beyond_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidArgument) as caught:
        counted(chat("x" * 500), TINY, 120)
    assert caught.value.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    assert (caught.value.metadata["limit"], caught.value.metadata["used"]) == ("100", "120")
    assert "100" in caught.value.message
    assert "120" in caught.value.message


def test_a_counted_prompt_that_fits_passes_below_the_context() -> None:
    assert counted(chat("x" * 500), TINY, 99).estimate == 99


def test_without_a_tokenizer_only_a_hopeless_prompt_is_refused() -> None:
    assert uncounted(chat("x" * 300), TINY).estimate < 100
    with pytest.raises(InvalidArgument):
        uncounted(chat("x" * 900), TINY)


def test_all_text_of_a_prompt_is_counted() -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "sky", "parameters": {"type": "object"}}}
    body = {
        "model": "tiny",
        "tools": [tool],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "part"}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ],
    }
    text = " ".join(text_of(parse_chat(json.dumps(body).encode()).request))
    for piece in ("part", "f", "{}", "weather", "sky", '"object"'):
        assert piece in text


async def test_tokens_are_counted_with_the_tokenizer_of_that_hash() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    file = tokenizer.to_str().encode()
    sha256 = hashlib.sha256(file).hexdigest()
    asked: list[str] = []

    async def fetch(wanted: str) -> bytes:
        asked.append(wanted)
        if wanted != sha256:
            raise NotFound(Reason.NOT_FOUND, "none")
        return file

    counter = TokenCounter(fetch)
    try:
        assert await counter.count(sha256, ["a b a", "c"]) == 4
        assert await counter.count(sha256, ["a " * 2_000_000]) == pytest.approx(2_000_000, rel=0.01)
        assert await counter.count("0" * 64, ["a"]) is None
        assert await counter.count("0" * 64, ["a"]) is None
        assert await counter.count("", ["a"]) is None
        assert asked == [sha256, "0" * 64], "kept when found, and not asked for again at once when not"
    finally:
        counter.close()


async def test_a_tokenizer_with_another_content_than_its_name_is_not_used() -> None:
    async def fetch(wanted: str) -> bytes:
        return b"{}"

    counter = TokenCounter(fetch)
    try:
        assert await counter.count("1" * 64, ["a"]) is None
    finally:
        counter.close()


def test_models_are_found_by_id_and_alias_and_near_names_are_offered() -> None:
    known = Models()
    assert not known.known
    known.replace(Catalogue(models=[TINY, Model(model_id="small-2")]))
    assert known.find("small") is known.find("tiny")
    assert known.find("nothing") is None
    assert known.near("tinny") == ["tiny"]
    assert known.near("SMALL")[0] == "small"
    assert known.near("zzzzzz") == []


@given(
    st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**6), st.integers(0, 10**12), st.integers(0, 10**12),
    st.none() | st.integers(0, 10**12), st.integers(0, 10**15),
)  # fmt: skip
def test_the_charge_is_the_one_that_metering_computes(
    prompt: int, completion: int, cached: int, price_in: int, price_out: int, price_cached: int | None, hold: int
) -> None:
    cached = min(cached, prompt)
    price = Price(
        input_nano_usd_per_mtok=price_in,
        output_nano_usd_per_mtok=price_out,
        cached_input_nano_usd_per_mtok=price_cached,
    )
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_prompt_tokens=cached)
    expected = charge_of(MeteringPrice(1, price_in, price_out, price_cached), prompt, cached, completion, hold)
    assert charge_nano_usd(price, usage, hold) == expected


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.integers(-5, 10**9), st.integers(-5, 10**9))
def test_no_count_of_a_node_leaves_its_bounds(prompt: int, completion: int, cached: int, reasoning: int) -> None:
    usage = Usage(
        prompt_tokens=prompt, completion_tokens=completion, cached_prompt_tokens=cached, reasoning_tokens=reasoning
    )
    held = within_bounds(usage, relayed=50, cap=40, prompt_bound=100)
    assert 0 <= held.cached_prompt_tokens <= held.prompt_tokens <= 100
    assert 0 <= held.reasoning_tokens <= held.completion_tokens <= 40
    if 0 <= prompt <= 100:
        assert held.prompt_tokens == prompt
