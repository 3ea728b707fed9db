"""The edge's settings, from GPUMESH_EDGE_HTTP_* variables."""

import ipaddress
import ssl
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from gpumesh_edge_http.limits import Limits
from gpumesh_runtime.config import CommaList, ConfigError, Settings, settings_config


class EdgeSettings(Settings):
    """Everything that can be set on an edge. The TLS_* fields are its identity inside the mesh; HTTP_TLS_* is what clients see."""

    model_config = settings_config("GPUMESH_EDGE_HTTP_")

    edge_id: str = Field(
        "edge-0", min_length=1, max_length=64, description="This replica's name, for the logs of others."
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. One that is not loopback needs HTTP_TLS_CERT and HTTP_TLS_KEY."
    )
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    http_tls_cert: Path | None = Field(
        None, description="Certificate shown to clients, PEM file. Empty: plain HTTP, loopback only."
    )
    http_tls_key: Path | None = Field(None, description="Its private key, PEM file.")
    router_addresses: CommaList = Field(
        ("127.0.0.1:8082",), min_length=1, description="Routers, host:port, comma-separated."
    )
    deadline_s: float = Field(
        600.0, ge=1.0, le=3600.0, description="A whole answer must be there within this, seconds."
    )
    max_body_bytes: int = Field(8 << 20, ge=1024, le=8 << 20, description="Largest request body, bytes.")
    max_connections: int = Field(10_000, ge=1, le=1_000_000, description="Most clients connected at once.")
    max_jobs: int = Field(20_000, ge=1, le=1_000_000, description="Most requests running at once.")
    header_timeout_s: float = Field(
        10.0, gt=0, le=120, description="A request's head must be complete within this, seconds."
    )
    body_grace_s: float = Field(
        5.0, ge=0, le=60, description="A body may take this long before it must come at 1 KiB/s, seconds."
    )
    idle_timeout_s: float = Field(75.0, gt=0, le=3600, description="Idle connections are closed after this, seconds.")
    write_stall_s: float = Field(
        30.0, gt=0, le=600, description="A client that reads nothing for this long is cut off, seconds."
    )
    keep_alive_comment_s: float = Field(
        10.0, gt=0, le=60, description="Comments on waiting streams come this often, seconds."
    )
    auth_failures_burst: float = Field(
        30.0, ge=1, description="Failed authentications of one address before it must wait."
    )
    auth_failures_per_s: float = Field(
        1.0, gt=0, description="Failed authentications that one address may make a second after that."
    )

    @model_validator(mode="after")
    def _plain_http_on_loopback_only(self) -> Self:
        if (self.http_tls_cert is None) != (self.http_tls_key is None):
            raise ValueError("HTTP_TLS_CERT and HTTP_TLS_KEY belong together: set both or neither")
        if self.http_tls_cert is None and not _is_loopback(self.host):
            raise ValueError(
                "HOST is not loopback: set HTTP_TLS_CERT and HTTP_TLS_KEY, plain HTTP stays on this machine"
            )
        return self

    def limits(self) -> Limits:
        """The bounds of the HTTP side."""
        return Limits(
            max_body_bytes=self.max_body_bytes,
            header_timeout_s=self.header_timeout_s,
            body_grace_s=self.body_grace_s,
            write_stall_s=self.write_stall_s,
            idle_timeout_s=self.idle_timeout_s,
            max_connections=self.max_connections,
            keep_alive_comment_s=self.keep_alive_comment_s,
        )

    def http_tls(self) -> ssl.SSLContext | None:
        """What clients see; None: plain HTTP. Raises ConfigError when the files cannot be used."""
        if self.http_tls_cert is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.http_tls_cert, self.http_tls_key)
        except (OSError, ssl.SSLError) as err:
            raise ConfigError([f"GPUMESH_EDGE_HTTP_HTTP_TLS_CERT: cannot use {self.http_tls_cert}: {err}"]) from None
        return context


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
