"""What a fresh mesh needs before it can answer: an account with a key and credit, a provider, a model with a price.

Every step is idempotent: ids are fixed or remembered in state.json, so a second start finds everything as it was.
"""

import secrets
from typing import Any, Final

from gpumesh.common.v1 import job_pb2
from gpumesh_client.files import OperatorFile
from gpumesh_client.operator import Operator
from gpumesh_local import certificates
from gpumesh_local.home import Home
from gpumesh_local.model import Shipped
from gpumesh_local.options import Options
from gpumesh_local.plan import METERING, REGISTRY_INTERNAL, REGISTRY_PUBLIC, ROUTER_PUBLIC, Plan, node_name
from gpumesh_runtime.errors import MeshError, Unavailable

ACCOUNT: Final = "acct_local"
PROVIDER: Final = "prov_local"
_CREDIT_ID: Final = "local-start"
_EVERY_FEATURE: Final = (
    job_pb2.FEATURE_TOOLS,
    job_pb2.FEATURE_STRUCTURED,
    job_pb2.FEATURE_LOGPROBS,
    job_pb2.FEATURE_MULTIPLE_CHOICES,
)
# What mock-model has of them: a request for more is refused at once, not queued for a node that will never come.
_MOCK_FEATURES: Final = (job_pb2.FEATURE_TOOLS, job_pb2.FEATURE_MULTIPLE_CHOICES)


class Bootstrap:
    """Operator calls to the registry and metering of this machine. Blocking: runs in a thread."""

    def __init__(self, home: Home, options: Options, plan: Plan, shipped: Shipped) -> None:
        self._home = home
        self._options = options
        self._plan = plan
        self._shipped = shipped
        self._state = home.read_json(home.state_file)

    def write_operator_file(self) -> None:
        """operator.json, for this bootstrap and for the gpumesh command."""
        content = {
            "registry_target": self._plan.address(REGISTRY_INTERNAL),
            "enrolment_target": self._plan.address(REGISTRY_PUBLIC),
            "metering_target": self._plan.address(METERING),
            "scheduler_targets": self._plan.schedulers,
            "cert_file": str(self._home.tls / "operator.crt"),
            "key_file": str(self._home.tls / "operator.key"),
            "ca_file": str(self._home.tls / "ca.crt"),
            "database_url": self._plan.database_url,  # for `gpumesh-metering check` and other looks from outside
        }
        self._home.write_json(self._home.operator_file, content)

    def run(self) -> list[str]:
        """Everything; gives an enrolment token per node, empty for one that is enrolled. Raises MeshError."""
        with Operator(OperatorFile.load(self._home.operator_file), timeout_s=20.0) as operator:
            operator.create_account(ACCOUNT, "Local")
            self._ensure_key(operator)
            if self._options.credit_nano_usd:
                self._ensure_credit(operator)
            operator.create_provider(PROVIDER, "Local")
            self._ensure_model(operator)
            tokens = [self._token(operator, number) for number in range(self._options.nodes)]
        self._home.write_json(self._home.state_file, self._state)
        return tokens

    def _token(self, operator: Operator, number: int) -> str:
        if certificates.node_is_enrolled(self._home, self._home.node(node_name(number))):
            return ""
        return operator.create_enrolment_token(PROVIDER).enrolment_token

    @property
    def api_key(self) -> str:
        """Of the local account."""
        return str(self._state["api_key"])

    def client_file(self) -> dict[str, Any]:
        """Content of client.json."""
        return {
            "base_url": self._plan.base_url,
            "api_key": self.api_key,
            "model": self._options.model,
            "grpc_target": self._plan.address(ROUTER_PUBLIC),
            "ca_file": str(self._home.tls / "ca.crt"),
        }

    def _ensure_key(self, operator: Operator) -> None:
        known = self._state.get("api_key", "")
        working = {key.key_id for key in operator.list_keys(ACCOUNT) if not key.HasField("revoke_time")}
        if known and known.split("_")[2] in working:
            return
        made = operator.create_key(ACCOUNT, "local" + secrets.token_hex(4), "made by the launcher")
        self._state["api_key"] = made.api_key
        # At once: a key whose secret got lost is of no use to anybody.
        self._home.write_json(self._home.state_file, self._state)

    def _ensure_credit(self, operator: Operator) -> None:
        """Once, with the amount of the first start: the same id with another amount would be refused."""
        wanted = self._options.credit_nano_usd
        given = self._state.setdefault("credited_nano_usd", wanted)
        operator.credit(ACCOUNT, given, _CREDIT_ID, "to start with")

    def _ensure_model(self, operator: Operator) -> None:
        wanted = self._model(operator)
        stored = {model.model_id: model for model in operator.list_models()}.get(wanted.model_id)
        if stored is not None:
            stored.ClearField("create_time")
        if stored != wanted:
            operator.put_model(wanted)
        prices = [self._options.input_nano_usd, self._options.output_nano_usd]
        published = self._state.setdefault("prices", {})
        if published.get(wanted.model_id) != prices:
            operator.set_price(wanted.model_id, *prices)
            published[wanted.model_id] = prices

    def _model(self, operator: Operator) -> job_pb2.Model:
        options = self._options
        model = job_pb2.Model(
            model_id=options.model,
            revision=self._plan.model_revision,
            context_tokens=int(self._plan.engine().get("context_tokens", 0)) or 32_768,
            licence=self._shipped.licence if options.engine == "tiny" else "",
            modalities=[job_pb2.MODALITY_CHAT, job_pb2.MODALITY_COMPLETION],
            features=_MOCK_FEATURES if options.engine == "mock" else _EVERY_FEATURE,
            owner=self._shipped.owner,
            template_overhead_tokens=self._shipped.template_overhead_tokens,
        )
        if options.engine == "tiny":
            model.quantisation = self._shipped.quantisation
            model.tokenizer_sha256 = operator.put_tokenizer(self._shipped.tokenizer.read_bytes())
        return model


def is_transient(err: MeshError) -> bool:
    """Whether trying again in a moment makes sense: services are still finding each other."""
    return isinstance(err, Unavailable) or err.retryable
