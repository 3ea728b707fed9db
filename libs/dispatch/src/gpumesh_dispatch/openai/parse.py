"""Reads an OpenAI chat body: bytes in, ParsedChat out, or one InvalidArgument that names the parameter and says what to do.

The body itself goes on to the engine untouched; what is decoded here only serves admission, validation and rendering.
Measured: about 1.5 us for a short chat.
"""

import re
from typing import Final

import msgspec

from gpumesh.common.v1.job_pb2 import Feature
from gpumesh_dispatch.openai.depth import MAX_DEPTH, too_deep
from gpumesh_dispatch.openai.hints import hint_for
from gpumesh_dispatch.openai.schema import ChatRequest
from gpumesh_dispatch.openai.validate import bad, check_chat
from gpumesh_runtime.errors import MeshError, PayloadTooLarge, Reason

MAX_BODY_BYTES: Final = 8 << 20
_DECODER: Final = msgspec.json.Decoder(ChatRequest)
_AT: Final = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?$", re.DOTALL)
_MISSING: Final = re.compile(r"^Object missing required field `(\w+)`$")
_WORDS: Final = {"float": "number", "int": "whole number", "str": "string", "bool": "boolean", "array": "list"}
_TYPE: Final = re.compile("`([^`]*)`")
_ENUM: Final = re.compile(r"^Invalid enum value (.*)$", re.DOTALL)


class ParsedChat(msgspec.Struct):
    """A chat request that passed validation.

    request: the decoded fields. body: the bytes as they came, for the engine (sensitive: never logged). features: needed of the engine.
    prompt_bytes: upper bound of the prompt's text in UTF-8, tools included. max_output_tokens: asked cap per choice, None: not given.
    """

    request: ChatRequest
    body: bytes
    features: tuple["Feature.ValueType", ...]
    prompt_bytes: int
    max_output_tokens: int | None
    choices: int
    stream: bool
    include_usage: bool
    include_cost: bool
    logprobs: bool


def parse_chat(body: bytes) -> ParsedChat:
    """Body of POST /v1/chat/completions. Raises InvalidArgument (metadata "param") or PayloadTooLarge."""
    if len(body) > MAX_BODY_BYTES:
        raise PayloadTooLarge(
            Reason.PAYLOAD_TOO_LARGE,
            f"The request body has {len(body)} bytes; at most {MAX_BODY_BYTES} are read. Send less text or fewer images.",
            metadata={"limit": str(MAX_BODY_BYTES)},
        )
    try:
        request = _DECODER.decode(body)
    except msgspec.ValidationError as err:
        raise _explain(str(err)) from None
    except msgspec.DecodeError as err:
        raise bad("", f"The request body is not valid JSON: {_safe_decode_text(str(err))}.") from None
    except UnicodeDecodeError:
        raise bad("", "The request body is not valid UTF-8. Send JSON encoded as UTF-8.") from None
    except RecursionError:
        raise _too_deep() from None
    if too_deep(body):
        raise _too_deep()
    features, prompt_bytes = check_chat(request)
    options = request.stream_options
    return ParsedChat(
        request=request,
        body=body,
        features=features,
        prompt_bytes=prompt_bytes,
        max_output_tokens=request.max_completion_tokens or request.max_tokens,
        choices=request.n or 1,
        stream=request.stream is True,
        include_usage=options is not None and options.include_usage is True,
        include_cost=request.usage is not None and request.usage.include is True,
        logprobs=request.logprobs is True,
    )


def _too_deep() -> MeshError:
    return bad(
        "",
        f"The request body nests deeper than {MAX_DEPTH} levels. Flatten the JSON, for example the tool parameter schemas.",
    )


def _safe_decode_text(text: str) -> str:
    """msgspec's syntax errors name byte positions and single characters, never content; only the prefix is dropped."""
    return text.removeprefix("JSON is malformed: ").rstrip(".")


def _explain(text: str) -> MeshError:
    """A msgspec validation message as a sentence for the caller. Values are quoted for enums only, and shortened."""
    match = _AT.match(text)
    what, path = (match["what"], match["path"] or "$") if match else (text, "$")
    param = path.removeprefix("$").removeprefix(".")
    if missing := _MISSING.match(what):
        name = f"{param}.{missing[1]}" if param else missing[1]
        return bad(name, f"Missing required parameter: '{name}'. {hint_for(name)}".rstrip())
    hint = hint_for(param)
    if enum := _ENUM.match(what):
        return bad(param, f"Invalid value for '{param}': {enum[1][:64]} is not supported. {hint}".rstrip())
    where = f"'{param}'" if param else "the request body"
    return bad(param, f"Invalid value for {where}: {_plain(what)}. {hint}".rstrip())


def _plain(what: str) -> str:
    """msgspec's "Expected `float` <= 2.0" as "expected number <= 2.0"."""
    text = _TYPE.sub(lambda match: " or ".join(_WORDS.get(name, name) for name in match[1].split(" | ")), what)
    return text[:1].lower() + text[1:]
