"""The node's settings, read once from the environment. GPUMESH_NODE_ENGINES is a JSON list; every other one is a plain value."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import NoDecode

from gpumesh_runtime.config import CommaList, Settings, settings_config


class _Spec(BaseModel):
    """One entry of GPUMESH_NODE_ENGINES; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


FeatureName = Literal["tools", "structured", "logprobs", "vision", "multiple_choices"]
ModelId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/-]{1,128}$")]
_DEFAULT_FEATURES: tuple[FeatureName, ...] = ("tools", "structured", "logprobs", "multiple_choices")


class ModelSpec(_Spec):
    """A model as the mesh's catalogue knows it."""

    model_id: ModelId = Field(description="Catalogue id.")
    revision: str = Field(default="", description="Revision in the catalogue; must be the same there.")
    quantisation: str = Field(default="", description='For example "Q4_K_M".')
    context_tokens: int = Field(default=0, ge=0, description="Per slot. 0: what the engine tells.")
    features: tuple[FeatureName, ...] = Field(
        default=_DEFAULT_FEATURES, description="What it can do beyond plain generation."
    )


class OpenAiSpec(_Spec):
    """An OpenAI-compatible server."""

    kind: Literal["openai"]
    name: str = Field(default="", description="For logs and metrics. Empty: openai-<place in the list>.")
    base_url: str = Field(description="http(s)://host:port, with or without /v1.")
    models: dict[str, ModelId | ModelSpec] = Field(
        min_length=1, description="Name at the engine -> catalogue id, or a model with details."
    )
    slots: int = Field(default=8, ge=1, le=4096, description="Jobs at once, per model.")
    api_key: SecretStr = Field(default=SecretStr(""), description="Sent as bearer token.")
    engine_name: str = Field(default="", description='For example "vllm".')
    engine_version: str = Field(default="", description="Its version.")
    split_choices: bool = Field(
        False, description="n > 1 as n requests: for engines that ignore n (Ollama) or count one choice (llama.cpp)."
    )
    always_stream: bool = Field(
        False, description="Stream from the engine also for whole answers, so that a cancel reaches it at once."
    )

    @field_validator("base_url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("base_url must be http(s)://host:port or http(s)://host:port/v1")
        return value.rstrip("/") if parts.path.strip("/") else value.rstrip("/") + "/v1"


class LlamaCppSpec(_Spec):
    """llama.cpp, built in."""

    kind: Literal["llamacpp"]
    name: str = Field(default="", description="For logs and metrics. Empty: llamacpp-<place in the list>.")
    model_id: ModelId = Field(description="Catalogue id.")
    path: Path = Field(description="The GGUF file.")
    revision: str = Field(default="", description="Revision in the catalogue; must be the same there.")
    quantisation: str = Field(default="", description='For example "F16".')
    slots: int = Field(default=2, ge=1, le=256, description="Jobs at once.")
    context_tokens: int = Field(
        default=0, ge=0, description="Per slot. 0: the model's own context, shared by the slots."
    )
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads that compute.")
    gpu_layers: int = Field(default=0, ge=0, description="Layers on the GPU.")
    features: tuple[FeatureName, ...] = Field(
        default=_DEFAULT_FEATURES, description="What it can do beyond plain generation."
    )

    @field_validator("path")
    @classmethod
    def _exists(cls, value: Path) -> Path:
        if not value.is_file():
            raise ValueError(f"path: there is no file {value}")
        return value


class MockSpec(_Spec):
    """mock-model: not a model, for development and tests."""

    kind: Literal["mock"]
    name: str = Field(default="", description="For logs and metrics. Empty: mock-<place in the list>.")
    model_id: ModelId = Field(default="mock-model", description="Catalogue id.")
    revision: str = Field(default="", description="Revision in the catalogue; must be the same there.")
    slots: int = Field(default=8, ge=1, le=4096, description="Jobs at once.")
    context_tokens: int = Field(default=4096, ge=1, description="What it says its context is.")
    script: dict[str, float | int | str | bool] = Field(
        default_factory=dict,
        description="Script where the prompt gives no directives, see docs/how-to/add-an-engine.md.",
    )


EngineSpec = Annotated[OpenAiSpec | LlamaCppSpec | MockSpec, Field(discriminator="kind")]


_ENGINES: TypeAdapter[tuple[EngineSpec, ...]] = TypeAdapter(tuple[EngineSpec, ...])


def _engines(value: object) -> object:
    """The JSON list as specs. Raises ValueError that says which entry's which key is wrong, never a value: it may be a secret."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as err:
            raise ValueError(f"must be a JSON list: {err.msg} at character {err.pos}") from None
    try:
        return _ENGINES.validate_python(value)
    except ValidationError as err:
        raise ValueError("; ".join(_where(error) for error in err.errors())) from None


def _where(error: ErrorDetails) -> str:
    """`entry 1, openai.slots: input should be ...`."""
    first, *rest = error["loc"] or ("list",)
    entry = f"entry {first + 1}" if isinstance(first, int) else str(first)
    place = ".".join(str(part) for part in rest)
    message = error["msg"].removeprefix("Value error, ")
    return f"{entry}{', ' if place else ''}{place}: {message[0].lower() + message[1:]}"


class NodeSettings(Settings):
    """GPUMESH_NODE_*. The certificate comes from the state folder (by enrolment), or from TLS_CERT, TLS_KEY and TLS_CA if they are set."""

    model_config = settings_config("GPUMESH_NODE_")

    state_dir: Path = Field(
        description="Folder of this node's key, certificate and journal; made if absent, readable by its owner only."
    )
    registry_address: str = Field(
        "", description="host:port of the registry's enrolment listener. Needed to enrol and to renew."
    )
    registry_server_name: str = Field(
        "", description="Name in the registry's certificate, where it differs from the host."
    )
    enrolment_token: SecretStr = Field(default=SecretStr(""), description="One-time token, needed once.")
    ca_file: Path | None = Field(default=None, description="CA of the mesh, PEM. Needed to enrol.")
    scheduler_addresses: CommaList = Field(
        (), description="host:port,... of schedulers. Empty: those that enrolment named."
    )
    scheduler_server_name: str = Field(
        "", description="Name in the schedulers' certificates, where it differs from the host."
    )
    engines: Annotated[tuple[EngineSpec, ...], NoDecode, BeforeValidator(_engines)] = Field(
        description="JSON list of engines, see docs/how-to/add-an-engine.md."
    )
    drain_s: float = Field(
        120.0, ge=0.0, le=600.0, description="How long running jobs may take after SIGTERM, seconds."
    )
    orphan_s: float = Field(
        default=20.0, ge=0.0, le=600.0, description="How long jobs go on without a session, seconds."
    )
    reconnect_min_s: float = Field(
        5.0, gt=0.0, le=60.0, description="Spread of the first reconnect, seconds; a scheduler may advise more."
    )
    reconnect_max_s: float = Field(
        default=60.0,
        gt=0.0,
        le=600.0,
        description="Spread to which it doubles, seconds; also bounds what a scheduler advises.",
    )

    @field_validator("engines")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("at least one engine is needed")
        seen: set[str] = set()
        for spec in value:
            for model_id in model_ids(spec):
                if model_id in seen:
                    raise ValueError(
                        f"model {model_id} is served by two engines; run a node for each, or a load balancer"
                    )
                seen.add(model_id)
        return value

    @model_validator(mode="after")
    def _ready_certificate(self) -> Self:
        given = [self.tls_cert is not None, self.tls_key is not None, self.tls_ca is not None]
        if any(given) and not all(given):
            raise ValueError("GPUMESH_NODE_TLS_CERT, _TLS_KEY and _TLS_CA belong together: set all of them or none")
        return self


def model_ids(spec: "OpenAiSpec | LlamaCppSpec | MockSpec") -> list[str]:
    """Catalogue ids that an engine serves."""
    if isinstance(spec, OpenAiSpec):
        return [model if isinstance(model, str) else model.model_id for model in spec.models.values()]
    return [spec.model_id]
