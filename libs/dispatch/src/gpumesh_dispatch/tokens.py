"""Counting prompts with the catalogue's tokenizers, off the event loop. Tokenizers are fetched from a router once and kept."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from gpumesh_runtime.errors import MeshError
from gpumesh_runtime.logs import get_logger

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = get_logger("gpumesh.dispatch.tokens")
_KEPT: Final = 8
# Prompts that may wait for the one counting thread; beyond it nobody counts and the engine decides.
_MAX_WAITING: Final = 16
# Text beyond this is not counted in full: what was counted is scaled up (1 MiB takes about 0.3 s).
_MAX_COUNTED_BYTES: Final = 1 << 20
_FETCH_AGAIN_S: Final = 30.0

Fetch = Callable[[str], Awaitable[bytes]]


class TokenCounter:
    """Counts with tokenizers named by the SHA-256 of their tokenizer.json. `fetch` gets one; it may raise MeshError."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._kept: OrderedDict[str, Tokenizer] = OrderedDict()
        self._failed_at: dict[str, float] = {}
        self._lock = asyncio.Lock()
        self._waiting = 0
        # One thread: counting is rare, and a burst of huge prompts must not take the machine.
        self._pool = ThreadPoolExecutor(1, "count-tokens")

    async def count(self, sha256: str, texts: Sequence[str]) -> int | None:
        """Tokens of the texts; None when nobody can count now (no tokenizer, or too many prompts wait)."""
        if not sha256 or self._waiting >= _MAX_WAITING:
            return None
        self._waiting += 1
        try:
            tokenizer = await self._tokenizer(sha256)
            if tokenizer is None:
                return None
            return await asyncio.get_running_loop().run_in_executor(self._pool, _count, tokenizer, texts)
        finally:
            self._waiting -= 1

    async def _tokenizer(self, sha256: str) -> "Tokenizer | None":
        loop = asyncio.get_running_loop()
        async with self._lock:
            if sha256 in self._kept:
                self._kept.move_to_end(sha256)
                return self._kept[sha256]
            if loop.time() - self._failed_at.get(sha256, -_FETCH_AGAIN_S) < _FETCH_AGAIN_S:
                return None
            try:
                body = await self._fetch(sha256)
                if hashlib.sha256(body).hexdigest() != sha256:
                    raise ValueError("another file than its name says")
                tokenizer = await loop.run_in_executor(self._pool, _load, body)
            except (MeshError, ValueError) as err:
                self._failed_at[sha256] = loop.time()
                log.warning("tokenizer not usable", error_type=type(err).__name__)
                return None
            self._kept[sha256] = tokenizer
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return tokenizer

    def close(self) -> None:
        """Ends the thread; a count that runs is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _load(body: bytes) -> "Tokenizer":
    # Imported here: 3 MB that an edge does not need until a prompt comes near its model's context.
    from tokenizers import Tokenizer  # noqa: PLC0415 -- see above

    return Tokenizer.from_buffer(body)


def _count(tokenizer: "Tokenizer", texts: Sequence[str]) -> int:
    total, seen, left = 0, 0, 0
    for text in texts:
        if seen >= _MAX_COUNTED_BYTES:
            left += len(text)
            continue
        piece = text[: _MAX_COUNTED_BYTES - seen]
        total += len(tokenizer.encode(piece, add_special_tokens=False).ids)
        seen += len(piece)
        left += len(text) - len(piece)
    return total + (total * left // seen if seen and left else 0)
