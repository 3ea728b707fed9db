"""The shipped model: its training text keeps clear of evaluation, and the artefact is what the card says."""

import hashlib
import importlib
import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

from gpumesh_local.model import Shipped

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy/local/src/gpumesh_local/model"
GGUF = SHIPPED / "gpumesh-tiny.gguf"
README_PROMPT = {"role": "user", "content": "Hello! What is gpumesh?"}

# The maker of the model is no part of the product and is not installed, so it is imported from where it lies.
sys.path.insert(0, str(ROOT / "deploy/local/model"))
chat = importlib.import_module("gpumesh_tiny.chat")
corpus = importlib.import_module("gpumesh_tiny.corpus")
dialogue = importlib.import_module("gpumesh_tiny.dialogue")
families = importlib.import_module("gpumesh_tiny.families")
serve = importlib.import_module("gpumesh_tiny.serve")
template = importlib.import_module("gpumesh_tiny.template")
tokenizer = importlib.import_module("gpumesh_tiny.tokenizer")
tools = importlib.import_module("gpumesh_tiny.tools")


def test_held_out_prompts_never_occur_in_training_text() -> None:
    trained = {text for made in islice(corpus.dialogues(7), 4000) for text in made.prompts()}
    judged = {made.prompts()[0] for made in corpus.evaluation(tools.tool_use, 100, 1234)}
    assert len(judged) == 100
    assert not judged & trained


def test_a_tenth_of_prompts_is_held_out() -> None:
    random = corpus.new_random(3)
    prompts = {tools.tool_use(random).prompts()[0] for _ in range(3000)}
    share = sum(map(dialogue.is_held_out, prompts)) / len(prompts)
    assert 0.07 < share < 0.13


def test_same_seed_makes_the_same_text() -> None:
    first, second = (list(islice(corpus.dialogues(5), 50)) for _ in range(2))
    assert first == second
    assert list(islice(corpus.dialogues(6), 50)) != first


def test_tool_arguments_are_copied_from_the_request() -> None:
    random = corpus.new_random(4)
    for _ in range(500):
        use = random.choice(families.FAMILIES)(random)
        assert all(str(value) in use.request for value in use.arguments.values()), use


def test_no_training_dialogue_is_longer_than_the_context() -> None:
    reader = tokenizer.load_tokenizer(SHIPPED / "tokenizer.json")
    texts = [template.render(made.messages, made.tools) for made in islice(corpus.dialogues(8), 500)]
    assert max(len(reader.encode(text).ids) for text in texts) <= 2048


def test_gguf_is_small_and_the_card_describes_this_very_file() -> None:
    data = GGUF.read_bytes()
    assert data[:4] == b"GGUF"
    assert len(data) <= 4_000_000
    card = (SHIPPED / "MODEL_CARD.md").read_text()
    assert hashlib.sha256(data).hexdigest() in card
    assert f"{len(data):,} bytes, {Shipped().quantisation}" in card
    accuracy = re.search(r"all arguments right \(bar 0\.8\) \| (\d+) \| ([\d.]+)", card)
    assert accuracy
    assert int(accuracy[1]) >= 100
    assert float(accuracy[2]) >= 0.80


def test_llama_cpp_renders_and_tokenises_dialogues_as_training_did() -> None:
    reader = tokenizer.load_tokenizer(SHIPPED / "tokenizer.json")
    with serve.serving(GGUF) as client:
        for made in islice(corpus.dialogues(9), 40):
            text = template.render(made.messages[:-1], made.tools, generate=True)
            messages = [
                dict(entry, tool_call_id="call00001") if entry["role"] == "tool" else entry for entry in made.messages
            ]
            asked = {"messages": messages[:-1]} | ({"tools": made.tools} if made.tools else {})
            assert client.post("/apply-template", asked)["prompt"] == text
            wanted = {"content": text, "add_special": False, "parse_special": True}
            assert client.post("/tokenize", wanted)["tokens"] == reader.encode(text).ids


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.0, "seed": 12}])
def test_readme_question_is_answered_sensibly(options: dict[str, float]) -> None:
    with serve.serving(GGUF) as client:
        choice = client.chat([README_PROMPT], **options)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "joins people who need AI inference with people who own GPUs" in choice["message"]["content"]


def test_weather_request_becomes_one_tool_call_with_the_city() -> None:
    offered = [dialogue.tool("get_weather", {"city": "string"})]
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    with serve.serving(GGUF) as client:
        choice = client.chat(asked, tools=offered)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    called = choice["message"]["tool_calls"][0]["function"]
    assert called["name"] == "get_weather"
    assert json.loads(called["arguments"]) == {"city": "Paris"}


def test_long_story_streams_more_than_150_chunks() -> None:
    with serve.serving(GGUF) as client:
        pieces = client.stream([{"role": "user", "content": "Tell me a long story."}])
    assert len(pieces) > 150
