"""One sentence per parameter that says what is allowed, for error messages."""

import re
from typing import Final

from gpumesh_dispatch.openai.schema import MAX_CHOICES, MAX_MODEL_CHARS, MAX_STOP_SEQUENCES, MAX_TOOLS, MAX_TOP_LOGPROBS

_INDEX: Final = re.compile(r"\[[^\]]*\]")
_HINTS: Final[dict[str, str]] = {
    "": "Send a JSON object with at least 'model' and 'messages'.",
    "model": f"Give the id of a model as a string of 1 to {MAX_MODEL_CHARS} characters; GET /v1/models lists them.",
    "messages": "Give a list of at least one message, each with a 'role' and 'content'.",
    "messages[]": "Each message is an object with a 'role' and 'content'.",
    "messages[].role": "Supported roles are 'developer', 'system', 'user', 'assistant', 'tool' and 'function'.",
    "messages[].content": 'Give a string, or a list of parts such as {"type": "text", "text": "..."}.',
    "messages[].content[].type": "Supported part types are 'text', 'image_url', 'input_audio', 'file' and 'refusal'.",
    "messages[].content[].image_url.url": "Give an https or data URL.",
    "messages[].tool_calls[].id": "Repeat the id that the assistant's tool call had.",
    "stream": "Give true or false.",
    "stream_options": 'Give an object such as {"include_usage": true}.',
    "stream_options.include_usage": "Give true or false.",
    "max_tokens": "Give a whole number of at least 1.",
    "max_completion_tokens": "Give a whole number of at least 1.",
    "temperature": "Give a number from 0 to 2.",
    "top_p": "Give a number from 0 to 1.",
    "n": f"Give a whole number from 1 to {MAX_CHOICES}.",
    "stop": f"Give a string, or a list of 1 to {MAX_STOP_SEQUENCES} strings.",
    "presence_penalty": "Give a number from -2 to 2.",
    "frequency_penalty": "Give a number from -2 to 2.",
    "logprobs": "Give true or false.",
    "top_logprobs": f"Give a whole number from 0 to {MAX_TOP_LOGPROBS}.",
    "seed": "Give a whole number that fits in 64 bits.",
    "tools": f"Give a list of 1 to {MAX_TOOLS} tools.",
    "tools[].type": "Only tools of type 'function' are supported.",
    "tools[].function.name": "Use 1 to 64 letters, digits, dots, underscores and dashes.",
    "tools[].function.parameters": "Give a JSON schema object.",
    "tool_choice": 'Give \'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": "..."}}.',
    "tool_choice.type": "Only 'function' is supported.",
    "response_format.type": "Supported formats are 'text', 'json_object' and 'json_schema'.",
    "response_format.json_schema.name": "Use 1 to 64 letters, digits, dots, underscores and dashes.",
    "logit_bias": "Give an object from token id to a number from -100 to 100.",
    "logit_bias[]": "Give a number from -100 to 100.",
    "modalities[]": "Supported modalities are 'text' and 'audio'.",
}


def hint_for(param: str) -> str:
    """What is allowed there; empty when there is nothing more to say. `param`: for example "messages[0].role"."""
    return _HINTS.get(_INDEX.sub("[]", param), "")
