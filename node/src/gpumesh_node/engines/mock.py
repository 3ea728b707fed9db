"""mock-model: not a model. A deterministic engine with scripted faults, for development and tests; see domain/mock_script.py."""

import asyncio
from collections.abc import Sequence

import msgspec

from gpumesh_node.domain.deltas import Delta, FinishReason, ToolCallDelta, Usage
from gpumesh_node.domain.failures import EngineFailure, broken
from gpumesh_node.domain.merge import merge
from gpumesh_node.domain.mock_script import Prompt, Script, ScriptError, read_prompt, read_script, words
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_node.domain.request import EngineBody, EngineRequest
from gpumesh_node.engines.base import Answer, OnChange
from gpumesh_runtime.reasons import Reason

_CONTEXT_TOKENS = 4096
# Steps of one read: what waits beyond it stays with the engine, as behind a real engine's socket.
_MOST_STEPS = 64


def _nothing() -> None:
    """Nobody listens yet."""


class MockEngine:
    """Serves one model by script. See base.Engine."""

    def __init__(self, name: str, model: ServedModel, script: Script) -> None:
        self.name = name
        self.on_change: OnChange = _nothing
        self._model = model.with_state(ModelState.READY)
        self._script = script

    def models(self) -> Sequence[ServedModel]:
        """Its one model, always ready."""
        return (self._model,)

    async def run(self) -> None:
        """There is nothing to keep well."""
        await asyncio.Event().wait()

    async def generate(self, request: EngineRequest) -> Answer:
        """Begins one answer. Raises EngineFailure."""
        body = EngineBody(request.payload)
        try:
            prompt = read_prompt(request.payload)
            script = read_script(prompt.text, self._script)
        except (msgspec.MsgspecError, ScriptError):
            # Without a quote: even a misspelt directive is part of a prompt.
            message = "mock-model cannot read the messages, or knows no such directive."
            raise EngineFailure(Reason.ENGINE_REJECTED, message, retryable=False) from None
        if script.error:
            raise _failure(script.error, prompt)
        answer = MockAnswer(script, prompt, body.choices, body.cap(request.max_output_tokens))
        if request.streaming:
            return answer
        return _WholeAnswer(answer)


class MockAnswer:
    """Words at the script's pace. Token k of every choice is due delay_s + k / tps after the start. See base.Answer."""

    def __init__(self, script: Script, prompt: Prompt, choices: int, cap: int) -> None:
        self.seed = prompt.seed if prompt.seed is not None else script.seed
        self._script = script
        self._prompt = prompt
        self._choices = [words(script, prompt, choice) for choice in range(choices)]
        self._cap = cap
        self._steps = 1 if script.tool else min(cap, max(len(choice) for choice in self._choices))
        self._at = 0
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()

    @property
    def tokens(self) -> int:
        """Over all choices."""
        return sum(min(self._at, len(choice)) for choice in self._choices)

    @property
    def usage(self) -> Usage:
        """Words of the prompt, tokens of all choices."""
        reasoning = min(self._at, self._script.reasoning) * len(self._choices)
        return Usage(self._prompt.tokens, self.tokens, reasoning_tokens=reasoning)

    async def read(self) -> Sequence[Delta]:
        """Tokens that are due, after waiting for the next."""
        if self._ended:
            return ()
        await self._fault()
        wait = self._due(self._at) - self._loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        out: list[Delta] = []
        most = min(self._steps, self._at + _MOST_STEPS)
        while self._at < most and self._due(self._at) <= self._loop.time() + 1e-4 and not self._fault_is_due():
            out += self._step(self._at)
            self._at += 1
        if self._at >= self._steps and not self._fault_is_due():
            self._ended = True
            out += [Delta(choice, finish=self._finish(choice)) for choice in range(len(self._choices))]
        return out or await self.read()

    async def release(self) -> None:
        """There is no connection."""

    def abort(self) -> None:
        """There is no connection; whoever waits in read() is cancelled with its task."""
        self._ended = True

    def _due(self, step: int) -> float:
        pace = step / self._script.tps if self._script.tps > 0 else 0.0
        return self._began + self._script.delay_s + pace

    def _step(self, step: int) -> list[Delta]:
        if self._script.tool:
            call = ToolCallDelta(0, f"call_{self.seed}", self._script.tool, "{}")
            return [Delta(choice, tool_calls=(call,)) for choice in range(len(self._choices))]
        reasoning = step < self._script.reasoning
        return [
            Delta(number, "" if reasoning else choice[step], choice[step] if reasoning else "")
            for number, choice in enumerate(self._choices)
            if step < len(choice)
        ]

    def _finish(self, choice: int) -> FinishReason:
        if self._script.tool:
            return FinishReason.TOOL_CALLS
        return FinishReason.LENGTH if len(self._choices[choice]) > self._cap else FinishReason.STOP

    def _fault_is_due(self) -> bool:
        script = self._script
        return self._at in (script.die_after, script.stall_after, script.garbage_after)

    async def _fault(self) -> None:
        script = self._script
        if self._at == script.die_after:
            raise broken("The engine closed the connection in the middle of its answer.")
        if self._at == script.garbage_after:
            raise broken("The engine sent something that is not an answer.")
        if self._at == script.stall_after:
            await asyncio.Event().wait()


class _WholeAnswer:
    """The same answer in one read, for clients that did not ask for a stream."""

    def __init__(self, inner: MockAnswer) -> None:
        self._inner = inner
        self.seed = inner.seed

    @property
    def usage(self) -> Usage:
        """As the answer's."""
        return self._inner.usage

    @property
    def tokens(self) -> int:
        """As the answer's."""
        return self._inner.tokens

    async def read(self) -> Sequence[Delta]:
        """All of it."""
        deltas: list[Delta] = []
        while more := await self._inner.read():
            deltas += more
        return merge(deltas) if deltas else ()

    async def release(self) -> None:
        """There is no connection."""

    def abort(self) -> None:
        """As the answer's."""
        self._inner.abort()


def _failure(error: str, prompt: Prompt) -> EngineFailure:
    if error == "context":
        metadata = {"limit": str(_CONTEXT_TOKENS), "used": str(prompt.tokens + _CONTEXT_TOKENS)}
        message = "The prompt and the asked output do not fit the model's context."
        return EngineFailure(Reason.CONTEXT_LENGTH_EXCEEDED, message, retryable=False, metadata=metadata)
    if error == "rejected":
        return EngineFailure(Reason.ENGINE_REJECTED, "The engine refused the request (HTTP 400).", retryable=False)
    return broken("The engine failed (HTTP 500).")
