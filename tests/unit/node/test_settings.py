"""Settings, engines made from them, mock-model's scripts, and values on the wire."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpumesh.common.v1 import job_pb2
from gpumesh.node.v1 import session_pb2
from gpumesh_node.config import NodeSettings
from gpumesh_node.domain.deltas import Delta, FinishReason, TokenLogprob, ToolCallDelta, Usage
from gpumesh_node.domain.job import Outcome, Receipt
from gpumesh_node.domain.mock_script import Prompt, Script, ScriptError, read_prompt, read_script, words
from gpumesh_node.domain.models import Feature, ModelState, ServedModel
from gpumesh_node.engines.factory import make_engines
from gpumesh_node.engines.llamacpp import LlamaCppEngine
from gpumesh_node.engines.mock import MockEngine
from gpumesh_node.engines.openai_http import OpenAiHttpEngine
from gpumesh_node.wire import (
    MAX_FRAME_BYTES,
    MAX_FRAME_DELTAS,
    frame_to_wire,
    frames_of,
    offer_from_wire,
    receipt_to_wire,
    served_to_wire,
)
from gpumesh_runtime.config import ConfigError


def read(tmp_path: Path, engines: object, **more: Any) -> NodeSettings:
    """Settings with these engines."""
    text = engines if isinstance(engines, str) else json.dumps(engines)
    return NodeSettings.read(state_dir=tmp_path, engines=text, **more)


def test_each_kind_of_engine_is_made(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF")
    settings = read(
        tmp_path,
        [
            {
                "kind": "openai",
                "base_url": "http://127.0.0.1:8000",
                "models": {"a": "A", "b": {"model_id": "B", "revision": "r"}},
            },
            {"kind": "llamacpp", "model_id": "C", "path": str(gguf), "slots": 3, "context_tokens": 100},
            {"kind": "mock", "model_id": "D", "script": {"tokens": 4, "echo": True}, "name": "fake"},
        ],
    )
    one, two, three = make_engines(settings.engines)
    assert isinstance(one, OpenAiHttpEngine)
    assert isinstance(two, LlamaCppEngine)
    assert isinstance(three, MockEngine)
    assert [engine.name for engine in (one, two, three)] == ["openai-1", "llamacpp-2", "fake"]
    assert [(model.model_id, model.revision) for model in one.models()] == [("A", ""), ("B", "r")]
    assert two.models()[0].kv_tokens == 300
    assert settings.engines[0].base_url == "http://127.0.0.1:8000/v1"  # type: ignore[union-attr]  # it is an OpenAiSpec


@pytest.mark.parametrize(
    ("engines", "told"),
    [
        ("[", "must be a JSON list"),
        ([], "at least one engine"),
        ([{"kind": "vllm"}], "kind"),
        ([{"kind": "openai", "base_url": "ftp://x", "models": {"a": "A"}}], "base_url"),
        ([{"kind": "openai", "base_url": "http://x", "models": {}}], "models"),
        ([{"kind": "openai", "base_url": "http://x", "models": {"a": "A"}, "slot": 3}], "slot"),
        ([{"kind": "llamacpp", "model_id": "m", "path": "/nowhere.gguf"}], "no file"),
        ([{"kind": "mock"}, {"kind": "mock"}], "two engines"),
        ([{"kind": "mock", "model_id": "bad id"}], "pattern"),
    ],
)
def test_wrong_engines_are_told_in_words(tmp_path: Path, engines: object, told: str) -> None:
    with pytest.raises(ConfigError, match="GPUMESH_NODE_ENGINES") as caught:
        read(tmp_path, engines)
    assert told in str(caught.value)


def test_a_misspelt_script_stops_the_node(tmp_path: Path) -> None:
    settings = read(tmp_path, [{"kind": "mock", "script": {"tokns": 4}}])
    with pytest.raises(ConfigError, match="tokns"):
        make_engines(settings.engines)


def test_half_a_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        read(tmp_path, [{"kind": "mock"}], tls_cert=tmp_path / "x")


def test_secrets_do_not_show(tmp_path: Path) -> None:
    engines = [{"kind": "openai", "base_url": "http://x", "models": {"a": "A"}, "api_key": "sesame"}]
    assert "sesame" not in repr(read(tmp_path, engines, enrolment_token="sesame"))


def test_directives_in_the_prompt_change_the_script() -> None:
    script = read_script("say [[mock tokens=3 delay_s=0.5]] and [[mock error=engine]]", Script(tps=9))
    assert script == Script(tps=9, tokens=3, delay_s=0.5, error="engine")
    for wrong in ("[[mock token=3]]", "[[mock tokens=x]]"):
        with pytest.raises(ScriptError):
            read_script(wrong, Script())


def test_mock_models_words_are_the_same_every_time() -> None:
    prompt = Prompt("hello", 5, None)
    assert words(Script(), prompt, 0) == words(Script(), prompt, 0)
    assert words(Script(), prompt, 0) != words(Script(), prompt, 1)
    assert words(Script(seed=1), prompt, 0) == words(Script(), Prompt("other", 5, 1), 0)
    assert "".join(words(Script(echo=True), Prompt("a  b\n c ", 3, None), 0)) == "a  b\n c "


def test_a_prompt_may_come_in_parts() -> None:
    body = {
        "messages": [{"content": "a b"}, {"content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d e"}]}]
    }
    prompt = read_prompt(json.dumps(body).encode())
    assert (prompt.text, prompt.tokens) == ("cd e", 4)
    assert "cd" not in repr(prompt)


# --- wire -----------------------------------------------------------------------------------------------------------------------


def test_a_delta_goes_onto_the_wire_whole() -> None:
    top = (TokenLogprob("x", -2.0, b"x"),)
    delta = Delta(
        1,
        "a",
        "b",
        (ToolCallDelta(2, "id", "f", "{}"),),
        (TokenLogprob("a", -1.0, b"a", top),),
        (7,),
        FinishReason.STOP,
        "no",
    )
    (out,) = session_pb2.Frame.FromString(frame_to_wire([delta])).deltas
    assert (out.choice, out.text, out.reasoning, out.finish_reason, out.refusal) == (1, "a", "b", 1, "no")
    assert (out.tool_calls[0].index, out.tool_calls[0].arguments) == (2, "{}")
    assert (out.logprobs[0].token, out.logprobs[0].top[0].logprob, list(out.token_ids)) == ("a", -2.0, [7])


def test_frames_are_cut_by_size_and_number_and_add_up() -> None:
    deltas = [Delta(0, f"{number} ") for number in range(200)] + [
        Delta(0, "ж" * 100_000),
        Delta(0, finish=FinishReason.STOP),
    ]
    frames = frames_of(deltas)
    assert all(len(body) <= MAX_FRAME_BYTES and len(part) <= MAX_FRAME_DELTAS for body, part in frames)
    texts = [delta.text for body, _ in frames for delta in session_pb2.Frame.FromString(body).deltas]
    assert "".join(texts) == "".join(delta.text for delta in deltas)


def test_an_offer_comes_from_the_wire() -> None:
    message = session_pb2.Offer(model_id="m", deadline_ms=1500, payload=b"{}", payload_bytes=2, prefix_token_ids=[1])
    offer = offer_from_wire(b"j" * 16, 5, message.SerializeToString())
    assert (offer.deadline_s, offer.payload_bytes, offer.payload, offer.resumes) == (1.5, 0, b"{}", True)


def test_models_and_receipts_go_onto_the_wire() -> None:
    model = ServedModel("m", 3, "r", "q", "e", "v", 100, (Feature.TOOLS,), state=ModelState.READY, kv_tokens=300)
    out = served_to_wire(model)
    assert out.build == job_pb2.ModelBuild(
        model_id="m", revision="r", quantisation="q", engine_name="e", engine_version="v"
    )
    assert (out.slots, out.context_tokens, out.kv_tokens, list(out.features)) == (3, 100, 300, [job_pb2.FEATURE_TOOLS])
    assert out.state == session_pb2.MODEL_STATE_READY
    receipt = receipt_to_wire(Receipt(b"j" * 16, 1, b"t", Outcome.CANCELLED, Usage(1, 2)))
    assert (receipt.receipt_token, receipt.outcome, receipt.usage.completion_tokens) == (
        b"t",
        job_pb2.JOB_OUTCOME_CANCELLED,
        2,
    )
