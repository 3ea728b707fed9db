"""What a buyer does with the official `openai` client, run by that client's own environment (2.x and 3.x).

Prints one JSON object of what it saw.

    python openai_client.py BASE_URL API_KEY MODEL

It imports nothing of ours. The test beside it starts it and judges what it prints.
"""

import json
import sys
from typing import Any

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def failure(call: Any) -> dict[str, Any]:
    """How a call fails: the client's exception class and what it carries."""
    try:
        call()
    except openai.APIStatusError as err:
        return {
            "class": type(err).__name__,
            "status": err.status_code,
            "code": err.code,
            "param": err.param,
            "type": err.type,
        }
    return {"class": "none"}


def main() -> None:
    """Runs everything."""
    base_url, api_key, model = sys.argv[1:4]
    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=60)
    hello = [{"role": "user", "content": "Hello! What is gpumesh?"}]
    seen: dict[str, Any] = {"version": openai.__version__, "models": [entry.id for entry in client.models.list()]}
    seen["model"] = client.models.retrieve(model).id

    answer = client.chat.completions.create(model=model, messages=hello, temperature=0, max_tokens=80)
    seen["text"], seen["finish"] = answer.choices[0].message.content, answer.choices[0].finish_reason
    seen["usage"] = answer.usage.model_dump()

    stream = client.chat.completions.create(
        model=model, messages=hello, temperature=0, max_tokens=80, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    seen["streamed"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    seen["stream_usage"] = chunks[-1].usage.model_dump()
    seen["stream_finish"] = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
    with client.chat.completions.stream(model=model, messages=hello, temperature=0, max_tokens=80) as helper:
        for _ in helper:
            pass
        seen["accumulated"] = helper.get_final_completion().choices[0].message.content

    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    call = client.chat.completions.create(
        model=model, messages=question, tools=[WEATHER], temperature=0, max_tokens=100
    )
    made = call.choices[0].message.tool_calls or []
    seen["tool"] = [[c.function.name, json.loads(c.function.arguments)] for c in made]
    seen["tool_finish"] = call.choices[0].finish_reason
    pieces = client.chat.completions.create(
        model=model, messages=question, tools=[WEATHER], temperature=0, max_tokens=100, stream=True
    )
    arguments = [d.function.arguments or "" for c in pieces if c.choices for d in c.choices[0].delta.tool_calls or ()]
    seen["tool_streamed"] = json.loads("".join(arguments))

    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    person = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Give me a person as JSON."}],
        response_format=schema,
        max_tokens=200,
    )
    seen["person"] = json.loads(person.choices[0].message.content)
    several = client.chat.completions.create(
        model=model, messages=hello, n=2, max_tokens=8, logprobs=True, top_logprobs=2, seed=7, stop=["zzz"]
    )
    seen["choices"] = [choice.index for choice in several.choices]
    seen["logprobs"] = [len(choice.logprobs.content) for choice in several.choices]
    seen["top_logprobs"] = len(several.choices[0].logprobs.content[0].top_logprobs)

    wrong = openai.OpenAI(base_url=base_url, api_key=api_key[:-8] + "AAAAAAAA", max_retries=0)
    seen["bad_key"] = failure(lambda: wrong.chat.completions.create(model=model, messages=hello))
    seen["bad_model"] = failure(lambda: client.chat.completions.create(model="no-such-model", messages=hello))
    seen["bad_parameter"] = failure(lambda: client.chat.completions.create(model=model, messages=hello, temperature=99))
    seen["too_long"] = failure(
        lambda: client.chat.completions.create(model=model, messages=[{"role": "user", "content": "mesh " * 20_000}])
    )
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
