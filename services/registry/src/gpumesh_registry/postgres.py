"""SQL of accounts, keys, providers, nodes and enrolment. PostgreSQL 15 to 18, schema `registry`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import asyncpg

from gpumesh_registry.domain import enrolment, owners
from gpumesh_registry.domain.keys import ApiKey
from gpumesh_registry.domain.owners import Account, Node, Provider
from gpumesh_runtime.database import Connection, Database
from gpumesh_runtime.errors import AlreadyExists, NotFound, Reason

_KEY: Final = ("key_id", "account_id", "name", "key_sha256", "create_time", "revoke_time")
_NODE: Final = ("node_id", "provider_id", "public_key_sha256", "create_time", "revoke_time")


def missing(noun: str, param: str) -> NotFound:
    """The error for a thing that does not exist. param: the field that named it."""
    return NotFound(Reason.NOT_FOUND, f"There is no such {noun}.", metadata={"param": param})


def _account(row: asyncpg.Record) -> Account:
    return Account(row["account_id"], row["name"], row["create_time"], row["suspended"], row["position"])


def _key(row: asyncpg.Record) -> ApiKey:
    return ApiKey(*(row[name] for name in _KEY))


def _node(row: asyncpg.Record) -> Node:
    return Node(*(row[name] for name in _NODE))


class PostgresAccounts:
    """store.Accounts and store.Enrolments."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- accounts, keys, providers, nodes ---------------------------------------------------------------------------

    async def create_account(self, account_id: str, name: str) -> Account:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            await sql.execute(
                "INSERT INTO registry.accounts (account_id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                account_id,
                name,
            )
            (row,) = await sql.fetch("SELECT * FROM registry.accounts WHERE account_id = $1", account_id)
        account = _account(row)
        owners.same_or_conflict(account.name, name, "account_id")
        return account

    async def list_accounts(self, limit: int, before: int | None) -> Sequence[Account]:
        """See store.Accounts."""
        async with self._database.connection() as sql:
            rows = await sql.fetch(
                "SELECT * FROM registry.accounts WHERE $2::bigint IS NULL OR position < $2 "
                "ORDER BY position DESC LIMIT $1",
                limit,
                before,
            )
        return [_account(row) for row in rows]

    async def create_key(self, key_id: str, account_id: str, name: str, sha256: bytes) -> ApiKey:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            await self._require(sql, "accounts", "account_id", account_id, "account")
            row = await sql.fetchrow(
                "INSERT INTO registry.keys (key_id, account_id, name, key_sha256) VALUES ($1, $2, $3, $4) "
                "ON CONFLICT DO NOTHING RETURNING *",
                key_id,
                account_id,
                name,
                sha256,
            )
        if row is None:
            raise AlreadyExists(
                Reason.ALREADY_EXISTS,
                "This key_id was used, and its secret cannot be shown again; make a new one.",
                metadata={"param": "key_id"},
            )
        return _key(row)

    async def list_keys(self, account_id: str) -> Sequence[ApiKey]:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            await self._require(sql, "accounts", "account_id", account_id, "account")
            rows = await sql.fetch(
                "SELECT * FROM registry.keys WHERE account_id = $1 ORDER BY create_time DESC, key_id", account_id
            )
        return [_key(row) for row in rows]

    async def revoke_key(self, key_id: str) -> ApiKey:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            row = await sql.fetchrow(
                "UPDATE registry.keys SET revoke_time = coalesce(revoke_time, now()) WHERE key_id = $1 RETURNING *",
                key_id,
            )
        if row is None:
            raise missing("key", "key_id")
        return _key(row)

    async def create_provider(self, provider_id: str, name: str) -> Provider:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            await sql.execute(
                "INSERT INTO registry.providers (provider_id, name) VALUES ($1, $2) ON CONFLICT DO NOTHING",
                provider_id,
                name,
            )
            (row,) = await sql.fetch("SELECT * FROM registry.providers WHERE provider_id = $1", provider_id)
        provider = Provider(row["provider_id"], row["name"], row["create_time"])
        owners.same_or_conflict(provider.name, name, "provider_id")
        return provider

    async def create_enrolment_token(self, provider_id: str, sha256: bytes, expire_time: datetime) -> None:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            await self._require(sql, "providers", "provider_id", provider_id, "provider")
            await sql.execute(
                "INSERT INTO registry.enrolment_tokens (token_sha256, provider_id, expire_time) VALUES ($1, $2, $3)",
                sha256,
                provider_id,
                expire_time,
            )

    async def revoke_node(self, node_id: str) -> Node:
        """See store.Accounts."""
        async with self._database.transaction() as sql:
            row = await sql.fetchrow(
                "UPDATE registry.nodes SET revoke_time = coalesce(revoke_time, now()) WHERE node_id = $1 RETURNING *",
                node_id,
            )
        if row is None:
            raise missing("node", "node_id")
        return _node(row)

    @staticmethod
    async def _require(sql: Connection, table: str, column: str, value: str, noun: str) -> None:
        # Table and column are ours, never a caller's. FOR SHARE is not needed: nothing is ever deleted from these tables.
        if await sql.fetchval(f"SELECT 1 FROM registry.{table} WHERE {column} = $1", value) is None:  # noqa: S608 -- see above
            raise missing(noun, column)

    # --- enrolment --------------------------------------------------------------------------------------------------

    async def enrol_node(self, token_sha256: bytes, public_key_sha256: bytes, new_node_id: str, now: datetime) -> Node:
        """See store.Enrolments."""
        async with self._database.transaction() as sql:
            token = await sql.fetchrow(
                "SELECT provider_id, expire_time, node_id FROM registry.enrolment_tokens WHERE token_sha256 = $1 "
                "FOR UPDATE",
                token_sha256,
            )
            record = None
            if token is not None:
                used_by = await self._select_node(sql, token["node_id"]) if token["node_id"] else None
                record = enrolment.TokenRecord(token["provider_id"], token["expire_time"], used_by)
            node = enrolment.use_token(record, public_key_sha256, now)
            if node is not None:
                return node
            if record is None:  # use_token raised already
                raise enrolment.token_refused()
            (row,) = await sql.fetch(
                "INSERT INTO registry.nodes (node_id, provider_id, public_key_sha256) VALUES ($1, $2, $3) RETURNING *",
                new_node_id,
                record.provider_id,
                public_key_sha256,
            )
            await sql.execute(
                "UPDATE registry.enrolment_tokens SET node_id = $2 WHERE token_sha256 = $1", token_sha256, new_node_id
            )
            return _node(row)

    async def get_node(self, node_id: str) -> Node | None:
        """See store.Enrolments."""
        async with self._database.connection() as sql:
            return await self._select_node(sql, node_id)

    async def node_renewed(self, node_id: str, now: datetime) -> None:
        """See store.Enrolments."""
        async with self._database.transaction() as sql:
            await sql.execute("UPDATE registry.nodes SET renew_time = $2 WHERE node_id = $1", node_id, now)

    @staticmethod
    async def _select_node(sql: Connection, node_id: str) -> Node | None:
        row = await sql.fetchrow("SELECT * FROM registry.nodes WHERE node_id = $1", node_id)
        return None if row is None else _node(row)
