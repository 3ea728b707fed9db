"""What can be asked of `gpumesh-local up`, from flags and the environment."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpumesh_client.files import DEFAULT_HOME, home
from gpumesh_client.money import parse_usd
from gpumesh_local.errors import EXIT_USAGE, LocalError

DEFAULT_PORT: Final = 8080
_LAST_OFFSET: Final = 80  # every port of one mesh is below http_port + this
MAX_NODES: Final = 32
MAX_SCHEDULERS: Final = 4


@dataclass(frozen=True)
class Options:
    """One mesh on one machine. Prices and credit in nano-USD; prices per 1,000,000 tokens.

    engine: "tiny" (the shipped model), "mock", or "openai" with engine_url. environment: of the person who starts it;
    GPUMESH_<SERVICE>_* in it win over what the launcher would set.
    """

    home: Path
    http_port: int
    environment: Mapping[str, str]
    detach: bool = False
    nodes: int = 1
    schedulers: int = 1
    engine: str = "tiny"
    engine_url: str = ""
    model: str = "gpumesh-tiny"
    slots: int = 0
    input_nano_usd: int = 0
    output_nano_usd: int = 0
    credit_nano_usd: int = 0
    metrics: bool = True
    json: bool = False
    status_fd: int = -1

    def port(self, offset: int) -> int:
        """The port `offset` above the HTTP port."""
        return self.http_port + offset


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="gpumesh-local", description="A whole gpumesh on this machine.")
    commands = top.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start it (in the foreground; Ctrl-C ends it)")
    up.add_argument("--detach", action="store_true", help="return once it answers; `down` ends it")
    up.add_argument("--nodes", type=int, default=1, help="number of nodes")
    up.add_argument("--schedulers", type=int, default=1, help="number of scheduler replicas")
    up.add_argument(
        "--engine", default="tiny", help="tiny (the shipped model), mock, or openai:URL of an OpenAI-compatible server"
    )
    up.add_argument("--model", default="", help="catalogue id of the model; required with openai:URL")
    up.add_argument(
        "--slots", type=int, default=0, help="jobs at once per node (0: 2 for tiny, 8 for mock, 64 for openai)"
    )
    up.add_argument("--input-price", default="0.05", help="USD per 1,000,000 prompt tokens")
    up.add_argument("--output-price", default="0.20", help="USD per 1,000,000 output tokens")
    up.add_argument("--credit", default="10", help="USD that the local account starts with")
    up.add_argument("--no-metrics", dest="metrics", action="store_false", help="no Prometheus /metrics on loopback")
    up.add_argument("--status-fd", type=int, default=-1, help=argparse.SUPPRESS)
    down = commands.add_parser("down", help="drain and end it")
    for command in (up, down):
        command.add_argument("--json", action="store_true", help="for programs: client.json on stdout when it answers")
    return top


def folder(environment: Mapping[str, str]) -> Path:
    """GPUMESH_HOME; else a .gpumesh here or above that exists; else .gpumesh here."""
    if environment.get("GPUMESH_HOME"):
        return Path(environment["GPUMESH_HOME"]).expanduser().absolute()
    found = home()
    return found if found.is_dir() else Path.cwd() / DEFAULT_HOME


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[str, Options]:
    """("up" or "down", options). Raises LocalError for what cannot be done; argparse itself exits with 2."""
    given = parser().parse_args(arguments)
    port = _http_port(environment.get("GPUMESH_HTTP_PORT", ""))
    if given.command == "down":
        return "down", Options(folder(environment), port, environment, json=given.json)
    engine, _, url = given.engine.partition(":")
    if engine not in ("tiny", "mock", "openai") or (engine == "openai") != bool(url):
        raise LocalError(f"--engine {given.engine}: give tiny, mock or openai:http://host:port", EXIT_USAGE)
    if engine == "openai" and not given.model:
        raise LocalError("--engine openai:URL needs --model, the name that the engine knows the model by", EXIT_USAGE)
    for name, value, most in (("nodes", given.nodes, MAX_NODES), ("schedulers", given.schedulers, MAX_SCHEDULERS)):
        if not 1 <= value <= most:
            raise LocalError(f"--{name} must be 1 to {most}", EXIT_USAGE)
    try:
        prices = [parse_usd(text) for text in (given.input_price, given.output_price, given.credit)]
    except ValueError as err:
        raise LocalError(str(err), EXIT_USAGE) from None
    return "up", Options(
        home=folder(environment),
        http_port=port,
        environment=environment,
        detach=given.detach,
        nodes=given.nodes,
        schedulers=given.schedulers,
        engine=engine,
        engine_url=url,
        model=given.model or {"tiny": "gpumesh-tiny", "mock": "mock-model"}[engine],
        slots=given.slots or {"tiny": 2, "mock": 8, "openai": 64}[engine],
        input_nano_usd=prices[0],
        output_nano_usd=prices[1],
        credit_nano_usd=prices[2],
        metrics=given.metrics,
        json=given.json,
        status_fd=given.status_fd,
    )


def _http_port(text: str) -> int:
    """GPUMESH_HTTP_PORT, or 8080."""
    if not text:
        return DEFAULT_PORT
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65_535 - _LAST_OFFSET):
        raise LocalError(f"GPUMESH_HTTP_PORT={text}: give a port from 1 to {65_535 - _LAST_OFFSET}", EXIT_USAGE)
    return int(text)
