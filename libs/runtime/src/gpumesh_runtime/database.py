"""PostgreSQL for the services that have state: a pool, transactions, numbered SQL migrations. Only the metering and
registry import it.

SQL runs on PostgreSQL 15 to 18. A service owns one schema and reads no other's.
"""

import asyncio
import hashlib
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncpg

from gpumesh_runtime.error_types import Unavailable
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.reasons import Reason

log = get_logger("gpumesh.database")
_NAME: Final = re.compile(r"(\d{4})_([a-z0-9_]+)\.sql")
_SCHEMA: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
_LOST: Final = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that got its server's last words but not yet its end
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
)
# What `connection` and `transaction` give: everything that asyncpg.Connection can do. (asyncpg's classes are generic
# in its stubs only.)
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record] | asyncpg.Connection[asyncpg.Record]"


class MigrationError(Exception):
    """Migrations are out of order, were edited after they ran, or are missing. The text says which."""


def is_lost(err: BaseException) -> bool:
    """Whether an error means that the database cannot be reached now, so that trying again later makes sense."""
    # "another operation is in progress" is two tasks on one connection: a bug of ours, not an absent server.
    return isinstance(err, _LOST) and not (isinstance(err, asyncpg.InterfaceError) and "another operation" in str(err))


class Database:
    """A pool of connections whose search path is one schema.

    dsn: postgresql://... (a unix socket as ?host=/folder). Nothing connects before it is used, so a service starts
    before its database.
    """

    def __init__(
        self, dsn: str, schema: str = "public", *, max_connections: int = 4, command_timeout_s: float = 10.0
    ) -> None:
        if not _SCHEMA.fullmatch(schema):
            raise ValueError(f"{schema!r} is not a schema name")
        self.schema = schema
        self._dsn = dsn
        self._max = max_connections
        self._command_timeout_s = command_timeout_s
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._opening = asyncio.Lock()

    async def _open(self) -> "asyncpg.Pool[asyncpg.Record]":
        if self._pool is None:
            # Under a lock, so that two first users share one pool. With min_size 0 this makes no connection yet.
            async with self._opening:
                if self._pool is None:
                    self._pool = await asyncpg.create_pool(
                        self._dsn,
                        min_size=0,
                        max_size=self._max,
                        max_inactive_connection_lifetime=300,
                        timeout=5,
                        command_timeout=self._command_timeout_s,
                        server_settings={
                            "search_path": self.schema,
                            "application_name": f"gpumesh-{self.schema}",
                            "jit": "off",  # our statements are short; compiling them costs more than running them
                        },
                    )
        return self._pool

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection of the pool. Raises Unavailable (DATABASE_UNAVAILABLE) when the server cannot be reached or
        went away.
        """
        try:
            pool = await self._open()
            async with pool.acquire(timeout=10) as connection:
                yield connection
        except (*_LOST, TimeoutError) as err:
            if not isinstance(err, TimeoutError) and not is_lost(err):
                raise
            raise Unavailable(
                Reason.DATABASE_UNAVAILABLE, "The database cannot be reached now.", retry_after_s=1, retryable=True
            ) from err

    @asynccontextmanager
    async def transaction(
        self, *, isolation: str = "read_committed", readonly: bool = False
    ) -> AsyncIterator[Connection]:
        """A connection inside a transaction: committed at the end of the block, rolled back when it raises."""
        async with self.connection() as connection, connection.transaction(isolation=isolation, readonly=readonly):  # type: ignore[arg-type]  # a Literal in the stubs
            yield connection

    async def fetch(self, query: str, *args: Any) -> "list[asyncpg.Record]":
        """All rows of one statement."""
        async with self.connection() as connection:
            return await connection.fetch(query, *args)

    async def fetchrow(self, query: str, *args: Any) -> "asyncpg.Record | None":
        """The first row of one statement."""
        async with self.connection() as connection:
            return await connection.fetchrow(query, *args)

    async def fetchval(self, query: str, *args: Any) -> Any:
        """The first value of one statement."""
        async with self.connection() as connection:
            return await connection.fetchval(query, *args)

    async def execute(self, query: str, *args: Any) -> str:
        """One statement, or several without arguments; gives the command tag."""
        async with self.connection() as connection:
            return await connection.execute(query, *args)

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Waits until the server answers, with full jitter between tries. Raises Unavailable at the end of the time."""
        end = asyncio.get_running_loop().time() + timeout_s
        backoff = 0.1
        while True:
            try:
                await self.fetchval("select 1")
            except Unavailable:
                if asyncio.get_running_loop().time() + backoff >= end:
                    raise
            else:
                return
            await asyncio.sleep(random.uniform(0.02, backoff))  # noqa: S311 -- jitter, not a secret
            backoff = min(2 * backoff, 2.0)

    async def close(self) -> None:
        """Closes the pool, within 5 s."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except TimeoutError:
                pool.terminate()


def read_migrations(source: str | Path) -> list[tuple[int, str, str]]:
    """(number, name, SQL) of the files NNNN_name.sql in a folder or package, in order. Raises MigrationError for
    gaps and doubles.
    """
    folder: Traversable = source if isinstance(source, Path) else resources.files(source)
    matches = [(match, entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    found = [(int(match[1]), match[2], entry.read_text(encoding="utf-8")) for match, entry in matches]
    found.sort()
    numbers = [number for number, _, _ in found]
    if not found or numbers != list(range(1, len(numbers) + 1)):
        raise MigrationError(f"{source}: migrations must be numbered 0001, 0002, ... without gaps; found {numbers}")
    return found


async def migrate(database: Database, schema: str, source: str | Path) -> int:
    """Brings `schema` up to date (and makes it); gives the number of migrations that ran.

    source: a folder, or a package such as "gpumesh_registry.migrations". Each runs in a transaction of its own, all under an
    advisory lock, so that replicas may start together. Migrations that a newer version applied are left alone: version N runs
    beside N+1 during an upgrade. Raises MigrationError when one was edited after it ran.
    """
    wanted = read_migrations(source)
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(f"{schema!r} is not a schema name")
    ran = 0
    async with database.connection() as connection:
        lock = int.from_bytes(hashlib.sha256(f"gpumesh migrate {schema}".encode()).digest()[:8], "big", signed=True)
        await connection.execute("select pg_advisory_lock($1)", lock, timeout=120)
        try:
            await connection.execute(f'create schema if not exists "{schema}"')
            await connection.execute(
                f'create table if not exists "{schema}".migration ('
                "number int primary key, name text not null, sha256 text not null, apply_time timestamptz not null default now())"
            )
            rows = await connection.fetch(f'select number, name, sha256 from "{schema}".migration')  # noqa: S608 -- the name was checked
            done = {row["number"]: (row["name"], row["sha256"]) for row in rows}
            for number, name, sql in wanted:
                digest = hashlib.sha256(sql.encode()).hexdigest()
                if number in done:
                    if done[number][1] != digest:
                        raise MigrationError(
                            f"{schema}: migration {number:04d}_{name} was changed after it ran; add a new one instead"
                        )
                    continue
                async with connection.transaction():
                    await connection.execute(f'set local search_path to "{schema}"')
                    await connection.execute(sql, timeout=600)
                    await connection.execute(
                        f'insert into "{schema}".migration (number, name, sha256) values ($1, $2, $3)',  # noqa: S608 -- as above
                        number,
                        name,
                        digest,
                    )
                ran += 1
                log.info("migrated", schema=schema, version=number, name=name)
        finally:
            if not connection.is_closed():
                await connection.execute("select pg_advisory_unlock($1)", lock)
    return ran
