"""What an engine's answer is made of, as plain values: the node's half of the typed frame."""

from enum import IntEnum

import msgspec


class FinishReason(IntEnum):
    """Why a choice ended. The numbers are those of gpumesh.node.v1.FinishReason (a test compares them)."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    TOOL_CALLS = 3
    CONTENT_FILTER = 4


class TokenLogprob(msgspec.Struct, gc=False, frozen=True):
    """Natural logarithm of one token's probability. top: the most likely tokens at this place, without tops of their own."""

    token: str
    logprob: float
    token_bytes: bytes = b""
    top: "tuple[TokenLogprob, ...]" = ()


class ToolCallDelta(msgspec.Struct, gc=False, frozen=True):
    """Growth of one tool call. index: which call of the message, from 0. call_id and name come in its first delta."""

    index: int
    call_id: str = ""
    name: str = ""
    arguments: str = ""


class Delta(msgspec.Struct, gc=False, frozen=True):
    """What one choice gained. choice: from 0. finish: set in the choice's last delta."""

    choice: int
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish: FinishReason = FinishReason.NONE
    refusal: str = ""

    @property
    def has_content(self) -> bool:
        """Whether a client would see anything of it: an end alone is not content."""
        return bool(self.text or self.reasoning or self.tool_calls or self.refusal)


class Usage(msgspec.Struct, gc=False, frozen=True):
    """Tokens of one try. 0 prompt tokens: the engine did not say (yet)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    reasoning_tokens: int = 0
