"""Key lookups: those that come within a few milliseconds are answered by one query."""

import asyncio
from collections.abc import Callable
from typing import Final

from gpumesh_registry.domain import keys
from gpumesh_registry.domain.keys import KeyIdentity
from gpumesh_registry.store import DirectoryReader
from gpumesh_runtime.errors import MeshError, Reason, Unavailable, as_mesh_error
from gpumesh_runtime.metrics import counter

# What a lookup ends with: an identity or an error, never both.
OnIdentity = Callable[[KeyIdentity | None, MeshError | None], None]
_MAX_BATCH: Final = 500
# Routers cache, so lookups are rare; this many waiting means that the database does not answer.
_MAX_WAITING: Final = 20_000
_QUERY_TIMEOUT_S: Final = 2.0  # below the 5 s that admission waits
_LOOKUPS: Final = counter("gpumesh_registry_key_lookups_total", "Key lookups by outcome", ("outcome",))
_FOUND: Final = _LOOKUPS.labels("found")
_QUERIES: Final = counter("gpumesh_registry_key_queries_total", "Queries that answered key lookups").cell


class KeyLookup:
    """Collects lookups and asks the store. revoked: tells whether a key was revoked since a query may have read it."""

    def __init__(self, store: DirectoryReader, window_s: float, revoked: Callable[[str], bool]) -> None:
        self._store = store
        self._window_s = window_s
        self._revoked = revoked
        self._waiting: list[tuple[str, bytes, OnIdentity]] = []
        self._in_query = 0
        self._timer: asyncio.TimerHandle | None = None
        self._queries: set[asyncio.Task[None]] = set()

    def ask(self, key_id: str, sha256: bytes, done: OnIdentity) -> None:
        """Calls `done` later, in another turn of the loop."""
        if len(self._waiting) + self._in_query >= _MAX_WAITING:
            raise Unavailable(Reason.DATABASE_UNAVAILABLE, "Too many lookups wait; try again.", retryable=True)
        self._waiting.append((key_id, sha256, done))
        if len(self._waiting) >= _MAX_BATCH:
            self._flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._window_s, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._waiting = self._waiting, []
        self._in_query += len(batch)
        _QUERIES.add()
        task = asyncio.get_running_loop().create_task(self._query(batch))
        self._queries.add(task)
        task.add_done_callback(self._queries.discard)

    async def _query(self, batch: list[tuple[str, bytes, OnIdentity]]) -> None:
        try:
            async with asyncio.timeout(_QUERY_TIMEOUT_S):
                records = await self._store.find_keys(list({key_id for key_id, _, _ in batch}))
        except Exception as err:  # noqa: BLE001, RUF100 -- whatever it was, every asker is told; as_mesh_error logs it
            self._fail(batch, err)
            return
        finally:
            self._in_query -= len(batch)
        for key_id, sha256, done in batch:
            try:
                identity = keys.identify(records.get(key_id), sha256)
                # The query may have read the key just before it was revoked, and routers may have heard of that already:
                # an answer sent after the announcement would bring the key back to life for its time in the cache.
                if self._revoked(key_id):
                    raise MeshError.of(Reason.REVOKED_API_KEY, "The API key was revoked.")
            except MeshError as err:
                _LOOKUPS.labels(err.reason.value).add()
                done(None, err)
                continue
            _FOUND.add()
            done(identity, None)

    @staticmethod
    def _fail(batch: list[tuple[str, bytes, OnIdentity]], err: Exception) -> None:
        cause = as_mesh_error(err)
        unavailable = Unavailable(
            Reason.REGISTRY_UNAVAILABLE, "The registry's database does not answer.", retryable=True
        )
        error = cause if isinstance(cause, Unavailable) else unavailable
        _LOOKUPS.labels(error.reason.value).add(len(batch))
        for _, _, done in batch:
            done(None, error)

    async def close(self) -> None:
        """Waits for the queries that run."""
        await asyncio.gather(*self._queries, return_exceptions=True)
