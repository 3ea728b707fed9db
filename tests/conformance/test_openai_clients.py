"""The official OpenAI clients, each in an environment of its own, against a whole mesh with the shipped model."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.mesh import Mesh

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("openai_client.py")


@pytest.fixture(scope="module", params=["openai2", "openai3"])
def seen(request: pytest.FixtureRequest, tiny_mesh: Mesh) -> dict[str, Any]:
    """What one client saw."""
    python = ROOT / f".venv-{request.param}" / "bin" / "python"
    assert python.exists(), f"{python} is missing: run `make clients`"
    client = tiny_mesh.client
    command = [str(python), str(SCRIPT), client["base_url"], client["api_key"], client["model"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{tiny_mesh.tails()}"
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"].split(".")[0] == request.param[-1]
    return found


def test_it_lists_and_finds_models(seen: dict[str, Any], tiny_mesh: Mesh) -> None:
    assert tiny_mesh.client["model"] in seen["models"]
    assert seen["model"] == tiny_mesh.client["model"]


def test_it_gets_an_answer_streamed_and_not_and_they_are_the_same(seen: dict[str, Any]) -> None:
    assert "gpu" in seen["text"].lower()
    assert seen["text"] == seen["streamed"] == seen["accumulated"]
    assert seen["finish"] == seen["stream_finish"] == "stop"


def test_it_gets_true_usage_both_ways(seen: dict[str, Any]) -> None:
    usage = seen["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] > 5
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert seen["stream_usage"][name] == usage[name]


def test_it_calls_a_tool_with_the_right_argument(seen: dict[str, Any]) -> None:
    assert seen["tool"] == [["get_weather", {"city": "Paris"}]]
    assert seen["tool_streamed"] == {"city": "Paris"}
    assert seen["tool_finish"] == "tool_calls"


def test_it_gets_json_that_fits_its_schema(seen: dict[str, Any]) -> None:
    assert isinstance(seen["person"]["name"], str)
    assert 0 <= seen["person"]["age"] <= 120


def test_it_gets_several_choices_with_log_probabilities(seen: dict[str, Any]) -> None:
    assert seen["choices"] == [0, 1]
    assert all(1 <= count <= 8 for count in seen["logprobs"])
    assert seen["top_logprobs"] == 2


@pytest.mark.parametrize(
    ("what", "error", "status", "code", "param"),
    [
        ("bad_key", "AuthenticationError", 401, "invalid_api_key", None),
        ("bad_model", "NotFoundError", 404, "model_not_found", "model"),
        ("bad_parameter", "BadRequestError", 400, None, "temperature"),
        ("too_long", "BadRequestError", 400, "context_length_exceeded", "messages"),
    ],
)
def test_it_sees_typed_errors(
    seen: dict[str, Any], what: str, error: str, status: int, code: str | None, param: str | None
) -> None:
    assert (seen[what]["class"], seen[what]["status"], seen[what]["param"]) == (error, status, param)
    if code is not None:
        assert seen[what]["code"] == code
