"""Which processes run, with which arguments, environment and ports. Pure: nothing is started here."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gpumesh_local.home import Home
from gpumesh_local.model import Shipped
from gpumesh_local.options import Options
from gpumesh_runtime.environment import PROCESS_ENVIRONMENT

HOST: Final = "127.0.0.1"
# Offsets from GPUMESH_HTTP_PORT.
EDGE: Final = 0
ROUTER_PUBLIC: Final = 1
ROUTER_INTERNAL: Final = 2
REGISTRY_INTERNAL: Final = 3
REGISTRY_PUBLIC: Final = 4
METERING: Final = 5
SCHEDULER: Final = 6
POSTGRES: Final = 7
_REPLICA_STEP: Final = 10
_FIRST_METRICS: Final = 20
# How long running jobs may take after `down`, seconds. Then they are cut.
_DRAIN_S: Final = 20
# Beyond its drain a process gets this long before it is killed, seconds.
_KILL_AFTER_S: Final = 10
# Which GPUMESH_<...>_ variables of the person's environment go to which process.
PREFIXES: Final = {
    "registry": "GPUMESH_REGISTRY_",
    "metering": "GPUMESH_METERING_",
    "router": "GPUMESH_ROUTER_",
    "scheduler": "GPUMESH_SCHEDULER_",
    "edge-http": "GPUMESH_EDGE_HTTP_",
    "node": "GPUMESH_NODE_",
}
# GPUMESH_<...> in the person's environment that every process gets.
_FOR_ALL: Final = ("LOG_LEVEL", "LOG_FORMAT", "OTLP_ENDPOINT", "TRACE_RATIO", "DEVELOPMENT")
# The order in which they are told to stop: first who takes new work in, last who keeps the books.
STOP_ORDER: Final = ("edge-http", "router", "scheduler", "node", "metering", "registry", "postgres")


def node_name(number: int) -> str:
    """Of the node's process and folder: "node", "node-2", ..."""
    return "node" if number == 0 else f"node-{number + 1}"


@dataclass(frozen=True)
class Process:
    """One process. kind: which program; name: for its log and pid file ("scheduler-2"). grace_s: before it is killed."""

    name: str
    kind: str
    command: list[str]
    environment: Mapping[str, str] = field(repr=False)  # holds the database's password
    grace_s: float = _DRAIN_S + _KILL_AFTER_S
    # SIGINT is PostgreSQL's fast shutdown; its SIGTERM waits for clients to leave by themselves.
    interrupt: bool = False
    popen: Mapping[str, Any] = field(default_factory=dict)


class Plan:
    """All processes of one mesh."""

    def __init__(self, options: Options, home: Home, shipped: Shipped, database_url: str) -> None:
        self.options = options
        self.home = home
        self._shipped = shipped
        self.database_url = database_url
        self._metrics = iter(self._free_metrics_ports())

    # --- addresses --------------------------------------------------------------------------------------------------

    def address(self, offset: int) -> str:
        """127.0.0.1:port."""
        return f"{HOST}:{self.options.port(offset)}"

    @property
    def base_url(self) -> str:
        """Of the OpenAI-compatible API."""
        return f"http://{self.address(EDGE)}/v1"

    @property
    def schedulers(self) -> list[str]:
        """Addresses of all replicas."""
        return [self.address(SCHEDULER + _REPLICA_STEP * number) for number in range(self.options.schedulers)]

    def ports(self) -> dict[int, str]:
        """Every port that must be free, and for what."""
        names = {
            EDGE: "HTTP API",
            ROUTER_PUBLIC: "gRPC API",
            ROUTER_INTERNAL: "router",
            REGISTRY_INTERNAL: "registry",
            REGISTRY_PUBLIC: "node enrolment",
            METERING: "metering",
            POSTGRES: "PostgreSQL",
        }
        names |= {SCHEDULER + _REPLICA_STEP * number: "scheduler" for number in range(self.options.schedulers)}
        if self.options.metrics:
            count = 4 + self.options.schedulers + self.options.nodes
            names |= dict.fromkeys(self._free_metrics_ports()[:count], "metrics")
        return {self.options.port(offset): name for offset, name in names.items()}

    def _free_metrics_ports(self) -> list[int]:
        taken = {SCHEDULER + _REPLICA_STEP * number for number in range(self.options.schedulers)}
        return [offset for offset in range(_FIRST_METRICS, _FIRST_METRICS + 60) if offset not in taken]

    # --- processes --------------------------------------------------------------------------------------------------

    def services(self) -> list[Process]:
        """The five services, in no particular order: any start order works."""
        found = [self._registry(), self._metering(), self._router(), self._edge()]
        return found + [self._scheduler(number) for number in range(self.options.schedulers)]

    def _process(self, kind: str, number: int, module: str, settings: Mapping[str, object]) -> Process:
        name = kind if number == 0 else f"{kind}-{number + 1}"
        prefix = PREFIXES[kind]
        ours: dict[str, object] = {"READY_FILE": self.home.ready(name), "DRAIN_S": _DRAIN_S, **settings}
        if self.options.metrics:
            ours["METRICS_ADDRESS"] = self.address(next(self._metrics))
        given = self.options.environment
        ours |= {key: given[f"GPUMESH_{key}"] for key in _FOR_ALL if f"GPUMESH_{key}" in given}
        environment = dict(PROCESS_ENVIRONMENT)
        environment |= {key: value for key, value in given.items() if not key.startswith("GPUMESH_")}
        environment |= {f"{prefix}{key}": str(value) for key, value in ours.items()}
        environment |= {key: value for key, value in given.items() if key.startswith(prefix)}
        return Process(name, kind, [sys.executable, "-m", module], environment)

    def _tls(self, name: str) -> dict[str, object]:
        stem = self.home.tls / name
        return {"TLS_CERT": f"{stem}.crt", "TLS_KEY": f"{stem}.key", "TLS_CA": self.home.tls / "ca.crt"}

    @property
    def _key_ring(self) -> str:
        return str(self.home.secrets / "tickets.json")

    def _registry(self) -> Process:
        settings = {
            **self._tls("registry"),
            "DATABASE_URL": self.database_url,
            "INTERNAL_ADDRESS": self.address(REGISTRY_INTERNAL),
            "PUBLIC_ADDRESS": self.address(REGISTRY_PUBLIC),
            "CA_DIR": self.home.tls,
            "SCHEDULER_ADDRESSES": ",".join(self.schedulers),
        }
        return self._process("registry", 0, "gpumesh_registry", settings)

    def _metering(self) -> Process:
        settings = {
            **self._tls("metering"),
            "DATABASE_URL": self.database_url,
            "ADDRESS": self.address(METERING),
            "KEY_RING": self._key_ring,
        }
        return self._process("metering", 0, "gpumesh_metering", settings)

    def _router(self) -> Process:
        settings = {
            **self._tls("router"),
            "PUBLIC_ADDRESS": self.address(ROUTER_PUBLIC),
            "INTERNAL_ADDRESS": self.address(ROUTER_INTERNAL),
            "REGISTRY_ADDRESS": self.address(REGISTRY_INTERNAL),
            "METERING_ADDRESS": self.address(METERING),
            "SCHEDULER_ADDRESSES": ",".join(self.schedulers),
            "KEY_RING": self._key_ring,
        }
        return self._process("router", 0, "gpumesh_router", settings)

    def _edge(self) -> Process:
        settings = {
            **self._tls("edge"),
            "HOST": HOST,
            "PORT": self.options.port(EDGE),
            "ROUTER_ADDRESSES": self.address(ROUTER_INTERNAL),
        }
        return self._process("edge-http", 0, "gpumesh_edge_http", settings)

    def _scheduler(self, number: int) -> Process:
        settings = {
            **self._tls(f"scheduler-{number}"),
            "SCHEDULER_ID": f"scheduler-{number}",
            "LISTEN_ADDRESS": self.schedulers[number],
            "SCHEDULER_ADDRESSES": ",".join(self.schedulers[:number] + self.schedulers[number + 1 :]),
            "REGISTRY_ADDRESS": self.address(REGISTRY_INTERNAL),
            "METERING_ADDRESS": self.address(METERING),
            "KEY_RING": self._key_ring,
        }
        return self._process("scheduler", number, "gpumesh_scheduler", settings)

    def node(self, number: int, token: str) -> Process:
        """A node. token: empty when it has a certificate."""
        name = node_name(number)
        first = number % len(self.schedulers)  # nodes are spread over the replicas, and each knows the others
        settings: dict[str, object] = {
            "STATE_DIR": self.home.node(name),
            "REGISTRY_ADDRESS": self.address(REGISTRY_PUBLIC),
            "CA_FILE": self.home.tls / "ca.crt",
            "SCHEDULER_ADDRESSES": ",".join(self.schedulers[first:] + self.schedulers[:first]),
            "ENGINES": json.dumps([self.engine()]),
            # A few nodes on the machine of their scheduler: no crowd to spread, whatever the scheduler advises.
            "RECONNECT_MIN_S": "0.1",
            "RECONNECT_MAX_S": "0.5",
        }
        if token:
            settings["ENROLMENT_TOKEN"] = token
        return self._process("node", number, "gpumesh_node", settings)

    def engine(self) -> dict[str, Any]:
        """One entry of GPUMESH_NODE_ENGINES."""
        options = self.options
        if options.engine == "tiny":
            return {
                "kind": "llamacpp",
                "model_id": options.model,
                "revision": self._shipped.revision,
                "quantisation": self._shipped.quantisation,
                "path": str(self._shipped.weights),
                "slots": options.slots,
                "context_tokens": self._shipped.context_tokens,
            }
        if options.engine == "mock":
            return {
                "kind": "mock",
                "model_id": options.model,
                "revision": "1",
                "slots": options.slots,
                "context_tokens": 32_768,  # the catalogue takes it from here: both must say the same
            }
        model = {"model_id": options.model, "revision": "1"}
        return {
            "kind": "openai",
            "base_url": options.engine_url,
            "models": {options.model: model},
            "slots": options.slots,
        }

    @property
    def model_revision(self) -> str:
        """Revision in the catalogue, the same as the engine's."""
        return str(self.engine().get("revision", "1"))
