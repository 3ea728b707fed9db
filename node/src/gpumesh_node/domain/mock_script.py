"""What mock-model does: a script from its configuration and from directives in the prompt. Pure, seeded, the same every time.

A directive is `[[mock name=value name=value]]` anywhere in the last message; the prompt wins over the configuration.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

_DIRECTIVE: Final = re.compile(r"\[\[mock((?:\s+[a-z_]+=[^\s\]]+)*)\s*\]\]")
_WORDS: Final = (
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "inlet",
    "jade",
    "kelp",
    "lark",
    "maple",
    "north",
    "ochre",
    "pine",
    "quartz",
    "river",
    "slate",
    "tide",
    "umber",
    "vale",
    "willow",
    "yarrow",
    "zephyr",
)


class ScriptError(ValueError):
    """A directive that mock-model does not know: a misspelt test must not pass."""


@dataclass(frozen=True, slots=True)
class Script:
    """How one answer goes.

    delay_s: before the first token. tps: tokens per second after it, 0 all at once. tokens: how many, before the cap.
    reasoning: of these, how many are reasoning. die_after, stall_after, garbage_after: after so many tokens the connection breaks, nothing
    more comes, or bytes come that are no answer; -1 never. error: fail at once: "engine", "rejected" or "context".
    tool: call this function with {} instead of answering. echo: answer with the prompt's own last message.
    token_bytes: length of every token; 0 as the words are.
    """

    delay_s: float = 0.0
    tps: float = 0.0
    tokens: int = 16
    reasoning: int = 0
    die_after: int = -1
    stall_after: int = -1
    garbage_after: int = -1
    error: str = ""
    tool: str = ""
    echo: bool = False
    seed: int = 0
    token_bytes: int = 0


_KINDS: Final[dict[str, Callable[[str], float | int | str | bool]]] = {
    "delay_s": float,
    "tps": float,
    "tokens": int,
    "reasoning": int,
    "die_after": int,
    "stall_after": int,
    "garbage_after": int,
    "error": str,
    "tool": str,
    "echo": lambda value: value.lower() in ("1", "true"),
    "seed": int,
    "token_bytes": int,
}


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None


class _Body(msgspec.Struct):
    messages: list[_Message] | None = None
    seed: int | None = None


_DECODER: Final = msgspec.json.Decoder(_Body)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What mock-model reads of a request. text: the last message. tokens: words of all messages. Sensitive: never logged."""

    text: str
    tokens: int
    seed: int | None

    def __repr__(self) -> str:
        return f"Prompt(tokens={self.tokens})"


def read_prompt(payload: bytes) -> Prompt:
    """The prompt of a chat request. Raises msgspec.MsgspecError."""
    body = _DECODER.decode(payload)
    texts = [_text(message) for message in body.messages or ()]
    return Prompt(texts[-1] if texts else "", sum(len(text.split()) for text in texts), body.seed)


def _text(message: _Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def make_script(given: Mapping[str, object]) -> Script:
    """A script from a configuration's names and values. Raises ScriptError."""
    return _changed(Script(), ((name, str(value)) for name, value in given.items()))


def read_script(text: str, base: Script) -> Script:
    """`base`, changed by the directives in `text`. Raises ScriptError."""
    for match in _DIRECTIVE.finditer(text):
        pairs = (word.partition("=") for word in match[1].split())
        base = _changed(base, ((name, value) for name, _, value in pairs))
    return base


def _changed(script: Script, pairs: Iterable[tuple[str, str]]) -> Script:
    changes: dict[str, Any] = {}
    for name, value in pairs:
        convert = _KINDS.get(name)
        if convert is None:
            raise ScriptError(f"mock-model knows no directive {name}")
        try:
            changes[name] = convert(value)
        except ValueError:
            raise ScriptError(f"mock-model's {name} has a wrong value") from None
    return replace(script, **changes)


def words(script: Script, prompt: Prompt, choice: int) -> list[str]:
    """The answer's tokens: one word each, the same for the same seed, prompt length and choice."""
    if script.echo:
        pieces = re.findall(r"\S+\s*", prompt.text)
        return pieces or [""]
    seed = script.seed if prompt.seed is None else prompt.seed
    # The seed is a text: random.Random(tuple) would depend on the process's hash seed.
    source = random.Random(f"{seed}/{prompt.tokens}/{choice}")  # noqa: S311 -- a deterministic script, not a secret
    # One object a word: an answer of thousands of tokens costs a pointer each.
    tokens = [_sized(word, script.token_bytes) for word in _WORDS]
    return [source.choice(tokens) for _ in range(script.tokens)]


def _sized(word: str, size: int) -> str:
    """A word and a space, repeated to `size` bytes where one is given."""
    text = word + " "
    return (text * (size // len(text) + 1))[:size] if size else text
