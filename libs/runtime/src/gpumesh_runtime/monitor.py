"""What a process shows of itself: /metrics, /health and /ready over plain HTTP on loopback, and metrics of the
process itself.

A dozen lines of HTTP of our own: three GET paths for a scraper on the same machine need no framework, which would
cost each process 10 MB.
"""

import asyncio
import gc
import json
import os
import time
from pathlib import Path
from typing import Final

from gpumesh_runtime.health import Health
from gpumesh_runtime.logs import dropped_fields
from gpumesh_runtime.metrics import REGISTRY, Registry

_MAX_REQUEST_BYTES: Final = 8 * 1024
_REQUEST_TIMEOUT_S: Final = 5.0
_LAG_EVERY_S: Final = 1.0
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_STATUS: Final = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


def rss_bytes() -> int:
    """Resident memory of this process, bytes; 0 where /proc is not."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def add_process_metrics(registry: Registry = REGISTRY) -> None:
    """Registers memory, CPU, garbage collection, open files and dropped log fields, all read at scrape."""
    rss = registry.gauge("process_resident_memory_bytes", "Resident memory").cell
    cpu = registry.counter("process_cpu_seconds_total", "User and system CPU time").cell
    files = registry.gauge("process_open_fds", "Open file descriptors").cell
    collections = registry.counter("gpumesh_gc_collections_total", "Garbage collections by generation", ("generation",))
    dropped = registry.counter("gpumesh_log_dropped_fields_total", "Log fields that were not allowed", ("field",))
    registry.gauge("process_start_time_seconds", "Start of the process, Unix time").cell.set(time.time())

    def fill() -> None:
        rss.set(rss_bytes())
        cpu.set(time.process_time())
        try:
            files.set(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 -- counting names needs no Path objects
        except OSError:
            files.set(0)
        for generation, stats in enumerate(gc.get_stats()):
            collections.labels(str(generation)).set(stats["collections"])
        for name, count in dropped_fields().items():
            dropped.labels(name[:64]).set(count)

    registry.before_scrape(fill)


async def watch_loop_lag(registry: Registry = REGISTRY) -> None:
    """Measures for ever how late the event loop runs what is due: the first sign of a callback that blocks."""
    lag = registry.gauge("gpumesh_loop_lag_seconds", "How late the event loop ran its last timer").cell
    worst = registry.gauge("gpumesh_loop_lag_max_seconds", "Largest loop lag since the start").cell
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_EVERY_S
        await asyncio.sleep(_LAG_EVERY_S)
        lag.set(max(0.0, loop.time() - due))
        worst.set(max(worst.value, lag.value))


class Monitor:
    """The HTTP listener. address: "host:port", port 0 takes a free one (see `port`)."""

    def __init__(self, address: str, health: Health, registry: Registry = REGISTRY) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._wanted = host.strip("[]"), int(port)
        self._health = health
        self._registry = registry
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Binds and serves. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._serve, self._host, self._wanted, limit=_MAX_REQUEST_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Closes the listener."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.decode("latin-1").partition(" ")
                status, kind, body = self._answer(method, rest.partition(" ")[0].partition("?")[0])
                writer.write(
                    f"HTTP/1.1 {status} {_STATUS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode("latin-1")
                )
                writer.write(b"" if method == "HEAD" else body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # whoever sends no proper request gets no proper answer
        finally:
            writer.close()

    def _answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        if method not in {"GET", "HEAD"}:
            return 405, "text/plain", b"GET only\n"
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", self._registry.exposition().encode()
        if path == "/health":
            return 200, "application/json", b'{"status":"ok"}\n'
        if path == "/ready":
            problems = self._health.problems()
            body = {"status": "ready"} if not problems else {"status": "not ready", "problems": problems}
            return (503 if problems else 200), "application/json", json.dumps(body).encode() + b"\n"
        return 404, "text/plain", b"/metrics /health /ready\n"
