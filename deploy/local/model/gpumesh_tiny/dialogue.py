"""What every part of the corpus makes: a dialogue, and the rule that keeps some prompts out of training."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

# One prompt in this many is never trained on; evaluation draws from those alone.
HELD_OUT_SHARE = 10


@dataclass(slots=True)
class Dialogue:
    """Messages in the OpenAI form and the tools on offer.

    `given` is the beginning of every assistant turn that is not learned: what a grammar puts there, so that the model
    learns to go on from it and to end, but not to begin so by itself.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    given: str = ""

    def prompts(self) -> list[str]:
        """The user's texts, in order."""
        return [message["content"] for message in self.messages if message["role"] == "user"]


Maker = Callable[[Random], Dialogue]


def is_held_out(prompt: str) -> bool:
    """True for a fixed tenth of all prompts, decided by a checksum of the text, so that no list must be kept."""
    return zlib.crc32(prompt.encode()) % HELD_OUT_SHARE == 0


def user(text: str) -> dict[str, Any]:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    """An assistant turn of plain text."""
    return {"role": "assistant", "content": text}


def exchange(question: str, answer: str) -> Dialogue:
    """One question, one answer."""
    return Dialogue([user(question), assistant(answer)])


def call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An assistant turn that calls one tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tool(name: str, parameters: Mapping[str, str], description: str = "") -> dict[str, Any]:
    """A tool definition; `parameters` maps a name to its JSON type, all of them required."""
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def pick(random: Random, options: Sequence[str]) -> str:
    """One of `options`, evenly."""
    return options[int(random.random() * len(options))]


def plural(count: int, noun: str) -> str:
    """`1 minute`, `5 minutes`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
