"""client.json and operator.json, as the launcher writes them."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

DEFAULT_HOME: Final = ".gpumesh"


class ConfigurationError(Exception):
    """A file that tells where the mesh is is missing or wrong. The text says what to do."""


def home() -> Path:
    """$GPUMESH_HOME, else .gpumesh in this folder or the nearest one above it that has one, else ~/.gpumesh."""
    given = os.environ.get("GPUMESH_HOME")
    if given:
        return Path(given).expanduser().absolute()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / DEFAULT_HOME).is_dir():
            return folder / DEFAULT_HOME
    return Path.home() / DEFAULT_HOME


@dataclass(frozen=True, slots=True)
class ClientFile:
    """What a buyer's program needs.

    base_url: of the OpenAI-compatible edge, ends in /v1. grpc_target: host:port of InferenceService, TLS.
    ca_file: PEM of the CA that the server's certificate chains to. model: one that answers.
    """

    base_url: str
    api_key: str = field(repr=False)
    model: str
    grpc_target: str
    ca_file: str

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """Reads a file; by default client.json of the home. Raises ConfigurationError."""
        return cls(**_read(path or home() / "client.json", cls))


@dataclass(frozen=True, slots=True)
class OperatorFile:
    """What operator calls need: addresses (host:port) and the operator's certificate (PEM files)."""

    registry_target: str
    enrolment_target: str
    metering_target: str
    scheduler_targets: tuple[str, ...]
    cert_file: str
    key_file: str
    ca_file: str

    @classmethod
    def load(cls, path: str | Path | None = None) -> Self:
        """Reads a file; by default operator.json of the home. Raises ConfigurationError."""
        values = _read(path or home() / "operator.json", cls)
        values["scheduler_targets"] = tuple(values["scheduler_targets"])
        return cls(**values)


def _read(path: str | Path, kind: type[Any]) -> dict[str, Any]:
    wanted = [item.name for item in fields(kind)]
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} does not exist. Start the mesh (`make up`), or set GPUMESH_HOME to the folder of one that runs."
        ) from None
    except (OSError, ValueError) as err:
        raise ConfigurationError(f"{path} cannot be read: {err}") from err
    missing = [name for name in wanted if not isinstance(content, dict) or name not in content]
    if missing:
        raise ConfigurationError(f"{path} lacks {', '.join(missing)}. Start the mesh again to have it written anew.")
    return {name: content[name] for name in wanted}
