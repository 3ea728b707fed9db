"""Whether a prompt fits its model's context. Bytes decide almost always; only a prompt near the limit is counted.

A byte-level tokenizer makes at most one token of a byte, so text bytes and the template's own tokens are an upper bound.
"""

from dataclasses import dataclass
from typing import Final

from gpumesh.common.v1.job_pb2 import Model
from gpumesh_dispatch.openai.parse import ParsedChat
from gpumesh_dispatch.openai.schema import ChatRequest
from gpumesh_runtime.errors import InvalidArgument, MeshError, Reason

# English text has about 4 bytes a token, code and other languages fewer: an estimate for queues and holds, never for money.
_BYTES_PER_TOKEN: Final = 3
# Where nobody can count, a prompt this many times denser than usual text is surely too long.
_SURELY_BYTES_PER_TOKEN: Final = 8
_IMAGE_TOKENS: Final = 1024
# Templates print tool definitions again with white space and instructions around them.
_TOOLS_FACTOR: Final = 2
_TOOLS_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class PromptSize:
    """Prompt tokens. estimate: likely, or exact when counted. bound: no honest node counts more; 0: unknown (images)."""

    estimate: int
    bound: int


def measure(chat: ParsedChat, model: Model) -> PromptSize | None:
    """The size by bytes; None when it may exceed the context and must be counted (`text_of`, `counted`)."""
    request = chat.request
    overhead = model.template_overhead_tokens * (len(request.messages) + 1)
    vision = _has_images(request)
    bound = chat.prompt_bytes + overhead
    if request.tools is not None:
        bound += chat.prompt_bytes * (_TOOLS_FACTOR - 1) + _TOOLS_TOKENS
    estimate = chat.prompt_bytes // _BYTES_PER_TOKEN + overhead + (_IMAGE_TOKENS if vision else 0)
    context = model.context_tokens
    if not context or bound < context:
        return PromptSize(min(estimate, bound), 0 if vision else bound)
    return None


def uncounted(chat: ParsedChat, model: Model) -> PromptSize:
    """The size of a prompt near the limit of a model without a tokenizer in the catalogue: the engine decides, unless it is hopeless.

    Raises InvalidArgument (CONTEXT_LENGTH_EXCEEDED).
    """
    least = chat.prompt_bytes // _SURELY_BYTES_PER_TOKEN
    if least >= model.context_tokens:
        raise too_long(model, least)
    overhead = model.template_overhead_tokens * (len(chat.request.messages) + 1)
    estimate = min(chat.prompt_bytes // _BYTES_PER_TOKEN + overhead, model.context_tokens - 1)
    return PromptSize(
        max(1, estimate),
        0 if _has_images(chat.request) else chat.prompt_bytes * _TOOLS_FACTOR + overhead + _TOOLS_TOKENS,
    )


def counted(chat: ParsedChat, model: Model, text_tokens: int) -> PromptSize:
    """The size of a prompt whose text was counted. Raises InvalidArgument (CONTEXT_LENGTH_EXCEEDED) with both numbers."""
    # Of the template's tokens only an upper bound is known, so they refuse nothing here: at the very edge the engine decides.
    if text_tokens >= model.context_tokens:
        raise too_long(model, text_tokens)
    overhead = model.template_overhead_tokens * (len(chat.request.messages) + 1)
    tools = chat.request.tools is not None
    bound = text_tokens * (_TOOLS_FACTOR if tools else 1) + overhead + (_TOOLS_TOKENS if tools else 0)
    return PromptSize(min(text_tokens + overhead, model.context_tokens - 1), 0 if _has_images(chat.request) else bound)


def too_long(model: Model, tokens: int) -> MeshError:
    """context_length_exceeded with both numbers."""
    return InvalidArgument(
        Reason.CONTEXT_LENGTH_EXCEEDED,
        f"This model's maximum context length is {model.context_tokens} tokens, but your messages have {tokens}. Shorten them.",
        metadata={"param": "messages", "limit": str(model.context_tokens), "used": str(tokens)},
    )


def text_of(request: ChatRequest) -> list[str]:
    """All text of the prompt, in pieces, for a tokenizer (sensitive: never logged)."""
    texts: list[str] = []
    for message in request.messages:
        if isinstance(message.content, str):
            texts.append(message.content)
        elif message.content is not None:
            texts.extend(part.text for part in message.content if part.text)
        for call in message.tool_calls or ():
            if call.function is not None:
                texts += [call.function.name, call.function.arguments]
    for tool in request.tools or ():
        texts += [
            tool.function.name,
            tool.function.description or "",
            bytes(tool.function.parameters).decode("utf-8", "replace"),
        ]
    return texts


def _has_images(request: ChatRequest) -> bool:
    return any(
        part.type == "image_url"
        for message in request.messages
        if isinstance(message.content, list)
        for part in message.content
    )
