"""Accounts, keys, providers and the catalogue over real TLS and a real PostgreSQL."""

import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gpumesh.common.v1.job_pb2 import MODALITY_CHAT, Model
from gpumesh.registry.v1 import account_service_pb2 as pb
from gpumesh.registry.v1 import model_service_pb2 as models
from gpumesh.registry.v1.account_service_pb2_grpc import AccountServiceStub
from gpumesh.registry.v1.directory_service_pb2 import GetTokenizerRequest
from gpumesh.registry.v1.directory_service_pb2_grpc import DirectoryServiceStub
from gpumesh.registry.v1.model_service_pb2_grpc import ModelServiceStub
from gpumesh_runtime.errors import MeshError, Reason, from_grpc
from gpumesh_runtime.identity import operator_uri, service_uri
from gpumesh_runtime.rpc.client import unary
from tests.support.registry import RunningRegistry, running_registry

pytestmark = pytest.mark.postgres
TOKENIZER = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}}, "pad": "x" * 600_000}).encode()


@pytest.fixture
async def registry(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[RunningRegistry]:
    async with running_registry(postgres_dsn, tmp_path) as running:
        yield running


@pytest.fixture
async def accounts(registry: RunningRegistry) -> "AccountServiceStub":
    return AccountServiceStub(registry.operator())


@pytest.fixture
async def catalogue(registry: RunningRegistry) -> "ModelServiceStub":
    return ModelServiceStub(registry.operator())


async def refused(call: Any) -> MeshError:
    with pytest.raises(MeshError) as caught:
        await call
    return caught.value


def account(name: str, number: int = 1) -> pb.CreateAccountRequest:
    return pb.CreateAccountRequest(account_id=f"acct_{number}", name=name)


async def upload(catalogue: Any, content: bytes) -> str:
    pieces = [content[start : start + 256 * 1024] for start in range(0, len(content), 256 * 1024)]
    answer = await catalogue.PutTokenizer(
        iter([models.PutTokenizerRequest(chunk=piece) for piece in pieces]), timeout=10
    )
    return str(answer.tokenizer_sha256)


def model(**fields: Any) -> models.PutModelRequest:
    base: dict[str, Any] = {"model_id": "m", "revision": "1", "context_tokens": 2048, "modalities": [MODALITY_CHAT]}
    return models.PutModelRequest(model=Model(**{**base, **fields}))


async def test_the_same_account_again_is_the_first_answer_and_another_name_is_a_conflict(accounts: Any) -> None:
    first = await unary(accounts.CreateAccount, account("Ann"), 5)
    assert await unary(accounts.CreateAccount, account("Ann"), 5) == first
    error = await refused(unary(accounts.CreateAccount, account("Bob"), 5))
    assert error.reason is Reason.ALREADY_EXISTS


async def test_accounts_are_listed_newest_first_page_by_page(accounts: Any) -> None:
    for number in range(5):
        await unary(accounts.CreateAccount, account(f"n{number}", number), 5)
    found, token = [], ""
    while True:
        page = await unary(accounts.ListAccounts, pb.ListAccountsRequest(page_size=2, page_token=token), 5)
        assert len(page.accounts) <= 2
        found += [entry.account_id for entry in page.accounts]
        token = page.next_page_token
        if not token:
            break
    assert found == [f"acct_{number}" for number in (4, 3, 2, 1, 0)]


async def test_a_key_is_shown_once_and_stored_as_a_hash_only(accounts: Any, postgres_dsn: str) -> None:
    await unary(accounts.CreateAccount, account("Ann"), 5)
    request = pb.CreateKeyRequest(account_id="acct_1", key_id="k1", name="laptop")
    made = await unary(accounts.CreateKey, request, 5)
    assert made.api_key.startswith("gm_live_k1_")
    error = await refused(unary(accounts.CreateKey, request, 5))
    assert error.reason is Reason.ALREADY_EXISTS
    listed = await unary(accounts.ListKeys, pb.ListKeysRequest(account_id="acct_1"), 5)
    assert list(listed.keys) == [made.key]
    connection = await asyncpg.connect(postgres_dsn)
    stored = await connection.fetchrow("SELECT * FROM registry.keys")
    await connection.close()
    assert stored is not None
    assert stored["key_sha256"] == hashlib.sha256(made.api_key.encode()).digest()
    secret = made.api_key.split("_")[3]
    assert secret not in str(dict(stored))


async def test_a_key_is_revoked_once_and_for_good(accounts: Any) -> None:
    await unary(accounts.CreateAccount, account("Ann"), 5)
    await unary(accounts.CreateKey, pb.CreateKeyRequest(account_id="acct_1", key_id="k1"), 5)
    first = await unary(accounts.RevokeKey, pb.RevokeKeyRequest(key_id="k1"), 5)
    again = await unary(accounts.RevokeKey, pb.RevokeKeyRequest(key_id="k1"), 5)
    assert first.key.HasField("revoke_time")
    assert again == first


async def test_what_does_not_exist_is_not_found(accounts: Any, catalogue: Any) -> None:
    calls = [
        unary(accounts.CreateKey, pb.CreateKeyRequest(account_id="acct_x", key_id="k"), 5),
        unary(accounts.ListKeys, pb.ListKeysRequest(account_id="acct_x"), 5),
        unary(accounts.RevokeKey, pb.RevokeKeyRequest(key_id="k"), 5),
        unary(accounts.CreateEnrolmentToken, pb.CreateEnrolmentTokenRequest(provider_id="prov_x"), 5),
        unary(accounts.RevokeNode, pb.RevokeNodeRequest(node_id="node_x"), 5),
        unary(catalogue.RemoveModel, models.RemoveModelRequest(model_id="x"), 5),
    ]
    assert {(await refused(call)).reason for call in calls} == {Reason.NOT_FOUND}


async def test_only_operators_may_create_accounts_and_every_unary_call_needs_a_deadline(
    registry: RunningRegistry,
) -> None:
    as_router = AccountServiceStub(registry.channel(service_uri("router")))
    error = await refused(unary(as_router.CreateAccount, account("Ann"), 5))
    assert error.reason is Reason.PERMISSION_DENIED
    as_operator = AccountServiceStub(registry.channel(operator_uri("other")))
    with pytest.raises(Exception, match="deadline") as caught:
        await as_operator.CreateAccount(account("Ann"))
    assert from_grpc(caught.value).reason is Reason.DEADLINE_REQUIRED  # type: ignore[arg-type]  # an AioRpcError


async def test_a_model_is_put_replaced_listed_and_removed(catalogue: Any) -> None:
    sha256 = await upload(catalogue, TOKENIZER)
    assert sha256 == hashlib.sha256(TOKENIZER).hexdigest()
    first = await unary(catalogue.PutModel, model(aliases=["a", "b"], tokenizer_sha256=sha256), 5)
    assert first.model.HasField("create_time")
    second = await unary(catalogue.PutModel, model(aliases=["b"], revision="2"), 5)
    assert second.model.create_time == first.model.create_time
    listed = await unary(catalogue.ListModels, models.ListModelsRequest(), 5)
    assert list(listed.models) == [second.model]
    await unary(catalogue.PutModel, model(model_id="n", aliases=["a"]), 5)  # the name that m gave up
    await unary(catalogue.RemoveModel, models.RemoveModelRequest(model_id="m"), 5)
    listed = await unary(catalogue.ListModels, models.ListModelsRequest(), 5)
    assert [entry.model_id for entry in listed.models] == ["n"]


async def test_one_name_belongs_to_one_model(catalogue: Any) -> None:
    await unary(catalogue.PutModel, model(aliases=["a"]), 5)
    for clash in (model(model_id="n", aliases=["a"]), model(model_id="a"), model(model_id="n", aliases=["m"])):
        error = await refused(unary(catalogue.PutModel, clash, 5))
        assert error.reason is Reason.ALREADY_EXISTS
    assert len((await unary(catalogue.ListModels, models.ListModelsRequest(), 5)).models) == 1


async def test_a_model_cannot_name_a_tokenizer_that_was_never_uploaded(catalogue: Any) -> None:
    error = await refused(unary(catalogue.PutModel, model(tokenizer_sha256="0" * 64), 5))
    assert error.metadata["param"] == "model.tokenizer_sha256"


async def test_what_is_not_a_tokenizer_is_refused(catalogue: Any) -> None:
    for content in (b"", b"{", b'{"model": 1}', b"[]"):
        with pytest.raises(Exception, match="not a tokenizer"):
            await upload(catalogue, content)


async def test_services_read_the_tokenizers_that_models_use(registry: RunningRegistry, catalogue: Any) -> None:
    sha256 = await upload(catalogue, TOKENIZER)
    for role in ("router", "metering"):
        reader: Any = DirectoryServiceStub(registry.channel(service_uri(role)))
        request = GetTokenizerRequest(tokenizer_sha256=sha256)
        if role == "router":
            with pytest.raises(Exception, match="no such tokenizer"):
                [piece async for piece in reader.GetTokenizer(request, timeout=5)]
            await unary(catalogue.PutModel, model(tokenizer_sha256=sha256), 5)
        pieces = [piece.chunk async for piece in reader.GetTokenizer(request, timeout=5)]
        assert max(map(len, pieces)) <= 256 * 1024
        assert b"".join(pieces) == TOKENIZER
