"""Judges the finished GGUF over HTTP: `python -m gpumesh_tiny.evaluate --model FILE`; exit status 1 on a failed bar.

Every prompt of the tool and small-talk parts is held out of training (dialogue.is_held_out). Decoding is greedy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import chat, stories, structured, tools
from .corpus import conversation, dialogues, evaluation, new_random
from .dialogue import Dialogue
from .serve import Client, serving
from .template import render
from .tokenizer import load_tokenizer

SEED = 20_261_122
TOOL_PROMPTS = 200
TALK_PROMPTS = 100
SCHEMA_PROMPTS = 30
TOOL_BAR = 0.80
README_PROMPT = "Hello! What is gpumesh?"
GPUMESH_SAID = "joins people who need AI inference with people who own GPUs"
LONG_PROMPTS = 20
MIN_LONG_TOKENS = 1000
# About 1,900 tokens with the quotes and braces of the Python text; longer ones would not fit a slot with the answer.
MAX_TALK_CHARACTERS = 8000
JSON_TOKENS = 200
STORY_CHUNKS = 150

Results = dict[str, float]


def tool_accuracy(client: Client) -> Results:
    """Share of held-out requests that come back as exactly one call of the right tool with the right arguments."""
    right_name = right = answered = asked = 0
    for dialogue in evaluation(tools.tool_use, TOOL_PROMPTS, SEED):
        request, wanted = dialogue.messages[0], dialogue.messages[1]["tool_calls"][0]["function"]
        message = client.chat([request], tools=dialogue.tools)["choices"][0]["message"]
        calls = message.get("tool_calls") or []
        got: dict[str, Any] = calls[0]["function"] if len(calls) == 1 else {"name": None, "arguments": "{}"}
        good = got["name"] == wanted["name"] and json.loads(got["arguments"]) == json.loads(wanted["arguments"])
        right_name += got["name"] == wanted["name"]
        right += good
        if not good:
            print(f"  wrong: {request['content']!r} wanted {wanted['arguments']} got {got['name']} {got['arguments']}")
        if len(dialogue.messages) > 3:
            asked += 1
            reply = client.chat(with_call_ids(dialogue.messages[:3]), tools=dialogue.tools)["choices"][0]["message"]
            answered += reply.get("content") == dialogue.messages[3]["content"]
    return {
        "tool_name_accuracy": right_name / TOOL_PROMPTS,
        "tool_call_accuracy": right / TOOL_PROMPTS,
        "tool_result_accuracy": answered / asked,
        "tool_prompts": TOOL_PROMPTS,
    }


def with_call_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with the ids that the API demands and the template leaves out."""
    identified = []
    for message in messages:
        if message.get("tool_calls"):
            message = {**message, "tool_calls": [{**entry, "id": "call00001"} for entry in message["tool_calls"]]}
        if message["role"] == "tool":
            message = {**message, "tool_call_id": "call00001"}
        identified.append(message)
    return identified


def no_tool_accuracy(client: Client) -> Results:
    """Share of held-out small talk, asked with tools on offer, answered in words; and with a call where one is required."""
    plain = ended = 0
    for dialogue in evaluation(tools.no_tool, TALK_PROMPTS, SEED):
        message = client.chat([dialogue.messages[0]], tools=dialogue.tools)["choices"][0]["message"]
        plain += not message.get("tool_calls") and bool(message.get("content"))
        must = client.chat([dialogue.messages[0]], tools=dialogue.tools, tool_choice="required")["choices"][0]
        ended += must["finish_reason"] == "tool_calls"
    return {"no_tool_accuracy": plain / TALK_PROMPTS, "required_accuracy": ended / TALK_PROMPTS}


def talk_accuracy(client: Client) -> Results:
    """Share of held-out spellings whose answer is word for word the corpus's only answer."""
    makers: tuple[Callable[..., Dialogue], ...] = (chat.knowledge, chat.say, chat.unknown, chat.count)
    right = total = 0
    for maker in makers:
        for dialogue in evaluation(maker, TALK_PROMPTS // len(makers), SEED):
            reply = client.chat([dialogue.messages[0]])["choices"][0]["message"]["content"]
            wanted = dialogue.messages[1]["content"]
            # A list of colours has many right answers; it is judged by its form.
            right += reply == wanted or (reply.count(", ") == wanted.count(", ") and "colo" in dialogue.prompts()[0])
            total += 1
            if reply != wanted:
                print(f"  talk: {dialogue.prompts()[0]!r} wanted {wanted!r} got {reply!r}")
    return {"talk_accuracy": right / total}


def readme_answer(client: Client) -> Results:
    """The README's question: says who is joined with whom, greedily and in twenty sampled answers."""
    asked = [{"role": "user", "content": README_PROMPT}]
    greedy = client.chat(asked)["choices"][0]["message"]["content"]
    print(f"  {README_PROMPT} -> {greedy}")
    sampled = [
        client.post("/v1/chat/completions", {"messages": asked, "max_tokens": 200, "seed": seed}) for seed in range(20)
    ]
    texts = [greedy, *(answer["choices"][0]["message"]["content"] for answer in sampled)]
    good = [text for text in texts if GPUMESH_SAID in text]
    return {"readme_accuracy": len(good) / len(texts)}


def long_conversations(client: Client) -> Results:
    """Share of right answers to the README's question after 1,000 to 1,900 tokens of other talk."""
    random = new_random(SEED)
    good = total = 0
    while total < LONG_PROMPTS:
        talk = [*conversation(random, random.randint(14, 30)).messages, {"role": "user", "content": README_PROMPT}]
        answer = client.chat(talk, max_tokens=100) if len(str(talk)) < MAX_TALK_CHARACTERS else None
        if answer and answer["usage"]["prompt_tokens"] >= MIN_LONG_TOKENS:
            total += 1
            good += GPUMESH_SAID in answer["choices"][0]["message"]["content"]
    return {"long_conversation_accuracy": good / total}


def json_answers(client: Client) -> Results:
    """Share of JSON-schema requests whose answer parses, has the keys and ends by itself in under 200 tokens."""
    good = 0
    for number, dialogue in enumerate(evaluation(structured.described, SCHEMA_PROMPTS, SEED)):
        wanted = json.loads(dialogue.messages[1]["content"])
        schema = {
            "type": "object",
            "properties": {key: schema_of(value) for key, value in wanted.items()},
            "required": list(wanted),
            "additionalProperties": False,
        }
        # Every third request does not mention JSON at all: the grammar alone leads the model there.
        question = dialogue.prompts()[0] if number % 3 else "Tell me about a friend."
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        answer = client.chat([{"role": "user", "content": question}], response_format=form, max_tokens=JSON_TOKENS)
        choice = answer["choices"][0]
        ended = choice["finish_reason"] == "stop"
        good += ended and set(json.loads(choice["message"]["content"])) == set(wanted)
        if not ended:
            print(f"  json: {question!r} got {choice['message']['content']!r}")
    return {"json_accuracy": good / SCHEMA_PROMPTS}


def schema_of(value: Any) -> dict[str, Any]:
    """The JSON schema of a value of the corpus."""
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer"}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0])}
    return {"type": "string"}


def features(client: Client) -> Results:
    """Log probabilities, two choices, long streams; each figure is 1 when it works."""
    asked = [{"role": "user", "content": README_PROMPT}]
    choice = client.chat(asked, logprobs=True, top_logprobs=2)["choices"][0]
    tokens = choice["logprobs"]["content"]
    with_logs = "".join(token["token"] for token in tokens) == choice["message"]["content"]
    two = client.chat(asked, n=2, temperature=1)["choices"]
    lengths = [len(client.stream([{"role": "user", "content": prompt}])) for prompt in stories.LONG]
    print(f"  chunks of long stories: {lengths}")
    return {
        "logprobs": float(with_logs and all(len(token["top_logprobs"]) == 2 for token in tokens)),
        "two_choices": float([entry["index"] for entry in two] == [0, 1]),
        "story_chunks_min": float(min(lengths)),
    }


def rendering(client: Client, tokenizer_file: Path) -> Results:
    """Share of dialogues that llama.cpp renders and tokenises exactly as training did."""
    tokenizer = load_tokenizer(tokenizer_file)
    same = total = 0
    for dialogue in (dialogue for dialogue, _ in zip(dialogues(SEED), range(300), strict=False)):
        text = render(dialogue.messages[:-1], dialogue.tools, generate=True)
        body = {"messages": with_call_ids(dialogue.messages[:-1])} | (
            {"tools": dialogue.tools} if dialogue.tools else {}
        )
        theirs = client.post("/apply-template", body)["prompt"]
        ids = client.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        total += 1
        same += theirs == text and ids == tokenizer.encode(text).ids
    return {"rendering_accuracy": same / total}


def judge(results: Results) -> list[str]:
    """The bars that `results` misses, as sentences."""
    bars = {
        "tool_call_accuracy": TOOL_BAR, "no_tool_accuracy": 0.9, "readme_accuracy": 1.0, "json_accuracy": 1.0, "required_accuracy": 0.9,
        "logprobs": 1.0, "two_choices": 1.0, "story_chunks_min": STORY_CHUNKS, "rendering_accuracy": 1.0,
    }  # fmt: skip
    return [f"{name} is {results[name]}, wanted {bar}" for name, bar in bars.items() if results[name] < bar]


def evaluate(model: Path) -> Results:
    """All figures of one GGUF; its tokenizer.json lies beside it."""
    with serving(model) as client:
        parts = (
            tool_accuracy,
            no_tool_accuracy,
            talk_accuracy,
            readme_answer,
            long_conversations,
            json_answers,
            features,
        )
        results: Results = {}
        for part in parts:
            results |= part(client)
        return results | rendering(client, model.with_name("tokenizer.json"))


def main() -> int:
    """Prints the figures as JSON; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="gpumesh_tiny.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--results", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args()
    results = evaluate(arguments.model)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.results:
        arguments.results.write_text(text + "\n")
    missed = judge(results)
    for sentence in missed:
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
