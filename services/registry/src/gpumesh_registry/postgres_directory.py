"""SQL of the model catalogue and the directory. PostgreSQL 15 to 18, schema `registry`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

import asyncpg

from gpumesh_registry.domain import catalogue
from gpumesh_registry.domain.catalogue import ModelEntry
from gpumesh_registry.domain.checks import invalid
from gpumesh_registry.domain.directory import REVOKED_KEYS_FOR, REVOKED_NODES_FOR, DirectoryState, Part
from gpumesh_registry.domain.keys import KeyRecord
from gpumesh_registry.postgres import missing
from gpumesh_runtime.database import Connection, Database
from gpumesh_runtime.errors import AlreadyExists, Reason

_CHANNEL: Final = "registry_directory"
_LISTEN_CHECK_S: Final = 5.0  # a half-open connection is found within this and the timeout of one command
# One writer of the catalogue at a time, because names are checked against all others. crc32(b"registry.models").
_CATALOGUE_LOCK: Final = 0x88B2A092
_EVERYTHING: Final = frozenset(Part)


def _model(row: asyncpg.Record) -> ModelEntry:
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(ModelEntry)}
    for name in ("aliases", "modalities", "features"):
        values[name] = tuple(values[name])
    values["tokenizer_sha256"] = values["tokenizer_sha256"] or ""
    return ModelEntry(**values)


async def _all_models(sql: Connection) -> tuple[ModelEntry, ...]:
    return tuple(_model(row) for row in await sql.fetch("SELECT * FROM registry.models ORDER BY model_id"))


class PostgresCatalogue:
    """store.Models."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put_model(self, entry: ModelEntry) -> ModelEntry:
        """See store.Models."""
        async with self._database.transaction() as sql:
            await sql.execute("SELECT pg_advisory_xact_lock($1)", _CATALOGUE_LOCK)
            await self._check_names(sql, entry)
            await self._check_tokenizer(sql, entry.tokenizer_sha256)
            (row,) = await sql.fetch(
                "INSERT INTO registry.models (model_id, revision, aliases, context_tokens, licence, modalities, features, "
                "quantisation, tokenizer_sha256, max_output_tokens, owner, template_overhead_tokens) "
                "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT (model_id) DO UPDATE SET "
                "revision = $2, aliases = $3, context_tokens = $4, licence = $5, modalities = $6, features = $7, "
                "quantisation = $8, tokenizer_sha256 = $9, max_output_tokens = $10, owner = $11, "
                "template_overhead_tokens = $12 RETURNING *",
                entry.model_id,
                entry.revision,
                list(entry.aliases),
                entry.context_tokens,
                entry.licence,
                list(entry.modalities),
                list(entry.features),
                entry.quantisation,
                entry.tokenizer_sha256 or None,
                entry.max_output_tokens,
                entry.owner,
                entry.template_overhead_tokens,
            )
            await sql.execute("DELETE FROM registry.model_names WHERE model_id = $1", entry.model_id)
            await sql.execute(
                "INSERT INTO registry.model_names (name, model_id) SELECT unnest($1::text[]), $2",
                [entry.model_id, *entry.aliases],
                entry.model_id,
            )
            catalogue.check_size(await _all_models(sql))
        return _model(row)

    @staticmethod
    async def _check_names(sql: Connection, entry: ModelEntry) -> None:
        taken = await sql.fetchrow(
            "SELECT name, model_id FROM registry.model_names WHERE name = ANY($1::text[]) AND model_id <> $2 LIMIT 1",
            [entry.model_id, *entry.aliases],
            entry.model_id,
        )
        if taken is not None:
            param = "model.model_id" if taken["name"] == entry.model_id else "model.aliases"
            raise AlreadyExists(
                Reason.ALREADY_EXISTS,
                f"The name {taken['name']} belongs to the model {taken['model_id']}.",
                metadata={"param": param},
            )

    @staticmethod
    async def _check_tokenizer(sql: Connection, sha256_hex: str) -> None:
        known = "SELECT 1 FROM registry.tokenizers WHERE tokenizer_sha256 = $1"
        if sha256_hex and await sql.fetchval(known, sha256_hex) is None:
            raise invalid("model.tokenizer_sha256", "No such tokenizer was uploaded; call PutTokenizer first.")

    async def list_models(self) -> tuple[ModelEntry, ...]:
        """See store.Models."""
        async with self._database.connection() as sql:
            return await _all_models(sql)

    async def remove_model(self, model_id: str) -> None:
        """See store.Models."""
        async with self._database.transaction() as sql:
            await sql.execute("SELECT pg_advisory_xact_lock($1)", _CATALOGUE_LOCK)
            removed = await sql.fetchval("DELETE FROM registry.models WHERE model_id = $1 RETURNING model_id", model_id)
        if removed is None:
            raise missing("model", "model_id")

    async def put_tokenizer(self, sha256_hex: str, content: bytes) -> None:
        """See store.Models."""
        async with self._database.transaction() as sql:
            await sql.execute(
                "INSERT INTO registry.tokenizers (tokenizer_sha256, size_bytes, content) VALUES ($1, $2, $3) "
                "ON CONFLICT DO NOTHING",
                sha256_hex,
                len(content),
                content,
            )

    async def read_tokenizer(self, sha256_hex: str, chunk_bytes: int) -> AsyncIterator[bytes]:
        """See store.Models. One short query per piece: a slow reader holds no connection."""
        async with self._database.connection() as sql:
            size = await sql.fetchval(
                "SELECT size_bytes FROM registry.tokenizers t WHERE tokenizer_sha256 = $1 AND EXISTS "
                "(SELECT 1 FROM registry.models m WHERE m.tokenizer_sha256 = t.tokenizer_sha256)",
                sha256_hex,
            )
        if size is None:
            raise missing("tokenizer", "tokenizer_sha256")
        for start in range(0, size, chunk_bytes):
            async with self._database.connection() as sql:
                chunk = await sql.fetchval(
                    "SELECT substring(content FROM $2 FOR $3) FROM registry.tokenizers WHERE tokenizer_sha256 = $1",
                    sha256_hex,
                    start + 1,
                    chunk_bytes,
                )
            yield chunk


class PostgresDirectory:
    """store.DirectoryReader."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_keys(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        """See store.DirectoryReader."""
        async with self._database.connection() as sql:
            rows = await sql.fetch(
                "SELECT k.key_id, k.account_id, k.key_sha256, k.revoke_time IS NOT NULL AS revoked, a.suspended "
                "FROM registry.keys k JOIN registry.accounts a USING (account_id) WHERE k.key_id = ANY($1::text[])",
                list(key_ids),
            )
        return {row["key_id"]: KeyRecord(*row) for row in rows}

    async def directory(self, parts: frozenset[Part], base: DirectoryState) -> DirectoryState:
        """See store.DirectoryReader."""
        changed: dict[str, Any] = {}
        async with self._database.transaction(isolation="repeatable_read", readonly=True) as sql:
            if Part.MODELS in parts:
                changed["models"] = await _all_models(sql)
            if Part.KEYS in parts:
                changed["revoked_keys"] = await self._ids(
                    sql, "SELECT key_id FROM registry.keys WHERE revoke_time > now() - $1::interval", REVOKED_KEYS_FOR
                )
            if Part.ACCOUNTS in parts:
                changed["suspended_accounts"] = await self._ids(
                    sql, "SELECT account_id FROM registry.accounts WHERE suspended"
                )
            if Part.NODES in parts:
                changed["revoked_nodes"] = await self._ids(
                    sql,
                    "SELECT node_id FROM registry.nodes WHERE revoke_time > now() - $1::interval",
                    REVOKED_NODES_FOR,
                )
        return replace(base, **changed)

    @staticmethod
    async def _ids(sql: Connection, query: str, *arguments: object) -> frozenset[str]:
        return frozenset(row[0] for row in await sql.fetch(query, *arguments))

    async def listen(self, announced: Callable[[frozenset[Part]], None]) -> None:
        """See store.DirectoryReader."""

        def on_notify(_connection: object, _pid: int, _channel: str, payload: object) -> None:
            # A part that this version does not know: read all, rather than miss something.
            announced(frozenset(part for part in Part if part.value == payload) or _EVERYTHING)

        ended = asyncio.Event()

        def on_end(_connection: object) -> None:
            ended.set()

        async with self._database.connection() as sql:
            sql.add_termination_listener(on_end)
            await sql.add_listener(_CHANNEL, on_notify)
            try:
                announced(_EVERYTHING)  # what changed before this moment is read now, what changes later is announced
                while not ended.is_set():
                    await sql.fetchval("SELECT 1")
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ended.wait(), _LISTEN_CHECK_S)
            finally:
                sql.remove_termination_listener(on_end)
                if not sql.is_closed():
                    await sql.remove_listener(_CHANNEL, on_notify)
