"""LedgerStore over PostgreSQL: what operators and routers ask, and transfers of every kind."""

import uuid
from collections.abc import Sequence
from typing import Any, Final

import asyncpg

from gpumesh_metering.checks import check
from gpumesh_metering.domain.accounts import BUYER_AVAILABLE, EXTERNAL_OPERATOR, Account
from gpumesh_metering.domain.ledger import INT64_MAX, Transfer, TransferKind
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.domain.transfer_ids import CREDIT
from gpumesh_metering.postgres_settle import translate
from gpumesh_metering.store import BuyerBalance, CheckResult, StoreRefusedError, UsageRow, UsageSegment
from gpumesh_runtime.database import Connection, Database
from gpumesh_runtime.errors import AlreadyExists, Reason

_OWNER: Final = "operator"  # owner of external:operator
_BALANCES: Final = """
SELECT owner_id, posted_nano_usd - reserved_nano_usd, version FROM metering.balances
WHERE account = 'buyer:available' AND owner_id = ANY($1::text[])
"""
_INSERT_TRANSFERS: Final = """
INSERT INTO metering.transfers (transfer_id, kind, pending_id, debit_account, debit_owner, credit_account, credit_owner,
    amount_nano_usd, purpose, job_id)
SELECT * FROM unnest($1::uuid[], $2::smallint[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[],
$8::bigint[],
    $9::text[], $10::bytea[])
ON CONFLICT (transfer_id) DO NOTHING RETURNING transfer_id
"""
_SAME_TRANSFERS: Final = """
SELECT transfer_id, kind, pending_id, debit_account, debit_owner, credit_account, credit_owner, amount_nano_usd,
purpose, job_id FROM metering.transfers WHERE transfer_id = ANY($1::uuid[])
"""
_LOCK_BALANCES: Final = """
SELECT account, owner_id FROM metering.balances WHERE (account, owner_id) IN (SELECT * FROM unnest($1::text[],
$2::text[])) ORDER BY account, owner_id FOR UPDATE
"""
_OPEN_BALANCES: Final = """
INSERT INTO metering.balances (account, owner_id, version)
SELECT *, 0 FROM unnest($1::text[], $2::text[]) AS t(account, owner_id) ORDER BY 1, 2 ON CONFLICT DO NOTHING
"""
_MOVE: Final = """
UPDATE metering.balances AS b SET posted_nano_usd = posted_nano_usd + d.posted, reserved_nano_usd = reserved_nano_usd +
d.reserved,
    version = version + 1
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[]) AS d(account, owner_id, posted, reserved)
WHERE b.account = d.account AND b.owner_id = d.owner_id
"""
_INSERT_CREDIT: Final = """
INSERT INTO metering.credits (credit_id, account_id, amount_nano_usd, memo, operator, transfer_id)
VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (credit_id) DO NOTHING RETURNING 1
"""
_PRICES: Final = """
SELECT DISTINCT ON (model_id) model_id, version, input_nano_usd_per_mtok, output_nano_usd_per_mtok,
cached_input_nano_usd_per_mtok FROM metering.prices ORDER BY model_id, version DESC
"""
_SET_PRICE: Final = """
INSERT INTO metering.prices (model_id, version, input_nano_usd_per_mtok, output_nano_usd_per_mtok, operator)
VALUES ($1, $2, $3, $4, $5)
"""
_USAGE: Final = """
SELECT settlement_no, job_id, account_id, key_id, model_id, outcome, prompt_tokens, completion_tokens,
cached_prompt_tokens,
    reasoning_tokens, price_version, input_nano_usd_per_mtok, output_nano_usd_per_mtok, cached_input_nano_usd_per_mtok,
    charge_nano_usd, fee_nano_usd, settle_time
FROM metering.settlements
WHERE ($1 = '' OR account_id = $1) AND ($2::bytea IS NULL OR job_id = $2) AND settlement_no < $3
ORDER BY settlement_no DESC LIMIT $4
"""
_USAGE_SEGMENTS: Final = """
SELECT job_id, fence, provider_id, node_id, end_token - start_token, pay_nano_usd FROM metering.segments
WHERE job_id = ANY($1::bytea[]) ORDER BY job_id, start_token, end_token
"""


class PostgresLedgerStore:
    """LedgerStore over a pool."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def balances(self, account_ids: Sequence[str]) -> list[BuyerBalance]:
        """As LedgerStore."""
        rows = await self._fetch(_BALANCES, list(account_ids))
        found = {row[0]: BuyerBalance(row[0], row[1], row[2]) for row in rows}
        return [found.get(account_id) or BuyerBalance(account_id, 0, 0) for account_id in account_ids]

    async def owner_balances(self, owner_id: str) -> dict[str, int]:
        """As LedgerStore."""
        query = "SELECT account, posted_nano_usd - reserved_nano_usd FROM metering.balances WHERE owner_id = $1 ORDER BY account"
        return {row[0]: row[1] for row in await self._fetch(query, owner_id)}

    async def apply(self, transfers: Sequence[Transfer]) -> None:
        """As LedgerStore."""
        try:
            async with self._database.transaction() as connection:
                await append(connection, transfers)
        except (asyncpg.PostgresError, ValueError) as err:
            raise translate(err) from err

    async def credit(self, credit_id: str, account_id: str, amount: int, memo: str, operator: str) -> BuyerBalance:
        """As LedgerStore."""
        transfer = Transfer(
            CREDIT.id(credit_id.encode()),
            TransferKind.DIRECT,
            Account(EXTERNAL_OPERATOR, _OWNER),
            Account(BUYER_AVAILABLE, account_id),
            amount,
            "credit",
        )
        try:
            async with self._database.transaction() as connection:
                new = await connection.fetchval(
                    _INSERT_CREDIT, credit_id, account_id, amount, memo, operator, transfer.id
                )
                if new is None:
                    query = "SELECT account_id, amount_nano_usd, memo FROM metering.credits WHERE credit_id = $1"
                    known = await connection.fetchrow(query, credit_id)
                    if known is None or tuple(known) != (account_id, amount, memo):
                        raise AlreadyExists(
                            Reason.ALREADY_EXISTS,
                            "This credit id was used before, with another account, amount or memo.",
                        )
                else:
                    await append(connection, [transfer])
                row = await connection.fetchrow(_BALANCES, [account_id])
        except (asyncpg.PostgresError, ValueError) as err:
            raise translate(err) from err
        return BuyerBalance(*row) if row is not None else BuyerBalance(account_id, 0, 0)

    async def prices(self) -> dict[str, Price]:
        """As LedgerStore."""
        return {row[0]: Price(row[1], row[2], row[3], row[4]) for row in await self._fetch(_PRICES)}

    async def set_price(self, model_id: str, input_price: int, output_price: int, operator: str) -> Price:
        """As LedgerStore."""
        try:
            async with self._database.transaction() as connection:
                # One price change at a time: versions have no gaps, and the same price twice is one version.
                await connection.execute("SELECT pg_advisory_xact_lock(hashtext('gpumesh metering prices'))")
                query = f"SELECT * FROM ({_PRICES}) AS current WHERE model_id = $1"  # noqa: S608 -- a constant above
                row = await connection.fetchrow(query, model_id)
                if row is not None and tuple(row)[2:] == (input_price, output_price, None):
                    return Price(row[1], input_price, output_price)
                version = (row[1] if row is not None else 0) + 1
                await connection.execute(_SET_PRICE, model_id, version, input_price, output_price, operator)
        except (asyncpg.PostgresError, ValueError) as err:
            raise translate(err) from err
        return Price(version, input_price, output_price)

    async def usage(self, account_id: str, job_id: bytes, before: int | None, limit: int) -> list[UsageRow]:
        """As LedgerStore."""
        rows = await self._fetch(_USAGE, account_id, job_id or None, INT64_MAX if before is None else before, limit)
        segments: dict[bytes, list[UsageSegment]] = {}
        for part in await self._fetch(_USAGE_SEGMENTS, [row[1] for row in rows]) if rows else ():
            segments.setdefault(part[0], []).append(UsageSegment(*tuple(part)[1:]))
        return [_usage_row(tuple(row), segments.get(row[1], ())) for row in rows]

    async def check(self) -> CheckResult:
        """As LedgerStore."""
        try:
            return await check(self._database)
        except asyncpg.PostgresError as err:
            raise translate(err) from err

    async def _fetch(self, query: str, *args: Any) -> list[Any]:
        try:
            return await self._database.fetch(query, *args)
        except (asyncpg.PostgresError, ValueError) as err:
            raise translate(err) from err


def _usage_row(row: tuple[Any, ...], segments: Sequence[UsageSegment]) -> UsageRow:
    """A row of _USAGE: ten columns as they are, four of the price, three more."""
    return UsageRow._make((*row[:10], Price(*row[10:14]), *row[14:17], segments))


async def append(connection: Connection, transfers: Sequence[Transfer]) -> None:
    """Appends transfers and moves their balances, inside a transaction. Raises StoreRefusedError."""
    new = await _insert(connection, transfers)
    if not new:
        return
    deltas = await _deltas(connection, new)
    accounts = sorted(deltas)
    names, owners = [account.name for account in accounts], [account.owner for account in accounts]
    await connection.execute(_OPEN_BALANCES, names, owners)
    await connection.fetch(_LOCK_BALANCES, names, owners)  # in the settle statement's order
    posted, reserved = [deltas[account][0] for account in accounts], [deltas[account][1] for account in accounts]
    await connection.execute(_MOVE, names, owners, posted, reserved)


async def _insert(connection: Connection, transfers: Sequence[Transfer]) -> list[Transfer]:
    """Inserts the transfers that are new; gives them. Raises StoreRefusedError when one exists with other fields."""
    rows = [(t.id, int(t.kind), t.pending_id, *t.debit, *t.credit, t.amount, t.purpose, t.job_id) for t in transfers]
    done = await connection.fetch(_INSERT_TRANSFERS, *map(list, zip(*rows, strict=True)))
    inserted = {row[0] for row in done}
    if len(inserted) < len(transfers):
        known = {row[0]: tuple(row) for row in await connection.fetch(_SAME_TRANSFERS, [row[0] for row in rows])}
        for row in rows:
            if known[row[0]] != row:
                raise StoreRefusedError(f"transfer {row[0]} exists with other fields")
    seen: set[uuid.UUID] = set()
    return [t for t in transfers if t.id in inserted and not (t.id in seen or seen.add(t.id))]  # type: ignore[func-returns-value]  # add gives None


async def _deltas(connection: Connection, transfers: Sequence[Transfer]) -> dict[Account, tuple[int, int]]:
    """(posted, reserved) by which each account changes, nano-USD."""
    resolved = [t.pending_id for t in transfers if t.pending_id is not None]
    query = "SELECT transfer_id, amount_nano_usd FROM metering.transfers WHERE transfer_id = ANY($1::uuid[])"
    pending = {row[0]: row[1] for row in await connection.fetch(query, resolved)} if resolved else {}
    deltas: dict[Account, tuple[int, int]] = {}
    for t in transfers:
        moved = 0 if t.kind is TransferKind.PENDING else t.amount
        reserve = t.amount if t.kind is TransferKind.PENDING else -pending.get(t.pending_id, 0)
        posted, reserved = deltas.get(t.debit, (0, 0))
        deltas[t.debit] = (posted - moved, reserved + reserve)
        posted, reserved = deltas.get(t.credit, (0, 0))
        deltas[t.credit] = (posted + moved, reserved)
    return deltas
