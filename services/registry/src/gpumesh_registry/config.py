"""Settings of the registry, from GPUMESH_REGISTRY_*."""

from pathlib import Path

from pydantic import Field, SecretStr

from gpumesh_runtime.config import CommaList, Settings, settings_config


class RegistrySettings(Settings):
    """What the registry needs to know."""

    model_config = settings_config("GPUMESH_REGISTRY_")

    database_url: SecretStr = Field(
        description="PostgreSQL of the registry, postgresql://... Its schema is `registry`."
    )
    database_connections: int = Field(
        8, ge=2, le=100, description="Most connections at once; one of them listens for changes."
    )
    internal_address: str = Field("127.0.0.1:8083", description="host:port of services and operators, mutual TLS.")
    public_address: str = Field("127.0.0.1:8084", description="host:port of enrolment, server TLS.")
    ca_dir: Path = Field(description="Folder with ca.crt and ca.key, which sign nodes' certificates.")
    scheduler_addresses: CommaList = Field(
        (), description="Schedulers that enrolled nodes are told, host:port,host:port."
    )
    lookup_window_ms: float = Field(
        2.0, ge=0.0, le=50.0, description="Key lookups of this long are answered by one query, milliseconds."
    )
