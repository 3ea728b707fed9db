"""Typed frames to the chunks of a streamed OpenAI answer, as server-sent events. The prefix of every chunk is made once per request.

Nodes are strangers: nothing of theirs reaches a client but text, and that inside JSON strings that we write.
Measured: 1.3 us for a frame with one text delta.
"""

from typing import Final

from gpumesh.common.v1.job_pb2 import Usage
from gpumesh.node.v1.session_pb2 import Delta, Frame
from gpumesh_dispatch.openai.pieces import FINISH, AnswerHead, encode, logprob_tokens, usage_json

DONE_EVENT: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


class StreamRenderer:
    """One streamed answer. Call `frame` for each frame in order, then `finish` once."""

    __slots__ = ("_calls", "_end", "_finished", "_head", "_open", "_prefix", "_started")

    def __init__(self, head: AnswerHead, *, usage_chunk: bool = False) -> None:
        self._head = head
        self._prefix = b"data: " + head.prefix(b"chat.completion.chunk")
        # With include_usage, OpenAI puts "usage": null into every chunk but the last.
        self._end = b'}],"usage":null}\n\n' if usage_chunk else b"}]}\n\n"
        self._open = tuple(
            b'%b,"choices":[{"index":%d,"delta":{' % (self._prefix, index) for index in range(head.choices)
        )
        self._started = [False] * head.choices
        self._finished = [False] * head.choices
        self._calls: set[tuple[int, int]] = set()

    def frame(self, frame: Frame) -> bytes:
        """Events for one frame; empty when there is nothing to show. Consecutive deltas of one choice become one chunk."""
        deltas = frame.deltas
        if len(deltas) == 1:
            return self._delta(deltas[0])
        merged: list[Delta] = []
        for delta in deltas:
            if merged and merged[-1].choice == delta.choice and not merged[-1].finish_reason:
                _append(merged[-1], delta)
            else:
                merged.append(delta)
        return b"".join([self._delta(delta) for delta in merged])

    def _delta(self, delta: Delta) -> bytes:
        choice = delta.choice
        if choice >= self._head.choices or self._finished[choice]:
            return b""
        fields = []
        if not self._started[choice]:
            self._started[choice] = True
            fields.append(b'"role":"assistant"')
            if not delta.text and not delta.tool_calls:
                fields.append(b'"content":""')
        text, reason = delta.text, delta.finish_reason
        if text:
            fields.append(b'"content":' + encode(text))
        if delta.reasoning:
            fields.append(b'"reasoning_content":' + encode(delta.reasoning))
        if delta.refusal:
            fields.append(b'"refusal":' + encode(delta.refusal))
        if delta.tool_calls:
            fields.append(self._tool_calls(choice, delta))
        if not fields and not reason:
            return b""
        logprobs = b"null"
        if self._head.logprobs and delta.logprobs:
            logprobs = b'{"content":[%b],"refusal":null}' % logprob_tokens(delta.logprobs)
        finish = b"null"
        if reason:
            self._finished[choice] = True
            finish = FINISH.get(reason, b'"stop"')
        return b'%b%b},"logprobs":%b,"finish_reason":%b%b' % (
            self._open[choice],
            b",".join(fields),
            logprobs,
            finish,
            self._end,
        )

    def _tool_calls(self, choice: int, delta: Delta) -> bytes:
        parts = []
        for call in delta.tool_calls:
            index = call.index
            if (choice, index) in self._calls:
                parts.append(b'{"index":%d,"function":{"arguments":%b}}' % (index, encode(call.arguments)))
                continue
            self._calls.add((choice, index))
            call_id = encode(call.call_id or self._head.call_id(choice, index))
            parts.append(
                b'{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}'
                % (index, call_id, encode(call.name), encode(call.arguments))
            )
        return b'"tool_calls":[%b]' % b",".join(parts)

    def finish(self, usage: Usage | None = None, cost_nano_usd: int | None = None) -> bytes:
        """The end: a last chunk for choices that never ended, the usage chunk when `usage` is given, and [DONE]."""
        parts = []
        for choice in range(self._head.choices):
            if self._finished[choice] or not (self._started[choice] or choice == 0):
                continue
            self._finished[choice] = True
            role = b"" if self._started[choice] else b'"role":"assistant","content":""'
            why = b'"tool_calls"' if any(place == choice for place, _ in self._calls) else b'"stop"'
            parts.append(b'%b%b},"logprobs":null,"finish_reason":%b%b' % (self._open[choice], role, why, self._end))
        if usage is not None:
            parts.append(b'%b,"choices":[],"usage":%b}\n\n' % (self._prefix, usage_json(usage, cost_nano_usd)))
        parts.append(DONE_EVENT)
        return b"".join(parts)


def _append(into: Delta, delta: Delta) -> None:
    """Adds a later delta of the same choice to an earlier one of the same frame."""
    into.text += delta.text
    into.reasoning += delta.reasoning
    into.refusal += delta.refusal
    into.tool_calls.extend(delta.tool_calls)
    into.logprobs.extend(delta.logprobs)
    into.finish_reason = delta.finish_reason


def error_event(body: bytes) -> bytes:
    """An error on an open stream, as OpenAI's clients expect it: an event with an error body, and no [DONE] after it."""
    return b"data: %b\n\n" % body
