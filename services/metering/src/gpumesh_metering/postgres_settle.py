"""The writer's side of PostgreSQL: one connection of its own, one statement per batch.

Not the pool: a pool resets a connection after each use, a round trip per batch, and drops prepared statements with it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import asyncpg
import msgspec

from gpumesh_metering import settle_sql
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.store import (
    BuyerBalance,
    Evidence,
    SettleBatch,
    SettleResult,
    StoredSettlement,
    StoreRefusedError,
)
from gpumesh_runtime.errors import Reason, Unavailable

_CONNECT_S: Final = 5.0
_COMMAND_S: Final = 30.0  # a batch of 200 takes 15 ms; a disk that stalls for longer than this is a broken one
# SQLSTATE classes that judge the content: 22 data exception, 23 integrity constraint violation. Everything else is
# about the server or the schema, and says nothing about a job: it must never cost one.
_CONTENT: Final = ("22", "23")
_encode: Final = msgspec.json.Encoder().encode
T = TypeVar("T")

_STORED: Final = """
SELECT s.job_id, charge_nano_usd, fee_nano_usd, price_version, input_nano_usd_per_mtok, output_nano_usd_per_mtok,
    cached_input_nano_usd_per_mtok, g.fences, g.pays
FROM metering.settlements AS s LEFT JOIN LATERAL (
    SELECT array_agg(fence ORDER BY start_token, end_token) AS fences, array_agg(pay_nano_usd ORDER BY start_token,
    end_token) AS pays FROM metering.segments WHERE segments.job_id = s.job_id) AS g ON true
WHERE s.job_id = ANY($1::bytea[])
"""
_PARK: Final = """
INSERT INTO metering.parked_receipts (job_id, fence, evidence)
SELECT * FROM unnest($1::bytea[], $2::bigint[], $3::bytea[]) AS t(job_id, fence, evidence)
WHERE NOT EXISTS (SELECT FROM metering.suspense AS s WHERE s.job_id = t.job_id AND s.fence = t.fence)
ON CONFLICT DO NOTHING
"""
_SUSPEND: Final = """
INSERT INTO metering.suspense (job_id, fence, evidence, why)
SELECT *, $4::text FROM unnest($1::bytea[], $2::bigint[], $3::bytea[]) ON CONFLICT DO NOTHING
"""
# Both metering processes of a rolling upgrade may sweep: SKIP LOCKED keeps them apart.
_SWEEP: Final = """
WITH old AS (
    SELECT job_id, fence FROM metering.parked_receipts WHERE park_time < now() - make_interval(secs => $1)
    ORDER BY park_time LIMIT 1000 FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM metering.parked_receipts AS p USING old WHERE p.job_id = old.job_id AND p.fence = old.fence RETURNING
    p.*
), kept AS (
    INSERT INTO metering.suspense (job_id, fence, why, evidence)
    SELECT job_id, fence, 'receipt without a delivered record', evidence FROM gone
    WHERE NOT EXISTS (SELECT FROM metering.settlements AS s WHERE s.job_id = gone.job_id)
    ON CONFLICT DO NOTHING RETURNING 1
)
SELECT count(*) FROM kept
"""


def unavailable(err: BaseException) -> Unavailable:
    """An error of the connection or server as ours."""
    error = Unavailable(
        Reason.DATABASE_UNAVAILABLE, "The database cannot be reached now.", retry_after_s=1, retryable=True
    )
    error.__cause__ = err
    return error


def translate(err: Exception) -> Exception:
    """What a failed statement means: StoreRefusedError for its content, Unavailable for everything else."""
    if isinstance(err, asyncpg.PostgresError):
        state = getattr(err, "sqlstate", None) or ""
        return StoreRefusedError(f"{state} {type(err).__name__}") if state.startswith(_CONTENT) else unavailable(err)
    # asyncpg could not encode an argument. Its DataError is also an InterfaceError, of which the others are about the
    # connection.
    if isinstance(err, ValueError | OverflowError | TypeError):
        return StoreRefusedError(type(err).__name__)
    return unavailable(err)


def _literal(values: Sequence[int | None]) -> str:
    """A bigint[] literal. JSON of a list of integers and nulls differs from it by the brackets alone."""
    return "{" + _encode(values)[1:-1].decode() + "}"


def _columns(rows: Sequence[tuple[int, ...]], count: int) -> Iterable[Sequence[int]]:
    return zip(*rows, strict=True) if rows else ((),) * count


def parameters(batch: SettleBatch) -> list[Any]:
    """The parameters of settle_sql.SETTLE, in its order."""
    terms = list(zip(*batch.terms, strict=True)) or [()] * 12
    makers = list(zip(*batch.makers, strict=True)) or [()] * 5
    return [
        *terms[:5],
        *map(_literal, terms[5:]),
        *map(_literal, _columns(batch.jobs, 8)),
        b"".join(batch.job_ids),
        b"".join(batch.charge_ids),
        b"".join(batch.shortfall_ids),
        *makers,
        *map(_literal, _columns(batch.segments, 6)),
        b"".join(batch.pay_ids),
        *map(_literal, _columns(batch.counts, 6)),
    ]


class PostgresSettleStore:
    """SettleStore over one connection, opened when it is needed and again when it broke. Calls queue up behind each
    other.
    """

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._one_at_a_time = asyncio.Lock()

    async def close(self) -> None:
        """Closes the connection, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()

    async def settle(self, batch: SettleBatch) -> SettleResult:
        """As SettleStore."""
        row = await self._run(lambda connection: connection.fetchrow(settle_sql.SETTLE, *parameters(batch)))
        owners = row["owners"] or ()
        balances = [
            BuyerBalance(*fields) for fields in zip(owners, row["available"] or (), row["versions"] or (), strict=True)
        ]
        return SettleResult(row["repeated"] or (), balances)

    async def stored(self, job_ids: Sequence[bytes]) -> dict[bytes, StoredSettlement]:
        """As SettleStore."""
        rows = await self._run(lambda connection: connection.fetch(_STORED, job_ids))
        return {
            row[0]: StoredSettlement(
                Price(row[3], row[4], row[5], row[6]),
                row[1],
                row[2],
                list(zip(row[7] or (), row[8] or (), strict=True)),
            )
            for row in rows
        }

    async def park(self, receipts: Sequence[Evidence]) -> None:
        """As SettleStore."""
        columns = list(map(list, zip(*receipts, strict=True)))
        await self._run(lambda connection: connection.execute(_PARK, *columns))

    async def suspend(self, records: Sequence[Evidence], why: str) -> None:
        """As SettleStore."""
        columns = list(map(list, zip(*records, strict=True)))
        await self._run(lambda connection: connection.execute(_SUSPEND, *columns, why))

    async def sweep_parked(self, older_than_s: float) -> int:
        """As SettleStore."""
        return int(await self._run(lambda connection: connection.fetchval(_SWEEP, older_than_s)))

    async def _run(self, statement: "Callable[[asyncpg.Connection[asyncpg.Record]], Awaitable[T]]") -> Any:
        """Runs a statement; it is its own transaction. Raises Unavailable or StoreRefusedError."""
        async with self._one_at_a_time:
            connection = await self._open()
            try:
                return await statement(connection)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as err:
                meaning = translate(err)
                if isinstance(meaning, Unavailable):
                    await self.close()  # what state it is in is not known; a new one costs 5 ms
                raise meaning from err

    async def _open(self) -> "asyncpg.Connection[asyncpg.Record]":
        if self._connection is None or self._connection.is_closed():
            try:
                self._connection = await asyncpg.connect(
                    self._dsn,
                    timeout=_CONNECT_S,
                    command_timeout=_COMMAND_S,
                    server_settings={"application_name": "gpumesh-metering-writer", "jit": "off"},
                )
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as err:
                raise unavailable(err) from err
        return self._connection
