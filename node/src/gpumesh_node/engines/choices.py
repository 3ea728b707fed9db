"""Several choices from an engine that makes one, or that counts only one: one request for each, read as one answer."""

import asyncio
from collections.abc import Sequence

import msgspec

from gpumesh_node.domain.deltas import Delta, Usage
from gpumesh_node.engines.base import Answer


class SplitAnswer:
    """Answers of one choice each, as one answer of many. See base.Answer."""

    def __init__(self, parts: Sequence[Answer], seed: int | None, *, whole: bool) -> None:
        """seed: of the first part. whole: all of it comes in one read."""
        self._parts = list(parts)
        self._reads: dict[asyncio.Task[Sequence[Delta]], int] = {}
        self._open = set(range(len(self._parts)))
        self._whole = whole
        self.seed = seed

    @property
    def usage(self) -> Usage:
        """The prompt counts once, what was generated adds up."""
        usages = [part.usage for part in self._parts]
        return Usage(
            prompt_tokens=max(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_prompt_tokens=min(usage.cached_prompt_tokens for usage in usages),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        )

    @property
    def tokens(self) -> int:
        """Over all choices."""
        return sum(part.tokens for part in self._parts)

    async def read(self) -> Sequence[Delta]:
        """What any of them produced; with `whole` what all of them did. Empty when all have ended."""
        out: list[Delta] = []
        while self._open and (self._whole or not out):
            for choice in self._open - set(self._reads.values()):
                task = asyncio.ensure_future(self._parts[choice].read())
                self._reads[task] = choice
            try:
                done, _ = await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                self.abort()
                raise
            for task in done:
                choice = self._reads.pop(task)
                deltas = task.result()
                if not deltas:
                    self._open.discard(choice)
                out += [msgspec.structs.replace(delta, choice=choice) for delta in deltas]
        if self._whole:
            out.sort(key=lambda delta: delta.choice)
        return out

    async def release(self) -> None:
        """Releases all parts."""
        await asyncio.gather(*(part.release() for part in self._parts))

    def abort(self) -> None:
        """Stops all parts."""
        for task in self._reads:
            task.cancel()
        self._reads.clear()
        self._open.clear()
        for part in self._parts:
            part.abort()
