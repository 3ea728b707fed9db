"""What OpenAI-compatible engines say, as deltas. Engines differ in small ways; everything that differs ends here.

Bytes that do not fit the shape raise EngineFailure (ENGINE_ERROR): an engine's output never travels on unparsed.
Shapes: https://platform.openai.com/docs/api-reference/chat, and llama.cpp's, vLLM's, Ollama's and TGI's variations of it.
"""

from typing import Final

import msgspec

from gpumesh_node.domain.deltas import Delta, FinishReason, TokenLogprob, ToolCallDelta, Usage
from gpumesh_node.domain.failures import broken, from_stream

# OpenAI's own value for "so unlikely that it is not reported"; llama.cpp gives null, which is no JSON number for minus infinity.
_LEAST_LOGPROB: Final = -9999.0
_MAX_TOOL_CALLS: Final = 1024
_FINISH: Final = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "eos_token": FinishReason.STOP,
    "stop_sequence": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
    "content_filter": FinishReason.CONTENT_FILTER,
}


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _TokenLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float | None = None
    bytes: list[int] | None = None
    top_logprobs: "list[_TokenLogprob] | None" = None


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_TokenLogprob] | None = None


class _Message(msgspec.Struct, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    # vLLM's newer name and Ollama's.
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Answer(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: object = None


_DECODER: Final = msgspec.json.Decoder(_Answer)


class Normaliser:
    """One answer of one engine. choices: how many were asked for. top_logprobs: how many alternatives per token were asked for.

    `tokens` counts as the answer grows: one per delta with content (or per log probability), or the engine's running count where it
    tells one; it never goes back. `usage` is the engine's own count once it has given it.
    """

    __slots__ = ("_choices", "_open", "_top_logprobs", "_usage", "done", "tokens")

    def __init__(self, choices: int = 1, top_logprobs: int = 0) -> None:
        self._choices = choices
        self._top_logprobs = top_logprobs
        self._open = choices
        self._usage: _Usage | None = None
        self.tokens = 0
        self.done = False

    def stream(self, events: list[bytes]) -> list[Delta]:
        """Deltas of some stream events, in order; sets `done` at [DONE]. Raises EngineFailure."""
        deltas: list[Delta] = []
        for data in events:
            if data[:1] != b"{":
                if data.strip() == b"[DONE]":
                    self.done = True
                    break
                raise broken("The engine sent something that is not an answer.")
            answer = self._decode(data)
            if answer.choices:
                for choice in answer.choices:
                    delta = self._delta(choice, choice.delta or choice.message)
                    if delta is not None:
                        deltas.append(delta)
            if answer.usage is not None:
                self._take_usage(answer.usage)
        return deltas

    def whole(self, body: bytes) -> list[Delta]:
        """Deltas of a whole answer: one per choice. Raises EngineFailure."""
        answer = self._decode(body)
        if not answer.choices:
            raise broken("The engine sent an answer without choices.")
        deltas = [self._delta(choice, choice.message or choice.delta) for choice in answer.choices]
        if answer.usage is not None:
            self._take_usage(answer.usage)
        self.done = True
        return [delta for delta in deltas if delta is not None]

    def end(self) -> None:
        """The bytes have ended. Raises EngineFailure when the answer has not: [DONE] may be missing, a finish reason may not."""
        if self._open > 0:
            raise broken("The engine ended its answer too early.")
        self.done = True

    @property
    def usage(self) -> Usage:
        """Tokens so far: the engine's count if it gave one, else ours."""
        told = self._usage
        if told is None:
            return Usage(completion_tokens=self.tokens)
        prompt, completion = told.prompt_tokens_details, told.completion_tokens_details
        return Usage(
            prompt_tokens=_count(told.prompt_tokens),
            completion_tokens=self.tokens if told.completion_tokens is None else _count(told.completion_tokens),
            cached_prompt_tokens=_count(prompt.cached_tokens) if prompt else 0,
            reasoning_tokens=_count(completion.reasoning_tokens) if completion else 0,
        )

    def _decode(self, data: bytes) -> _Answer:
        try:
            answer = _DECODER.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            # RecursionError: nesting that no engine produces. The text of the exception may quote the answer: it is dropped.
            raise broken("The engine sent something that is not an answer.") from None
        if answer.error is not None:
            raise from_stream(data)
        return answer

    def _take_usage(self, usage: _Usage) -> None:
        self._usage = usage
        if usage.completion_tokens is not None and usage.completion_tokens > self.tokens:
            self.tokens = usage.completion_tokens

    def _delta(self, choice: _Choice, message: _Message | None) -> Delta | None:
        """One choice's growth as a delta, or None when it gained nothing (the opening role chunk)."""
        index, finish = choice.index, FinishReason.NONE
        if not 0 <= index < self._choices:
            raise broken("The engine answered for a choice that was not asked for.")
        if choice.finish_reason is not None:
            finish = self._finish(choice.finish_reason)
        if message is None:
            return Delta(index, finish=finish) if finish else None
        text = message.content or ""
        if message.tool_calls or message.refusal or choice.logprobs is not None or choice.token_ids:
            return self._rich_delta(choice, message, finish)
        reasoning = message.reasoning_content or message.reasoning or ""
        if text or reasoning:
            self.tokens += 1
        elif not finish:
            return None
        return Delta(index, text, reasoning, finish=finish)

    def _rich_delta(self, choice: _Choice, message: _Message, finish: FinishReason) -> Delta | None:
        logprobs = self._logprobs(choice.logprobs)
        delta = Delta(
            choice.index,
            message.content or "",
            message.reasoning_content or message.reasoning or "",
            tool_calls=_tool_calls(message.tool_calls or ()),
            logprobs=logprobs,
            token_ids=_token_ids(choice.token_ids),
            finish=finish,
            refusal=message.refusal or "",
        )
        self.tokens += max(len(logprobs), len(delta.token_ids), 1 if delta.has_content else 0)
        return delta if delta.has_content or logprobs or delta.token_ids or finish else None

    def _finish(self, text: str) -> FinishReason:
        """The finish reason; one that we do not know ("abort", "error") means that the engine gave up."""
        reason = _FINISH.get(text)
        if reason is None:
            raise broken("The engine ended its answer for an unknown reason.")
        self._open -= 1
        return reason

    def _logprobs(self, logprobs: _Logprobs | None) -> tuple[TokenLogprob, ...]:
        if logprobs is None or not logprobs.content:
            return ()
        keep = self._top_logprobs
        out = []
        for item in logprobs.content:
            top = tuple(_logprob(entry) for entry in item.top_logprobs[:keep]) if keep and item.top_logprobs else ()
            out.append(_logprob(item, top))
        return tuple(out)


def _logprob(item: _TokenLogprob, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    value = _LEAST_LOGPROB if item.logprob is None else item.logprob
    try:
        raw = bytes(item.bytes) if item.bytes is not None else item.token.encode()
    except (ValueError, UnicodeEncodeError):
        raw = b""
    return TokenLogprob(item.token, value, raw, top)


def _tool_calls(calls: "list[_ToolCall] | tuple[()]") -> tuple[ToolCallDelta, ...]:
    out = []
    for place, call in enumerate(calls):
        # Whole answers (and Ollama's streams) carry no index: their order is the index.
        index = place if call.index is None else call.index
        if not 0 <= index < _MAX_TOOL_CALLS:
            raise broken("The engine sent a tool call out of range.")
        function = call.function or _Function()
        out.append(ToolCallDelta(index, call.id or "", function.name or "", function.arguments or ""))
    return tuple(out)


def _token_ids(ids: list[int] | None) -> tuple[int, ...]:
    if not ids:
        return ()
    if min(ids) < 0 or max(ids) > 0xFFFFFFFF:
        raise broken("The engine sent a token id out of range.")
    return tuple(ids)


def _count(value: int | None) -> int:
    """A token count of an engine, within int64's positive half."""
    return min(max(value or 0, 0), (1 << 62) - 1)
