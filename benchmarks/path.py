"""The whole path against a bare aiohttp proxy in the same run: `make bench` -> benchmarks/out/bench.json.

Starts a mesh of its own (embedded PostgreSQL, all five services, one node whose engine is a plain fast HTTP mock behind
the OpenAI-compatible adapter) and a bare aiohttp proxy before the same engine, and drives both in interleaved rounds.
Figures are medians over the rounds of work per CPU-second: ours counts edge, router, scheduler, metering and registry
together; node and PostgreSQL are reported apart. Generator and engine run on the first CPU, whatever is measured on the
last. Every request is authenticated, traced at the default sampling ratio
and settled in PostgreSQL: the run fails when committed settlements differ from successful answers.
"""

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import asyncpg

from benchmarks.tools import report
from benchmarks.tools.cpu import cpu_seconds, family, rss_mb
from benchmarks.tools.engine import MODEL

GENERATOR: Final = 0
MEASURED: Final = -1
SERVICES: Final = ("edge-http", "router", "scheduler", "metering", "registry")
STREAM_TOKENS: Final = 100
TOKEN_GAP_US: Final = 10_000  # 100 tokens/s a stream
STREAM_S: Final = STREAM_TOKENS * TOKEN_GAP_US / 1e6
_BIN: Final = Path(sys.executable).parent
_UNARY: Final = {
    "messages": [{"role": "user", "content": "Say something short about meshes, foxes and dogs."}],
    "max_tokens": 16,
}
_STREAM: Final = {
    "messages": [{"role": "user", "content": "Say something long about meshes."}],
    "max_tokens": STREAM_TOKENS,
    "seed": TOKEN_GAP_US,
    "stream": True,
}


@dataclass(frozen=True)
class Scenario:
    """One kind of load."""

    name: str
    connections: int
    seconds: float
    streaming: bool = False
    spread_s: float = 0.0


SCENARIOS: Final = (
    Scenario("unary1", 1, 2.0),
    Scenario("unary32", 32, 3.0),
    Scenario("unary128", 128, 3.0),
    Scenario("ttft32", 32, 3.0, streaming=True, spread_s=STREAM_S),
    Scenario("chunks_spread", 128, 4.0, streaming=True, spread_s=STREAM_S),
    Scenario("chunks", 128, 4.0, streaming=True),
)
WARM_UP: Final = Scenario("warm-up", 32, 1.0)


@dataclass
class Target:
    """Something that is measured: a port, a key, a model name, and the processes whose CPU counts, by name."""

    name: str
    port: int
    key: str
    model: str
    pids: dict[str, list[int]] = field(default_factory=dict)


def _free_port(span: int = 1) -> int:
    """A port whose `span` successors are free too."""
    for port in range(20_000, 32_000, 64):
        try:
            for offset in range(span):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port + offset))
        except OSError:
            continue
        return port
    raise RuntimeError("no free ports on loopback")


def _wait_port(port: int, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nothing listens on port {port}")


@contextmanager
def _on(cpu: int) -> Iterator[None]:
    """What is started within runs on that CPU alone: generator and engine on the first, whatever is measured on the last."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(before)[cpu]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _tool(module: str, port: int, *args: str, cpu: int) -> Iterator[int]:
    with _on(cpu):
        process = subprocess.Popen([sys.executable, "-m", f"benchmarks.tools.{module}", str(port), *args])
    try:
        _wait_port(port)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def _mesh(engine_port: int) -> Iterator[tuple[Target, str]]:
    """A mesh of its own; yields it and the database's URL."""
    home = Path(tempfile.mkdtemp(prefix="gpumesh-bench-"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("GPUMESH_")}
    env |= {"GPUMESH_HOME": str(home), "GPUMESH_HTTP_PORT": str(_free_port(40))}
    launcher = str(_BIN / "gpumesh-local")
    try:
        engine = ["--engine", f"openai:http://127.0.0.1:{engine_port}", "--model", MODEL, "--slots", "256"]
        with _on(MEASURED):
            subprocess.run([launcher, "up", "--detach", *engine], env=env, stdout=subprocess.DEVNULL, check=True)
        client = json.loads((home / "client.json").read_text())
        operator = json.loads((home / "operator.json").read_text())
        pids = {path.stem: int(path.read_text()) for path in (home / "pids").glob("*.pid") if path.stem != "launcher"}
        port = int(client["base_url"].split(":")[2].split("/")[0])
        target = Target(
            "mesh", port, client["api_key"], client["model"], {name: family(pid) for name, pid in pids.items()}
        )
        yield target, operator["database_url"]
    finally:
        subprocess.run([launcher, "down"], env=env, check=False)
        shutil.rmtree(home, ignore_errors=True)


def _cpu(target: Target) -> dict[str, float]:
    return {name: sum(cpu_seconds(pid) for pid in pids) for name, pids in target.pids.items()}


def _drive(target: Target, scenario: Scenario, seconds: float) -> dict[str, Any]:
    """Runs one load against one target; returns its figures and the CPU seconds by process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as body:
        json.dump({**(_STREAM if scenario.streaming else _UNARY), "model": target.model}, body)
        body.flush()
        command = [
            sys.executable,
            "-m",
            "benchmarks.tools.load",
            str(target.port),
            str(scenario.connections),
            str(seconds),
            body.name,
        ]
        command += ["--key", target.key, "--spread-ms", str(scenario.spread_s * 1000)]
        before = _cpu(target)
        with _on(GENERATOR):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = _cpu(target)
    figures: dict[str, Any] = json.loads(done.stdout)
    figures["cpu"] = {name: after[name] - before[name] for name in after}
    if figures["errors"]:
        raise RuntimeError(f"{target.name} {scenario.name}: {figures['error_kinds']}")
    return figures


def _counted_cpu(target: Target, cpu: dict[str, float]) -> float:
    return sum(seconds for name, seconds in cpu.items() if target.name != "mesh" or name in SERVICES)


async def _settled(database_url: str) -> int:
    connection = await asyncpg.connect(database_url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM metering.settlements WHERE outcome = 1"))
    finally:
        await connection.close()


def _await_settled(database_url: str, expected: int, timeout_s: float = 60.0) -> int:
    """Waits until that many settlements are committed; returns how many are."""
    deadline = time.monotonic() + timeout_s
    while (settled := asyncio.run(_settled(database_url))) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return settled


def _work(figures: dict[str, Any], scenario: Scenario) -> float:
    return float(figures["events"] if scenario.streaming else figures["requests"])


def run(rounds: int, scale: float, only: str) -> dict[str, float]:
    """Runs everything; returns the figures."""
    scenarios = [s for s in SCENARIOS if not only or s.name in only.split(",")]
    engine_port = _free_port(2)
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with (
        _tool("engine", engine_port, cpu=GENERATOR),
        _tool("proxy", engine_port + 1, f"http://127.0.0.1:{engine_port}", cpu=MEASURED) as proxy_pid,
        _mesh(engine_port) as (mesh, database_url),
    ):
        proxy = Target("proxy", engine_port + 1, "none", mesh.model, {"proxy": [proxy_pid]})
        direct = Target("direct", engine_port, "none", mesh.model)
        time.sleep(1.0)
        rest = {name: max(rss_mb(pid) for pid in pids) for name, pids in mesh.pids.items()}
        before = _await_settled(database_url, 0)
        _drive(proxy, WARM_UP, WARM_UP.seconds)
        answered = _drive(mesh, WARM_UP, WARM_UP.seconds)["requests"]
        for number in range(rounds):
            for scenario in scenarios:
                for target in (proxy, mesh, direct):
                    if target is direct and scenario.name not in ("unary1", "ttft32"):
                        continue
                    figures = _drive(target, scenario, scenario.seconds * scale)
                    answered += figures["requests"] if target is mesh else 0
                    seen.setdefault((target.name, scenario.name), []).append(figures)
                    _tell(number, target, scenario, figures)
        settled = _await_settled(database_url, before + answered) - before
        if settled != answered:
            raise RuntimeError(f"{answered} successful answers but {settled} settlements committed")
        print(f"settlements committed: {settled} for {answered} successful answers")
        return {
            **_figures(seen, scenarios, proxy, mesh),
            **_memory(rest),
            "answers": answered,
            "settlements": settled,
            "rounds": rounds,
        }


def _tell(number: int, target: Target, scenario: Scenario, figures: dict[str, Any]) -> None:
    cpu = _counted_cpu(target, figures["cpu"])
    each = " ".join(f"{name}={seconds:.2f}" for name, seconds in sorted(figures["cpu"].items()) if seconds >= 0.01)
    rate = f"{_work(figures, scenario) / cpu:8.0f}/cpu-s" if cpu else " " * 14
    times = f"p50 {figures['p50_ms']:8.2f} ms  first {figures['first_p50_ms']:7.2f} ms"
    print(f"round {number + 1} {scenario.name:14s} {target.name:7s} {rate}  {times}  {each}", flush=True)


def _figures(
    seen: dict[tuple[str, str], list[dict[str, Any]]], scenarios: list[Scenario], proxy: Target, mesh: Target
) -> dict[str, float]:
    """Medians over rounds; a ratio is the median of the rounds' ratios."""
    out: dict[str, float] = {}
    names = {
        "unary32": "unary_vs_aiohttp",
        "unary128": "unary128_vs_aiohttp",
        "chunks_spread": "chunks_spread_vs_aiohttp",
        "chunks": "chunks_vs_aiohttp",
    }
    for scenario in scenarios:
        ours, theirs = seen["mesh", scenario.name], seen["proxy", scenario.name]
        if scenario.name in names:
            rates = [(_work(f, scenario) / _counted_cpu(mesh, f["cpu"])) for f in ours]
            base = [(_work(f, scenario) / _counted_cpu(proxy, f["cpu"])) for f in theirs]
            out[names[scenario.name]] = statistics.median(a / b for a, b in zip(rates, base, strict=True))
            out[f"{scenario.name}_per_cpu_s"] = statistics.median(rates)
            out[f"{scenario.name}_aiohttp_per_cpu_s"] = statistics.median(base)
            for name in (*SERVICES, "node", "postgres"):
                us = [f["cpu"].get(name, 0.0) / _work(f, scenario) * 1e6 for f in ours]
                out[f"{scenario.name}_{name.replace('-', '_')}_us"] = statistics.median(us)
        elif scenario.name == "unary1":
            out["added_p50_ms"] = statistics.median(
                a["p50_ms"] - b["p50_ms"] for a, b in zip(ours, seen["direct", "unary1"], strict=True)
            )
        elif scenario.name == "ttft32":
            pairs = zip(ours, seen["direct", "ttft32"], strict=True)
            out["added_ttft_p50_ms"] = statistics.median(a["first_p50_ms"] - b["first_p50_ms"] for a, b in pairs)
    return out


def _memory(rest: dict[str, float]) -> dict[str, float]:
    out = {f"rss_{name.replace('-', '_')}_mb": mb for name, mb in rest.items() if name in (*SERVICES, "node")}
    return {**out, "rss_max_mb": max(mb for name, mb in rest.items() if name in SERVICES)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies each load's seconds")
    parser.add_argument("--only", default="", help="comma-separated scenarios")
    args = parser.parse_args()
    figures = run(args.rounds, args.scale, args.only)
    path = report.write("bench", figures, command="make bench", seed=TOKEN_GAP_US)
    for name, value in figures.items():
        print(f"  {name:32s} {value:10.3f}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
