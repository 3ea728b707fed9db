"""The router's settings, from GPUMESH_ROUTER_* variables."""

from pathlib import Path

from pydantic import Field

from gpumesh_runtime.config import CommaList, Settings, settings_config


class RouterSettings(Settings):
    """Everything that can be set on a router."""

    model_config = settings_config("GPUMESH_ROUTER_")

    router_id: str = Field(
        "router-0", min_length=1, max_length=64, description="This replica's name, stable over restarts."
    )
    public_address: str = Field("127.0.0.1:8081", description="host:port of InferenceService, server TLS.")
    internal_address: str = Field("127.0.0.1:8082", description="host:port of AdmissionService, mTLS.")
    registry_address: str = Field("127.0.0.1:8083", description="host:port of the registry's internal listener.")
    metering_address: str = Field("127.0.0.1:8085", description="host:port of metering.")
    scheduler_addresses: CommaList = Field(
        ("127.0.0.1:8086",), description="Schedulers to watch, host:port, comma-separated."
    )
    key_ring: Path = Field(description="File of the ticket key ring, shared with schedulers and metering.")
    submit_s: float = Field(10.0, gt=0, le=60, description="A ticket must be submitted within this, seconds.")
    settle_s: float = Field(86_400.0, gt=0, le=604_800, description="A job must be settled within this, seconds.")
    lookup_timeout_s: float = Field(
        2.0, gt=0, le=10, description="How long a key or balance may take to fetch, seconds."
    )
