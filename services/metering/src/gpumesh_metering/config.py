"""Metering's settings, from the environment: GPUMESH_METERING_<FIELD>. Read once, at the start."""

from pathlib import Path

from pydantic import Field, SecretStr

from gpumesh_runtime.config import Settings, settings_config


class MeteringSettings(Settings):
    """What metering needs to know. See Settings for what every process has."""

    model_config = settings_config("GPUMESH_METERING_")

    database_url: SecretStr = Field(
        description="postgresql://user@host/database; a unix socket as ?host=/folder. The schema `metering` is made in it."
    )
    address: str = Field(
        "127.0.0.1:8085", description="host:port of the mTLS listener, for schedulers, routers and operators."
    )
    key_ring: Path = Field(description="Key ring file that routers seal tickets with, JSON.")
    instance: str = Field(
        "metering", description="Name of this process, for logs of others.", min_length=1, max_length=63
    )
    provider_share_percent: float = Field(
        80.0,
        ge=0,
        le=100,
        description="What providers get of each charge, per cent, to two decimals; the rest is the fee.",
    )
    park_s: float = Field(600.0, gt=0, description="How long a receipt waits for its delivered record, seconds.")
    database_wait_s: float = Field(
        600.0, gt=0, description="How long the start waits for PostgreSQL before the process gives up, seconds."
    )

    @property
    def share_bp(self) -> int:
        """The providers' share in 1/100 %."""
        return round(self.provider_share_percent * 100)
