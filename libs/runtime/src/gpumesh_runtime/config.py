"""Configuration from the environment, once, at the start. A wrong variable stops the process with one line that says
what to do.

A service declares one class:

    class RouterSettings(Settings):
        model_config = settings_config("GPUMESH_ROUTER_")
        '''Where the public listener is.'''
        public_address: str = "127.0.0.1:8081"

    settings = RouterSettings.load()
"""

import difflib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gpumesh_runtime.tls import TlsIdentity

EXIT_CONFIG: Final = 78  # EX_CONFIG of sysexits.h: "something was found in an unconfigured or misconfigured state"


class ConfigError(Exception):
    """The environment is wrong. One line per wrong variable."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


# "host:port,host:port" in one variable; empty: none.
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def settings_config(prefix: str) -> SettingsConfigDict:
    """The model_config of a settings class: its environment prefix, for example "GPUMESH_ROUTER_"."""
    return SettingsConfigDict(
        env_prefix=prefix, frozen=True, extra="forbid", env_ignore_empty=False, validate_default=True
    )


class Settings(BaseSettings):
    """What every process has. Subclasses add their own fields and give the prefix by settings_config."""

    model_config = settings_config("GPUMESH_")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal or in development, else JSON."
    )
    tls_cert: Path | None = Field(None, description="This process's certificate, PEM file.")
    tls_key: Path | None = Field(None, description="Its private key, PEM file.")
    tls_ca: Path | None = Field(None, description="The CA that peers must chain to, PEM file.")
    metrics_address: str = Field("", description="host:port of /metrics and /health, loopback only. Empty: none.")
    otlp_endpoint: str = Field(
        "", description="OTLP gRPC endpoint for traces, http(s)://host:port. Empty: no traces leave."
    )
    trace_ratio: float = Field(0.01, ge=0.0, le=1.0, description="Share of requests that the edge samples.")
    development: bool = Field(False, description="Readable logs, gRPC reflection, slower but clearer checks.")
    ready_file: Path | None = Field(
        None, description="Written when the process is ready, removed when it stops. For launchers."
    )
    drain_s: float = Field(
        30.0, ge=0.0, le=600.0, description="How long a drain may take before the process stops anyway, seconds."
    )

    @field_validator("metrics_address")
    @classmethod
    def _metrics_on_loopback(cls, value: str) -> str:
        host = value.rpartition(":")[0]
        # A pod's scraper needs its address: Kubernetes sets 0.0.0.0 on purpose, inside the pod's network policy.
        if value and host not in {"127.0.0.1", "localhost", "[::1]", "0.0.0.0"}:  # noqa: S104 -- compared, not bound
            raise ValueError("must be 127.0.0.1:<port>, localhost:<port> or [::1]:<port>")
        return value

    def tls(self) -> TlsIdentity:
        """This process's certificate. Raises ConfigError naming the variables that are missing or the file that
        cannot be read.
        """
        prefix = self.model_config.get("env_prefix", "")
        missing = [
            f"{prefix}{name.upper()}" for name in ("tls_cert", "tls_key", "tls_ca") if getattr(self, name) is None
        ]
        if missing or self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            raise ConfigError([f"{name}: is not set; give the path of a PEM file" for name in missing])
        try:
            return TlsIdentity(self.tls_cert, self.tls_key, self.tls_ca)
        except OSError as err:
            raise ConfigError([f"{prefix}TLS_*: cannot read {err.filename}: {err.strerror}"]) from None

    @classmethod
    def read(cls, **given: Any) -> Self:
        """Reads the environment; `given` wins over it. Raises ConfigError."""
        prefix = cls.model_config.get("env_prefix", "")
        problems = _unknown(cls, prefix)
        try:
            settings = cls(**given)
        except ValidationError as err:
            raise ConfigError(problems + [_line(prefix, error) for error in err.errors()]) from None
        if problems:
            raise ConfigError(problems)
        return settings

    @classmethod
    def load(cls, **given: Any) -> Self:
        """Like read(), but a wrong environment ends the process: the lines on stderr, exit code 78."""
        try:
            return cls.read(**given)
        except ConfigError as err:
            exit_config(err)


def exit_config(err: ConfigError) -> NoReturn:
    """Ends the process because of its configuration: one line per problem, exit code 78."""
    sys.stderr.write("".join(f"configuration: {line}\n" for line in err.lines))
    raise SystemExit(EXIT_CONFIG)


def _unknown(cls: type[Settings], prefix: str) -> list[str]:
    """One line for each variable with our prefix that no field reads: almost always a misspelling."""
    known = {f"{prefix}{name}".upper() for name in cls.model_fields}
    lines = []
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            lines.append(f"{name}: is not a setting of this process; {hint}")
    return lines


def _line(prefix: str, error: ErrorDetails) -> str:
    """`GPUMESH_X_PORT: Input should be a valid integer; ...` without the value, which may be a secret."""
    name = f"{prefix}{error['loc'][0]}".upper() if error["loc"] else f"{prefix}*"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        message = "is not set; it is required"
    return f"{name}: {message[0].lower() + message[1:]}"
