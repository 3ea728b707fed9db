"""One answer that comes over HTTP, as server-sent events or whole."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp

from gpumesh_node.domain.deltas import Delta, Usage
from gpumesh_node.domain.failures import broken
from gpumesh_node.domain.merge import merge
from gpumesh_node.domain.normalise import Normaliser
from gpumesh_node.domain.sse import SseError, SseParser

_RELEASE_S: Final = 1.0
_MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024  # of a whole answer: 128 choices of 100,000 tokens


class HttpAnswer:
    """An answer that comes over HTTP. See base.Answer."""

    __slots__ = ("_merging", "_normaliser", "_on_end", "_parser", "_response", "seed")

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        normaliser: Normaliser,
        *,
        streamed: bool,
        merging: bool,
        seed: int | None,
        on_end: Callable[[], None],
    ) -> None:
        """on_end: called once, when the connection is free or closed."""
        self._response = response
        self._normaliser = normaliser
        self._parser = SseParser() if streamed else None
        self._merging = merging
        self.seed = seed
        self._on_end: Callable[[], None] | None = on_end

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return self._normaliser.usage

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return self._normaliser.tokens

    async def read(self) -> Sequence[Delta]:
        """What came since the last read; empty at the end."""
        if self._normaliser.done:
            return ()
        try:
            if self._parser is None:
                return await self._whole()
            if not self._merging:
                return await self._next(self._parser)
            deltas: list[Delta] = []
            while more := await self._next(self._parser):
                deltas += more
            return merge(deltas)
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            raise broken("The engine closed the connection in the middle of its answer.") from None
        except SseError:
            raise broken("The engine sent something that is not an answer.") from None

    async def release(self) -> None:
        """Reads the rest (the end of the chunked body), so that the connection can be used again."""
        response = self._response
        if not response.content.at_eof():
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, ConnectionError):
                async with asyncio.timeout(_RELEASE_S):
                    while await response.content.readany():
                        pass
        response.release()
        self._end()

    def abort(self) -> None:
        """Closes the connection: engines stop a job whose client is gone."""
        self._response.close()
        self._end()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    async def _next(self, parser: SseParser) -> list[Delta]:
        normaliser, content = self._normaliser, self._response.content
        while not normaliser.done:
            data = await content.readany()
            deltas = normaliser.stream(parser.feed(data) if data else parser.finish())
            if not data and not normaliser.done:
                normaliser.end()
            if normaliser.done:
                normaliser.end()
            if deltas:
                return deltas
        return []

    async def _whole(self) -> list[Delta]:
        body = bytearray()
        content = self._response.content
        while data := await content.readany():
            body += data
            if len(body) > _MAX_ANSWER_BYTES:
                raise broken("The engine's answer is too long.")
        deltas = self._normaliser.whole(bytes(body))
        self._normaliser.end()
        return deltas
