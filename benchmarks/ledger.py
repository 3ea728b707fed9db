"""Settlement alone: one metering process on a durable PostgreSQL, one scheduler's link that keeps N jobs unsettled at all times.

`make bench-ledger` writes benchmarks/out/ledger.json. Each job is settled, answered and in the end checked: the run fails when the ledger
holds another number of settlements than were answered, or breaks an invariant. CPU is that of the metering process; PostgreSQL's is told
apart. Latency is from sending Settle to reading Settled, the link's background wait (50 ms at most) both ways included.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.tools import report
from benchmarks.tools.cpu import cpu_seconds, family, rss_mb
from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh.metering.v1.ledger_service_pb2 import CheckLedgerRequest, CreditRequest
from gpumesh.metering.v1.ledger_service_pb2_grpc import LedgerServiceStub
from gpumesh.metering.v1.settlement_service_pb2 import Settled, SettlementHello
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import operator_uri, service_uri
from gpumesh_runtime.link import Goodbye, Link, LinkClient, LinkEnd
from gpumesh_runtime.rpc.client import channel
from tests.support.metering import key_ring, settle, ticket
from tests.support.postgres import PostgresServer

SEED = 5
ACCOUNTS = 20
METHOD = "/gpumesh.metering.v1.SettlementService/Connect"
SETTLE = ItemKind.ITEM_KIND_SETTLE


class Scheduler:
    """Keeps `outstanding` jobs unsettled: each answer sends the next job. Receiver of the link."""

    def __init__(self) -> None:
        self.jobs: list[tuple[bytes, bytes]] = []
        self.sent: dict[bytes, float] = {}
        self.latencies: list[float] = []
        self.repeated = 0
        self.done = asyncio.Event()
        self._next = 0

    def start(self, link: Link, jobs: list[tuple[bytes, bytes]], outstanding: int) -> None:
        """Begins a run."""
        self.jobs, self.sent, self.latencies, self._next = jobs, {}, [], 0
        self.done.clear()
        for _ in range(min(outstanding, len(jobs))):
            self._send(link)

    def _send(self, link: Link) -> None:
        job_id, body = self.jobs[self._next]
        self._next += 1
        self.sent[job_id] = time.perf_counter()
        link.send_new(SETTLE, id=job_id, body=body)

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """Nothing to prepare."""

    def on_item(self, link: Link, item: Item) -> None:
        """An answer."""
        self.latencies.append(time.perf_counter() - self.sent[item.id])
        settled = Settled.FromString(item.body)
        if settled.reason:
            raise RuntimeError(settled.reason)
        if self._next < len(self.jobs):
            self._send(link)
        elif len(self.latencies) == len(self.jobs):
            self.done.set()

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The run is over."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """As above."""


def make_jobs(ring: Any, rng: random.Random, count: int) -> list[tuple[bytes, bytes]]:
    """Jobs as a scheduler would send them, of several buyers."""
    made = []
    for _ in range(count):
        job_id = rng.randbytes(16)
        sealed = ticket(ring, job_id, account_id=f"acct_{rng.randrange(ACCOUNTS)}")
        made.append((job_id, settle(sealed, prompt=rng.randrange(1, 120), completion=rng.randrange(1, 500))))
    return made


def start_metering(folder: Path, dsn: str, ca: FileCa) -> tuple[subprocess.Popen[bytes], int]:
    """A metering process; its port."""
    identity = ca.issue_files("metering", service_uri("metering"))
    settings = {
        "DATABASE_URL": dsn,
        "ADDRESS": "127.0.0.1:0",
        "KEY_RING": str(folder / "ring.json"),
        "TLS_CERT": str(identity.cert_file),
        "TLS_KEY": str(identity.key_file),
        "TLS_CA": str(identity.ca_file),
        "READY_FILE": str(folder / "ready"),
        "LOG_LEVEL": "warning",
    }
    env = {**os.environ, **{f"GPUMESH_METERING_{name}": value for name, value in settings.items()}}
    process = subprocess.Popen([sys.executable, "-m", "gpumesh_metering"], env=env)
    end = time.monotonic() + 30
    while not (folder / "ready").exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError("metering did not start")
        time.sleep(0.02)
    return process, int(json.loads((folder / "ready").read_text())["port"])


async def run(folder: Path, server: PostgresServer, loads: list[tuple[int, int]]) -> dict[str, float]:
    """Every load, one after the other: (outstanding, jobs)."""
    ca = FileCa.load_or_create(folder / "ca")
    ring = key_ring(folder)
    rng = random.Random(SEED)
    metering, port = start_metering(folder, server.dsn("postgres"), ca)
    address = f"localhost:{port}"
    figures: dict[str, float] = {}
    seen = Scheduler()
    hello = SettlementHello(scheduler_id="bench").SerializeToString()
    tls = ca.issue_files("scheduler", service_uri("scheduler", "bench"))
    client = LinkClient(address, METHOD, credentials=tls, hello=lambda: hello, receiver=seen)
    running = asyncio.create_task(client.run())
    try:
        async with channel(address, ca.issue_files("operator", operator_uri("bench"))) as operator:
            stub = LedgerServiceStub(operator)
            for at in range(ACCOUNTS):
                request = CreditRequest(account_id=f"acct_{at}", amount_nano_usd=10**15, credit_id=f"c{at}")
                await stub.Credit(request, timeout=10)
            link = await client.up(10)
            total = 0
            for outstanding, count in [(64, 500), *loads]:  # the first warms up
                jobs = make_jobs(ring, rng, count)
                total += count
                before = (cpu_seconds(metering.pid), _family_cpu(server.pid), time.perf_counter())
                seen.start(link, jobs, outstanding)
                async with asyncio.timeout(300):
                    await seen.done.wait()
                after = (cpu_seconds(metering.pid), _family_cpu(server.pid), time.perf_counter())
                if (outstanding, count) in loads:
                    cpu, pg_cpu, wall = (now - then for now, then in zip(after, before, strict=True))
                    figures |= _figures(outstanding, count, cpu, pg_cpu, wall, sorted(seen.latencies))
            verdict = await stub.CheckLedger(CheckLedgerRequest(), timeout=120)
            if verdict.violations or verdict.settlements != total:
                raise RuntimeError(f"{verdict.settlements} of {total} settled; {list(verdict.violations)}")
        figures["metering_rss_mb"] = round(rss_mb(metering.pid), 1)
    finally:
        await client.stop()
        await running
        metering.terminate()
        metering.wait(20)
    return figures


def _family_cpu(pid: int) -> float:
    total = 0.0
    for member in family(pid):
        try:
            total += cpu_seconds(member)
        except OSError:  # a PostgreSQL helper process that has just ended
            continue
    return total


def _figures(
    outstanding: int, count: int, cpu: float, pg_cpu: float, wall: float, latencies: list[float]
) -> dict[str, float]:
    name = f"outstanding_{outstanding}"
    return {
        f"{name}_settlements_per_s": round(count / wall, 1),
        f"{name}_metering_cpu_us": round(cpu / count * 1e6, 2),
        f"{name}_postgres_cpu_us": round(pg_cpu / count * 1e6, 2),
        f"{name}_p50_ms": round(latencies[len(latencies) // 2] * 1e3, 2),
        f"{name}_p99_ms": round(latencies[len(latencies) * 99 // 100] * 1e3, 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=10_000, help="of each load")
    args = parser.parse_args()
    loads = [(32, max(500, args.jobs // 10)), (128, args.jobs // 2), (512, args.jobs), (2048, args.jobs)]
    server = PostgresServer(durable=True).start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = uvloop.run(run(Path(folder), server, loads))
    finally:
        server.remove()
    for name, value in figures.items():
        print(f"{name:44} {value:12,.2f}")
    print(report.write("ledger", figures, command="make bench-ledger", seed=SEED))


if __name__ == "__main__":
    main()
