"""RPCs for operators and nodes: read the request, call domain or store, answer. The directory's link is in directory.py."""

import hashlib
import secrets
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from gpumesh.registry.v1 import account_service_pb2 as accounts
from gpumesh.registry.v1 import account_service_pb2_grpc, enrolment_service_pb2_grpc, model_service_pb2_grpc
from gpumesh.registry.v1 import enrolment_service_pb2 as enrolments
from gpumesh.registry.v1 import model_service_pb2 as models
from gpumesh_registry import wire
from gpumesh_registry.certificates import Csr, NodeCertificates
from gpumesh_registry.domain import catalogue, checks, enrolment, keys
from gpumesh_registry.store import Accounts, Enrolments, Models
from gpumesh_runtime.clock import Clock
from gpumesh_runtime.ids import new_id

# grpc.aio's context is generic over request and response; nothing here depends on either.
Context = Any
_NODE: Final = "node"


class AccountServicer(account_service_pb2_grpc.AccountServiceServicer):
    """Accounts, keys, providers and nodes, for operators."""

    def __init__(self, store: Accounts, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def CreateAccount(
        self, request: accounts.CreateAccountRequest, context: Context
    ) -> accounts.CreateAccountResponse:
        """See the proto."""
        account = await self._store.create_account(checks.account_id(request.account_id), checks.name(request.name))
        return accounts.CreateAccountResponse(account=wire.account_to_wire(account))

    async def ListAccounts(
        self, request: accounts.ListAccountsRequest, context: Context
    ) -> accounts.ListAccountsResponse:
        """See the proto."""
        size = checks.page_size(request.page_size)
        found = await self._store.list_accounts(size + 1, checks.page_position(request.page_token))
        page = found[:size]
        more = checks.page_token(page[-1].position) if len(found) > size else ""
        return accounts.ListAccountsResponse(accounts=map(wire.account_to_wire, page), next_page_token=more)

    async def CreateKey(self, request: accounts.CreateKeyRequest, context: Context) -> accounts.CreateKeyResponse:
        """See the proto."""
        key_id = checks.key_id(request.key_id)
        text = keys.make(key_id, secrets.token_bytes(keys.SECRET_BYTES))
        key = await self._store.create_key(
            key_id, checks.account_id(request.account_id), checks.name(request.name, required=False), keys.digest(text)
        )
        return accounts.CreateKeyResponse(key=wire.key_to_wire(key), api_key=text)

    async def ListKeys(self, request: accounts.ListKeysRequest, context: Context) -> accounts.ListKeysResponse:
        """See the proto."""
        found = await self._store.list_keys(checks.account_id(request.account_id))
        return accounts.ListKeysResponse(keys=map(wire.key_to_wire, found))

    async def RevokeKey(self, request: accounts.RevokeKeyRequest, context: Context) -> accounts.RevokeKeyResponse:
        """See the proto. Routers learn it from the database's announcement."""
        key = await self._store.revoke_key(checks.key_id(request.key_id))
        return accounts.RevokeKeyResponse(key=wire.key_to_wire(key))

    async def CreateProvider(
        self, request: accounts.CreateProviderRequest, context: Context
    ) -> accounts.CreateProviderResponse:
        """See the proto."""
        provider = await self._store.create_provider(checks.provider_id(request.provider_id), checks.name(request.name))
        return accounts.CreateProviderResponse(provider=wire.provider_to_wire(provider))

    async def CreateEnrolmentToken(
        self, request: accounts.CreateEnrolmentTokenRequest, context: Context
    ) -> accounts.CreateEnrolmentTokenResponse:
        """See the proto."""
        expire_time = self._clock.now() + enrolment.lifetime(request.lifetime_s)
        token = enrolment.make_token(secrets.token_bytes(enrolment.TOKEN_BYTES))
        provider_id = checks.provider_id(request.provider_id)
        await self._store.create_enrolment_token(provider_id, enrolment.token_digest(token), expire_time)
        return accounts.CreateEnrolmentTokenResponse(enrolment_token=token, expire_time=wire.time_to_wire(expire_time))

    async def RevokeNode(self, request: accounts.RevokeNodeRequest, context: Context) -> accounts.RevokeNodeResponse:
        """See the proto. Schedulers learn it from the database's announcement."""
        node = await self._store.revoke_node(checks.node_id(request.node_id))
        return accounts.RevokeNodeResponse(revoke_time=wire.time_to_wire(node.revoke_time or self._clock.now()))


class _TokenizerFile(msgspec.Struct):
    """The one thing that every tokenizer.json of the `tokenizers` library has."""

    model: dict[str, msgspec.Raw]


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """The model catalogue, for operators."""

    def __init__(self, store: Models) -> None:
        self._store = store

    async def PutModel(self, request: models.PutModelRequest, context: Context) -> models.PutModelResponse:
        """See the proto."""
        asked = wire.model_from_wire(request.model)
        entry = await self._store.put_model(catalogue.validate(asked, wire.KNOWN_MODALITIES, wire.KNOWN_FEATURES))
        return models.PutModelResponse(model=wire.model_to_wire(entry))

    async def PutTokenizer(
        self, request_iterator: AsyncIterator[models.PutTokenizerRequest], context: Context
    ) -> models.PutTokenizerResponse:
        """See the proto."""
        content = bytearray()
        async for piece in request_iterator:
            content += piece.chunk
            if len(content) > catalogue.MAX_TOKENIZER_BYTES:
                raise checks.invalid("chunk", f"A tokenizer has at most {catalogue.MAX_TOKENIZER_BYTES} bytes.")
        whole = bytes(content)
        try:
            msgspec.json.decode(whole, type=_TokenizerFile)
        except msgspec.DecodeError as err:
            raise checks.invalid("chunk", "This is not a tokenizer.json.") from err
        sha256_hex = hashlib.sha256(whole).hexdigest()
        await self._store.put_tokenizer(sha256_hex, whole)
        return models.PutTokenizerResponse(tokenizer_sha256=sha256_hex)

    async def ListModels(self, request: models.ListModelsRequest, context: Context) -> models.ListModelsResponse:
        """See the proto."""
        return models.ListModelsResponse(models=map(wire.model_to_wire, await self._store.list_models()))

    async def RemoveModel(self, request: models.RemoveModelRequest, context: Context) -> models.RemoveModelResponse:
        """See the proto."""
        await self._store.remove_model(checks.model_id(request.model_id))
        return models.RemoveModelResponse()


class EnrolmentServicer(enrolment_service_pb2_grpc.EnrolmentServiceServicer):
    """How a node gets its certificate. Anyone may call: the token or the old certificate decides."""

    def __init__(
        self, store: Enrolments, certificates: NodeCertificates, clock: Clock, scheduler_addresses: tuple[str, ...]
    ) -> None:
        self._store = store
        self._certificates = certificates
        self._clock = clock
        self._scheduler_addresses = scheduler_addresses

    async def EnrolNode(self, request: enrolments.EnrolNodeRequest, context: Context) -> enrolments.EnrolNodeResponse:
        """See the proto."""
        token_sha256 = enrolment.token_digest(request.enrolment_token)
        csr = Csr(request.csr_der)
        node = await self._store.enrol_node(token_sha256, csr.key_sha256, new_id(_NODE), self._clock.now())
        issued = await self._certificates.sign(csr, node.provider_id, node.node_id)
        return enrolments.EnrolNodeResponse(
            node_id=node.node_id,
            provider_id=node.provider_id,
            certificate_pem=issued.certificate.decode(),
            ca_pem=self._certificates.ca_pem,
            expire_time=wire.time_to_wire(issued.not_after),
            scheduler_addresses=self._scheduler_addresses,
        )

    async def RenewCertificate(
        self, request: enrolments.RenewCertificateRequest, context: Context
    ) -> enrolments.RenewCertificateResponse:
        """See the proto."""
        old = self._certificates.read_old(request.certificate_pem)
        csr = Csr(request.csr_der)
        now = self._clock.now()
        enrolment.may_renew(old, await self._store.get_node(old.node_id), csr.key_sha256, now)
        issued = await self._certificates.sign(csr, old.provider_id, old.node_id)
        await self._store.node_renewed(old.node_id, now)
        return enrolments.RenewCertificateResponse(
            certificate_pem=issued.certificate.decode(),
            ca_pem=self._certificates.ca_pem,
            expire_time=wire.time_to_wire(issued.not_after),
        )
