"""A closed-loop load generator over raw asyncio protocols: keep-alive connections, each sends its next request when the last is answered.

    python -m benchmarks.tools.load PORT CONNECTIONS SECONDS BODY_FILE [--key KEY] [--spread-ms MS]

Prints one JSON line: requests, errors, events (SSE), seconds, and p50 / p99 of the whole answer and of the first body byte, milliseconds.
--spread-ms: the connections' first requests start over this time rather than in the same instant, so that streams are not in lock-step.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import cast

import uvloop


class Tally:
    """What all connections saw."""

    def __init__(self) -> None:
        self.total_s: list[float] = []
        self.first_s: list[float] = []
        self.events = 0
        self.errors: dict[str, int] = {}

    def error(self, what: str) -> None:
        """Counts one failure."""
        self.errors[what] = self.errors.get(what, 0) + 1


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, request: bytes, deadline: float, tally: Tally, done: asyncio.Future[None]) -> None:
        self._request = request
        self._deadline = deadline
        self._tally = tally
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._in_body = False
        self._chunked = False
        self._left = 0
        self._tail = b""
        self._ok = True
        self._started = 0.0
        self._first = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but class

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._tally.error("connection lost")
            self._done.set_result(None)

    def start(self) -> None:
        """Sends the next request, or ends when time is up."""
        assert self._transport is not None
        if time.monotonic() >= self._deadline:
            self._done.set_result(None)
            self._transport.close()
            return
        self._head, self._in_body, self._tail, self._first = b"", False, b"", 0.0
        self._started = time.monotonic()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._in_body:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[:end].lower(), self._head[end + 4 :]
            self._in_body = True
            self._ok = head.startswith(b"http/1.1 200")
            if not self._ok:
                self._tally.error(head.split(b"\r\n", 1)[0].decode() + " " + data[:200].decode(errors="replace"))
            self._chunked = b"transfer-encoding: chunked" in head
            at = head.find(b"content-length:")
            self._left = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if not data and (self._chunked or self._left):
                return
        if self._first == 0.0 and data:
            self._first = time.monotonic()
        if self._chunked:
            seam = self._tail[-1:] + data  # an event may end across two reads
            self._tally.events += seam.count(b"\n\n")
            self._tail = (self._tail + data)[-64:]
            if self._tail.endswith(b"0\r\n\r\n"):
                self._finish(b"[DONE]" in self._tail)
        else:
            self._left -= len(data)
            if self._left <= 0:
                self._finish(True)

    def _finish(self, complete: bool) -> None:
        now = time.monotonic()
        if self._ok and complete:
            self._tally.total_s.append(now - self._started)
            self._tally.first_s.append(self._first - self._started)
        elif self._ok:
            self._tally.error("stream without [DONE]")
        self.start()


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] * 1000 if values else float("nan")


async def run(port: int, connections: int, seconds: float, body: bytes, key: str, spread_s: float) -> dict[str, object]:
    """Runs the load and returns the figures."""
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    loop = asyncio.get_running_loop()
    tally = Tally()
    begun = time.monotonic()
    dones = []
    for index in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        dones.append(done)
        deadline = begun + spread_s + seconds

        def make(done: asyncio.Future[None] = done, deadline: float = deadline) -> Client:
            return Client(request, deadline, tally, done)

        _, client = await loop.create_connection(make, "127.0.0.1", port)
        loop.call_at(loop.time() + spread_s * index / connections, client.start)
    await asyncio.wait_for(asyncio.gather(*dones), spread_s + seconds + 60)
    return {
        "requests": len(tally.total_s),
        "errors": sum(tally.errors.values()),
        "error_kinds": tally.errors,
        "events": tally.events,
        "seconds": time.monotonic() - begun,
        "p50_ms": _percentile(tally.total_s, 0.5),
        "p99_ms": _percentile(tally.total_s, 0.99),
        "first_p50_ms": _percentile(tally.first_s, 0.5),
        "first_p99_ms": _percentile(tally.first_s, 0.99),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("body", type=Path)
    parser.add_argument("--key", default="none")
    parser.add_argument("--spread-ms", type=float, default=0.0)
    args = parser.parse_args()
    figures = uvloop.run(
        run(args.port, args.connections, args.seconds, args.body.read_bytes(), args.key, args.spread_ms / 1000)
    )
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
