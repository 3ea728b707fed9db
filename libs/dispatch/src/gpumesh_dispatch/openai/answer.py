"""Typed frames to one whole OpenAI answer."""

from dataclasses import dataclass, field
from typing import Final

from gpumesh.common.v1.job_pb2 import Usage
from gpumesh.node.v1.session_pb2 import Delta, Frame
from gpumesh_dispatch.openai.pieces import FINISH, AnswerHead, encode, logprob_tokens, usage_json
from gpumesh_runtime.errors import Reason, ResourceExhausted

# A whole answer waits in memory until it is complete; more than this no engine's context produces.
MAX_ANSWER_BYTES: Final = 32 << 20


@dataclass(slots=True)
class _Call:
    call_id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: dict[int, _Call] = field(default_factory=dict)
    logprobs: list[bytes] = field(default_factory=list)
    finish: int = 0


class WholeAnswer:
    """Collects the frames of an answer that is not streamed."""

    __slots__ = ("_bytes", "_choices", "_first", "_head")

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self._choices: dict[int, _Choice] = {}
        self._bytes = 0
        # A node sends an unstreamed answer as one frame: it is kept as it is, which saves 3 us of putting it together.
        self._first: Frame | None = None

    def frame(self, frame: Frame, size: int) -> None:
        """Adds a frame of `size` encoded bytes. Raises ResourceExhausted beyond MAX_ANSWER_BYTES."""
        self._bytes += size
        if self._bytes > MAX_ANSWER_BYTES:
            raise ResourceExhausted(
                Reason.RESOURCE_EXHAUSTED,
                f"The answer is larger than {MAX_ANSWER_BYTES} bytes. Ask for fewer tokens or stream it.",
            )
        if self._bytes == size:
            self._first = frame
            return
        if self._first is not None:
            self._add(self._first)
            self._first = None
        self._add(frame)

    def _add(self, frame: Frame) -> None:
        for delta in frame.deltas:
            if delta.choice < self._head.choices:
                self._delta(delta)

    def _delta(self, delta: Delta) -> None:
        choice = self._choices.get(delta.choice)
        if choice is None:
            choice = self._choices[delta.choice] = _Choice()
        if delta.text:
            choice.text.append(delta.text)
        if delta.reasoning:
            choice.reasoning.append(delta.reasoning)
        if delta.refusal:
            choice.refusal.append(delta.refusal)
        for piece in delta.tool_calls:
            call = choice.calls.get(piece.index)
            if call is None:
                call = choice.calls[piece.index] = _Call()
            call.call_id = call.call_id or piece.call_id
            call.name = call.name or piece.name
            if piece.arguments:
                call.arguments.append(piece.arguments)
        if self._head.logprobs and delta.logprobs:
            choice.logprobs.append(logprob_tokens(delta.logprobs))
        if delta.finish_reason:
            choice.finish = delta.finish_reason

    def render(self, usage: Usage, cost_nano_usd: int | None = None) -> bytes:
        """The answer's JSON body."""
        return b'%b,"choices":[%b],"usage":%b}' % (
            self._head.prefix(b"chat.completion"),
            self._rendered(),
            usage_json(usage, cost_nano_usd),
        )

    def _rendered(self) -> bytes:
        first = self._first
        if first is not None:
            if len(first.deltas) == 1 and _is_plain(delta := first.deltas[0]):
                return (
                    b'{"index":0,"message":{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":%b}'
                    % (encode(delta.text), FINISH.get(delta.finish_reason, b'"stop"'))
                )
            self._add(first)
        if 0 not in self._choices:
            self._choices[0] = _Choice()
        return b",".join(self._choice(index, self._choices[index]) for index in sorted(self._choices))

    def _choice(self, index: int, choice: _Choice) -> bytes:
        text = encode("".join(choice.text)) if choice.text or not (choice.calls or choice.refusal) else b"null"
        extra = b""
        if choice.reasoning:
            extra += b',"reasoning_content":' + encode("".join(choice.reasoning))
        if choice.calls:
            extra += b',"tool_calls":[%b]' % b",".join(
                self._call(index, place, choice.calls[place]) for place in sorted(choice.calls)
            )
        refusal = encode("".join(choice.refusal)) if choice.refusal else b"null"
        logprobs = b'{"content":[%b],"refusal":null}' % b",".join(choice.logprobs) if choice.logprobs else b"null"
        finish = FINISH.get(choice.finish) or (b'"tool_calls"' if choice.calls else b'"stop"')
        return (
            b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":%b%b},"logprobs":%b,"finish_reason":%b}'
            % (
                index,
                text,
                refusal,
                extra,
                logprobs,
                finish,
            )
        )

    def _call(self, choice: int, index: int, call: _Call) -> bytes:
        call_id = call.call_id or self._head.call_id(choice, index)
        return b'{"id":%b,"type":"function","function":{"name":%b,"arguments":%b}}' % (
            encode(call_id),
            encode(call.name),
            encode("".join(call.arguments)),
        )


def _is_plain(delta: Delta) -> bool:
    """Only text, of the first choice."""
    return not (delta.choice or delta.reasoning or delta.refusal or delta.tool_calls or delta.logprobs)
