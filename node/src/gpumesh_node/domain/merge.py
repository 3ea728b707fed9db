"""Many deltas as few: what a client that did not ask for a stream gets in one frame. And the reverse: one large delta as several."""

from collections.abc import Iterable

import msgspec

from gpumesh_node.domain.deltas import Delta, FinishReason, TokenLogprob, ToolCallDelta


class _Call:
    __slots__ = ("arguments", "call_id", "name")

    def __init__(self) -> None:
        self.call_id = ""
        self.name = ""
        self.arguments: list[str] = []


class _Growth:
    """All that one choice gained."""

    __slots__ = ("calls", "finish", "logprobs", "reasoning", "refusal", "text", "token_ids")

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.refusal: list[str] = []
        self.calls: dict[int, _Call] = {}
        self.logprobs: list[TokenLogprob] = []
        self.token_ids: list[int] = []
        self.finish = FinishReason.NONE

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.refusal.append(delta.refusal)
        self.logprobs += delta.logprobs
        self.token_ids += delta.token_ids
        self.finish = delta.finish or self.finish
        for piece in delta.tool_calls:
            call = self.calls.setdefault(piece.index, _Call())
            call.call_id = call.call_id or piece.call_id
            # Some engines repeat the name in every piece.
            call.name = call.name or piece.name
            call.arguments.append(piece.arguments)

    def delta(self, choice: int) -> Delta:
        calls = (
            ToolCallDelta(index, call.call_id, call.name, "".join(call.arguments))
            for index, call in sorted(self.calls.items())
        )
        return Delta(
            choice,
            "".join(self.text),
            "".join(self.reasoning),
            tool_calls=tuple(calls),
            logprobs=tuple(self.logprobs),
            token_ids=tuple(self.token_ids),
            finish=self.finish,
            refusal="".join(self.refusal),
        )


def merge(deltas: Iterable[Delta]) -> list[Delta]:
    """One delta per choice, by choice: texts and arguments joined, lists put after each other."""
    grown: dict[int, _Growth] = {}
    for delta in deltas:
        grown.setdefault(delta.choice, _Growth()).add(delta)
    return [growth.delta(choice) for choice, growth in sorted(grown.items())]


def halve(delta: Delta) -> tuple[Delta, Delta] | None:
    """One delta as two that add up to it; None when it cannot be cut further. The finish reason goes with the second."""
    for name in ("text", "reasoning", "refusal", "logprobs", "token_ids", "tool_calls"):
        value = getattr(delta, name)
        if len(value) > 1:
            return _cut(delta, name, len(value) // 2)
    if len(delta.tool_calls) == 1 and len(delta.tool_calls[0].arguments) > 1:
        call = delta.tool_calls[0]
        middle = len(call.arguments) // 2
        first = ToolCallDelta(call.index, call.call_id, call.name, call.arguments[:middle])
        second = ToolCallDelta(call.index, arguments=call.arguments[middle:])
        return (
            msgspec.structs.replace(delta, tool_calls=(first,), finish=FinishReason.NONE),
            Delta(delta.choice, tool_calls=(second,), finish=delta.finish),
        )
    return None


def _cut(delta: Delta, name: str, middle: int) -> tuple[Delta, Delta]:
    """Cuts every part in the middle, so that log probabilities stay near their text."""
    first: dict[str, object] = {}
    second: dict[str, object] = {}
    for part in ("text", "reasoning", "refusal", "logprobs", "token_ids", "tool_calls"):
        value = getattr(delta, part)
        at = middle if part == name else len(value) // 2
        first[part], second[part] = value[:at], value[at:]
    return _make(delta.choice, FinishReason.NONE, first), _make(delta.choice, delta.finish, second)


def _make(choice: int, finish: FinishReason, parts: dict[str, object]) -> Delta:
    return Delta(choice=choice, finish=finish, **parts)  # type: ignore[arg-type]  # parts come from another Delta, field by field
