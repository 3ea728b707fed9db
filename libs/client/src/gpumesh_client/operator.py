"""The operator's side: accounts, keys, credit, providers, nodes, models, over mutual TLS."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message

from gpumesh.common.v1 import job_pb2
from gpumesh.metering.v1 import ledger_service_pb2 as ledger
from gpumesh.registry.v1 import account_service_pb2 as accounts
from gpumesh.registry.v1 import model_service_pb2 as models
from gpumesh.scheduler.v1 import operator_service_pb2 as scheduler
from gpumesh_client.channel import mesh_errors, open_channel
from gpumesh_client.files import OperatorFile
from gpumesh_runtime.errors import Unavailable
from gpumesh_runtime.tls import TlsIdentity

_ACCOUNTS: Final = "/gpumesh.registry.v1.AccountService/"
_MODELS: Final = "/gpumesh.registry.v1.ModelService/"
_LEDGER: Final = "/gpumesh.metering.v1.LedgerService/"
_SCHEDULER: Final = "/gpumesh.scheduler.v1.OperatorService/"
_CHUNK_BYTES: Final = 256 * 1024
Response = TypeVar("Response", bound=Message)


def new_owner_id(noun: str) -> str:
    """An id for an account ("acct") or provider ("prov"), made by us as by every caller."""
    return f"{noun}_{secrets.token_hex(8)}"


class Operator:
    """Operator calls to one mesh. Thread-safe. Every method raises MeshError (see .reason)."""

    def __init__(self, file: OperatorFile, *, timeout_s: float = 10.0) -> None:
        tls = TlsIdentity(file.cert_file, file.key_file, file.ca_file)
        self._timeout_s = timeout_s
        self._registry = open_channel(file.registry_target, tls)
        self._metering = open_channel(file.metering_target, tls)
        self._schedulers = [open_channel(target, tls) for target in file.scheduler_targets]

    @classmethod
    def from_file(cls, path: str | Path | None = None, *, timeout_s: float = 10.0) -> Self:
        """From operator.json; by default that of GPUMESH_HOME. Raises ConfigurationError, or OSError for its certificate."""
        return cls(OperatorFile.load(path), timeout_s=timeout_s)

    def _call(self, channel: grpc.Channel, method: str, request: Message, kind: type[Response]) -> Response:
        call: Any = channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=kind.FromString
        )
        with mesh_errors():
            response: Response = call(request, timeout=self._timeout_s)
        return response

    # --- accounts and keys ------------------------------------------------------------------------------------------

    def create_account(self, account_id: str, name: str) -> accounts.Account:
        """The account; the same call again gives the same one."""
        request = accounts.CreateAccountRequest(account_id=account_id, name=name)
        return self._call(self._registry, _ACCOUNTS + "CreateAccount", request, accounts.CreateAccountResponse).account

    def list_accounts(self) -> Iterator[accounts.Account]:
        """All of them, newest first."""
        token = ""
        while True:
            request = accounts.ListAccountsRequest(page_size=1000, page_token=token)
            page = self._call(self._registry, _ACCOUNTS + "ListAccounts", request, accounts.ListAccountsResponse)
            yield from page.accounts
            token = page.next_page_token
            if not token:
                return

    def create_key(self, account_id: str, key_id: str, name: str = "") -> accounts.CreateKeyResponse:
        """The key with its secret, which is shown this once."""
        request = accounts.CreateKeyRequest(account_id=account_id, key_id=key_id, name=name)
        return self._call(self._registry, _ACCOUNTS + "CreateKey", request, accounts.CreateKeyResponse)

    def list_keys(self, account_id: str) -> list[accounts.Key]:
        """Newest first, revoked ones included."""
        request = accounts.ListKeysRequest(account_id=account_id)
        return list(self._call(self._registry, _ACCOUNTS + "ListKeys", request, accounts.ListKeysResponse).keys)

    def revoke_key(self, key_id: str) -> accounts.Key:
        """The key, revoked; routers refuse it within 5 s."""
        request = accounts.RevokeKeyRequest(key_id=key_id)
        return self._call(self._registry, _ACCOUNTS + "RevokeKey", request, accounts.RevokeKeyResponse).key

    # --- providers and nodes ----------------------------------------------------------------------------------------

    def create_provider(self, provider_id: str, name: str) -> accounts.Provider:
        """The provider; the same call again gives the same one."""
        request = accounts.CreateProviderRequest(provider_id=provider_id, name=name)
        answer = self._call(self._registry, _ACCOUNTS + "CreateProvider", request, accounts.CreateProviderResponse)
        return answer.provider

    def create_enrolment_token(self, provider_id: str, lifetime_s: int = 0) -> accounts.CreateEnrolmentTokenResponse:
        """A one-time token for one node. lifetime_s 0: 10 minutes."""
        request = accounts.CreateEnrolmentTokenRequest(provider_id=provider_id, lifetime_s=lifetime_s)
        method = _ACCOUNTS + "CreateEnrolmentToken"
        return self._call(self._registry, method, request, accounts.CreateEnrolmentTokenResponse)

    def revoke_node(self, node_id: str) -> accounts.RevokeNodeResponse:
        """Ends the node's session and certificate for good."""
        request = accounts.RevokeNodeRequest(node_id=node_id)
        return self._call(self._registry, _ACCOUNTS + "RevokeNode", request, accounts.RevokeNodeResponse)

    def list_nodes(self, provider_id: str = "") -> list[scheduler.NodeSummary]:
        """Nodes connected now, over all schedulers that answer. Raises Unavailable when none does."""
        nodes: list[scheduler.NodeSummary] = []
        last: Unavailable | None = None
        answered = False
        for channel in self._schedulers:
            try:
                request = scheduler.ListNodesRequest(provider_id=provider_id)
                nodes += self._call(channel, _SCHEDULER + "ListNodes", request, scheduler.ListNodesResponse).nodes
                answered = True
            except Unavailable as err:
                last = err
        if last is not None and not answered:
            raise last
        return nodes

    # --- models -----------------------------------------------------------------------------------------------------

    def put_tokenizer(self, content: bytes) -> str:
        """Uploads a tokenizer.json; gives its SHA-256, by which models name it."""
        call: Any = self._registry.stream_unary(
            _MODELS + "PutTokenizer",
            request_serializer=models.PutTokenizerRequest.SerializeToString,
            response_deserializer=models.PutTokenizerResponse.FromString,
        )
        pieces = (content[start : start + _CHUNK_BYTES] for start in range(0, len(content), _CHUNK_BYTES))
        with mesh_errors():
            answer = call((models.PutTokenizerRequest(chunk=piece) for piece in pieces), timeout=6 * self._timeout_s)
        return str(answer.tokenizer_sha256)

    def put_model(self, model: job_pb2.Model) -> job_pb2.Model:
        """Puts a model into the catalogue or replaces its entry."""
        request = models.PutModelRequest(model=model)
        return self._call(self._registry, _MODELS + "PutModel", request, models.PutModelResponse).model

    def list_models(self) -> list[job_pb2.Model]:
        """The catalogue, by id."""
        request = models.ListModelsRequest()
        return list(self._call(self._registry, _MODELS + "ListModels", request, models.ListModelsResponse).models)

    def remove_model(self, model_id: str) -> None:
        """Takes a model out of the catalogue; jobs that run finish."""
        request = models.RemoveModelRequest(model_id=model_id)
        self._call(self._registry, _MODELS + "RemoveModel", request, models.RemoveModelResponse)

    # --- money ------------------------------------------------------------------------------------------------------

    def set_price(self, model_id: str, input_nano_usd: int, output_nano_usd: int) -> job_pb2.Price:
        """Per 1,000,000 tokens, from now on."""
        request = ledger.SetPriceRequest(
            model_id=model_id, input_nano_usd_per_mtok=input_nano_usd, output_nano_usd_per_mtok=output_nano_usd
        )
        return self._call(self._metering, _LEDGER + "SetPrice", request, ledger.SetPriceResponse).price

    def credit(self, account_id: str, amount_nano_usd: int, credit_id: str, memo: str = "") -> int:
        """Credits an account once per credit_id; gives what it can spend, nano-USD."""
        request = ledger.CreditRequest(
            account_id=account_id, amount_nano_usd=amount_nano_usd, credit_id=credit_id, memo=memo
        )
        answer = self._call(self._metering, _LEDGER + "Credit", request, ledger.CreditResponse)
        return answer.balance.available_nano_usd

    def balances(self, owner_id: str) -> dict[str, int]:
        """Of a buyer or provider, nano-USD by ledger account."""
        request = ledger.GetBalancesRequest(owner_id=owner_id)
        answer = self._call(self._metering, _LEDGER + "GetBalances", request, ledger.GetBalancesResponse)
        return dict(answer.balances_nano_usd)

    def close(self) -> None:
        """Closes the connections."""
        for channel in (self._registry, self._metering, *self._schedulers):
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
