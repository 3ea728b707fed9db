"""From a chat body to a validated, measured request: what every caller does before it asks for admission."""

import msgspec

from gpumesh.common.v1.job_pb2 import Model
from gpumesh_dispatch.models import Models
from gpumesh_dispatch.openai.fit import PromptSize, counted, measure, text_of, uncounted
from gpumesh_dispatch.openai.parse import ParsedChat, parse_chat
from gpumesh_dispatch.tokens import TokenCounter


class Prepared(msgspec.Struct, frozen=True):
    """A chat that passed validation, and its size. model: None when the catalogue does not know it; the router says so."""

    chat: ParsedChat
    model: Model | None
    size: PromptSize


async def prepare_chat(body: bytes, models: Models, counter: TokenCounter) -> Prepared:
    """Parses, resolves and measures. Raises InvalidArgument (INVALID_ARGUMENT with "param", CONTEXT_LENGTH_EXCEEDED) or PayloadTooLarge.

    Awaits only for a prompt so near its model's context that it must be counted.
    """
    chat = parse_chat(body)
    model = models.find(chat.request.model)
    if model is None:
        return Prepared(chat, None, PromptSize(chat.prompt_bytes // 3, 0))
    size = measure(chat, model)
    if size is None:
        tokens = await counter.count(model.tokenizer_sha256, text_of(chat.request))
        size = uncounted(chat, model) if tokens is None else counted(chat, model, tokens)
    return Prepared(chat, model, size)
