"""Readers of the directory: lookups, copies that follow the database, several registries in step."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gpumesh.common.v1.job_pb2 import MODALITY_CHAT, Model
from gpumesh.common.v1.link_pb2 import ItemKind
from gpumesh.registry.v1 import account_service_pb2 as accounts
from gpumesh.registry.v1 import directory_service_pb2 as pb
from gpumesh.registry.v1 import model_service_pb2 as models
from gpumesh.registry.v1.account_service_pb2_grpc import AccountServiceStub
from gpumesh.registry.v1.model_service_pb2_grpc import ModelServiceStub
from gpumesh_registry.domain import keys
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.identity import service_uri
from gpumesh_runtime.link import Link, LinkClient
from gpumesh_runtime.rpc.client import unary
from tests.support.links import Recorder
from tests.support.registry import RunningRegistry, running_registry

pytestmark = pytest.mark.postgres
METHOD = "/gpumesh.registry.v1.DirectoryService/Connect"
# The promise is one second; the bound is five.
PUSHED_WITHIN_S = 1.0


class Reader(Recorder):
    """A router's or scheduler's copy of the directory."""

    @property
    def updates(self) -> list[pb.Directory]:
        """Every update so far."""
        return [pb.Directory.FromString(item.body) for item in self.of_kind(ItemKind.ITEM_KIND_UPDATE)]

    @property
    def revoked_keys(self) -> set[str]:
        """All keys named as revoked."""
        return {key for update in self.updates for key in update.revoked_key_ids}

    @property
    def models(self) -> list[str]:
        """The catalogue, by the last update that held it."""
        whole = [update for update in self.updates if update.catalogue_whole]
        return [model.model_id for model in whole[-1].models]


@asynccontextmanager
async def connected(registry: RunningRegistry, role: str = "router") -> AsyncIterator[tuple[Link, Reader]]:
    """A reader with its link up and its first update received."""
    reader = Reader()
    client = LinkClient(
        registry.internal,
        METHOD,
        credentials=registry.tls(service_uri(role)),
        hello=pb.DirectoryHello(reader_id="test").SerializeToString,
        receiver=reader,
    )
    running = asyncio.create_task(client.run())
    try:
        link = await client.up(10)
        await reader.until(lambda: bool(reader.updates))
        yield link, reader
    finally:
        await client.stop()
        await running


@pytest.fixture
async def registry(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[RunningRegistry]:
    async with running_registry(postgres_dsn, tmp_path) as running:
        yield running


async def new_key(registry: RunningRegistry, key_id: str = "k1") -> str:
    stub: Any = AccountServiceStub(registry.operator())
    await unary(stub.CreateAccount, accounts.CreateAccountRequest(account_id="acct_a", name="Ann"), 5)
    made = await unary(stub.CreateKey, accounts.CreateKeyRequest(account_id="acct_a", key_id=key_id), 5)
    return str(made.api_key)


async def revoke(registry: RunningRegistry, key_id: str = "k1") -> None:
    stub: Any = AccountServiceStub(registry.operator())
    await unary(stub.RevokeKey, accounts.RevokeKeyRequest(key_id=key_id), 5)


async def put_model(registry: RunningRegistry, model_id: str) -> None:
    stub: Any = ModelServiceStub(registry.operator())
    model = Model(model_id=model_id, revision="1", context_tokens=100, modalities=[MODALITY_CHAT])
    await unary(stub.PutModel, models.PutModelRequest(model=model), 5)


def lookup(link: Link, text: str, key_id: str = "k1") -> "asyncio.Future[bytes]":
    return link.call(pb.LookupKey(key_id=key_id, key_sha256=keys.digest(text)).SerializeToString(), 5)


async def reason_of(future: "asyncio.Future[bytes]") -> Reason:
    with pytest.raises(MeshError) as caught:
        await future
    return caught.value.reason


async def test_a_router_learns_whom_a_key_belongs_to(registry: RunningRegistry) -> None:
    text = await new_key(registry)
    async with connected(registry) as (link, _):
        identity = pb.KeyIdentity.FromString(await lookup(link, text))
        assert (identity.key_id, identity.account_id, identity.cache_seconds) == ("k1", "acct_a", 900)
        assert await reason_of(lookup(link, text + "x")) is Reason.INVALID_API_KEY
        assert await reason_of(lookup(link, text, "other")) is Reason.INVALID_API_KEY


async def test_a_strangers_text_does_not_fail_the_lookups_that_come_with_it(registry: RunningRegistry) -> None:
    text = await new_key(registry)
    async with connected(registry) as (link, _):
        calls = [lookup(link, text), *(lookup(link, text, strange) for strange in ("", "k1\0", "k" * 1000, "k1'; --"))]
        assert await calls[0]
        assert {await reason_of(call) for call in calls[1:]} == {Reason.INVALID_API_KEY}


async def test_a_thousand_lookups_at_once_are_all_answered(registry: RunningRegistry) -> None:
    text = await new_key(registry)
    async with connected(registry) as (link, _):
        answers = await asyncio.gather(*(lookup(link, text) for _ in range(1000)))
    assert {pb.KeyIdentity.FromString(answer).account_id for answer in answers} == {"acct_a"}


async def test_only_routers_look_keys_up(registry: RunningRegistry) -> None:
    text = await new_key(registry)
    async with connected(registry, "scheduler") as (link, _):
        assert await reason_of(lookup(link, text)) is Reason.PERMISSION_DENIED


async def test_a_revocation_reaches_a_router_within_a_second_and_later_readers_at_once(
    registry: RunningRegistry,
) -> None:
    text = await new_key(registry)
    async with connected(registry) as (link, reader):
        await revoke(registry)
        await reader.until(lambda: "k1" in reader.revoked_keys, PUSHED_WITHIN_S)
        assert await reason_of(lookup(link, text)) is Reason.REVOKED_API_KEY
    async with connected(registry) as (_, late):
        assert late.revoked_keys == {"k1"}


async def test_the_whole_catalogue_is_pushed_at_first_and_whenever_it_changes(registry: RunningRegistry) -> None:
    async with connected(registry) as (_, reader):
        assert reader.models == []
        await put_model(registry, "one")
        await reader.until(lambda: reader.models == ["one"], PUSHED_WITHIN_S)
        await put_model(registry, "two")
        await reader.until(lambda: reader.models == ["one", "two"], PUSHED_WITHIN_S)


async def test_registries_that_share_a_database_stay_in_step(
    registry: RunningRegistry, postgres_dsn: str, tmp_path: Path
) -> None:
    await new_key(registry)
    async with running_registry(postgres_dsn, tmp_path, "second") as second, connected(second) as (_, reader):
        await revoke(registry)
        await put_model(registry, "one")
        await reader.until(lambda: reader.models == ["one"] and "k1" in reader.revoked_keys, PUSHED_WITHIN_S)


async def test_a_suspended_account_is_pushed_and_so_is_its_return(registry: RunningRegistry, postgres_dsn: str) -> None:
    text = await new_key(registry)
    connection = await asyncpg.connect(postgres_dsn)
    async with connected(registry) as (link, reader):
        await connection.execute("UPDATE registry.accounts SET suspended = true")
        await reader.until(lambda: list(reader.updates[-1].suspended_account_ids) == ["acct_a"], PUSHED_WITHIN_S)
        assert await reason_of(lookup(link, text)) is Reason.ACCOUNT_SUSPENDED
        await connection.execute("UPDATE registry.accounts SET suspended = false")
        await reader.until(lambda: list(reader.updates[-1].restored_account_ids) == ["acct_a"], PUSHED_WITHIN_S)
        assert await lookup(link, text)
    await connection.close()


async def test_after_the_database_cut_every_connection_readers_still_learn_of_changes(
    registry: RunningRegistry, postgres_dsn: str
) -> None:
    text = await new_key(registry)
    connection = await asyncpg.connect(postgres_dsn)
    async with connected(registry) as (link, reader):
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        )
        await connection.execute("UPDATE registry.keys SET revoke_time = now()")
        await reader.until(lambda: "k1" in reader.revoked_keys, 5)
        assert await reason_of(lookup(link, text)) is Reason.REVOKED_API_KEY
    await connection.close()
