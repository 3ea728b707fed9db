"""The link alone, two processes over loopback mTLS: items per CPU-second of both processes together.

`make bench-link` writes benchmarks/out/link.json. In the same run: a plain grpc.aio stream that carries one message per item, and unary
RPCs, doing the same work. Closed loop of calls at several concurrencies (what leaves in one loop turn shares a message), and frames one
way in bursts of several sizes. Five interleaved rounds, medians; ratios are what to look at.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import uvloop

from benchmarks.tools import report
from benchmarks.tools.cpu import cpu_seconds
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import service_uri
from gpumesh_runtime.link import Batch, Goodbye, Item, ItemKind, Link, LinkClient, LinkEnd, LinkServer, new_id
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.rpc.options import server_options
from gpumesh_runtime.tls import TlsIdentity

SERVICE = "gpumesh.bench.v1.BenchService"
CALL, REPLY, FRAME = ItemKind.ITEM_KIND_CALL, ItemKind.ITEM_KIND_REPLY, ItemKind.ITEM_KIND_FRAME
BODY = b"x" * 150  # a frame of a few tokens
CONCURRENCIES = (1, 8, 32, 128)
BURSTS = (1, 4, 16, 64, 256)
JOB = new_id()
Work = Callable[[int], Awaitable[None]]


class Serving:
    """Answers calls with their own body and counts frames; a call of an empty body asks for nothing but the round trip."""

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """Nothing to prepare."""

    def on_item(self, link: Link, item: Item) -> None:
        """Echo."""
        if item.kind == CALL:
            link.reply(item.id, item.body)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """Nothing runs on."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Nothing is kept."""


async def plain_stream(request_iterator: Any, context: Any) -> None:
    """One message per item, both ways."""
    while (item := await context.read()) is not grpc.aio.EOF:
        if item.kind == CALL:
            await context.write(Item(kind=REPLY, id=item.id, body=item.body))


async def unary(request: Item, context: Any) -> Item:
    """One RPC per item."""
    return Item(kind=REPLY, id=request.id, body=request.body)


async def serve(folder: Path) -> None:
    """The other process. Prints its port and serves until its standard input ends."""
    tls = TlsIdentity(folder / "server.crt", folder / "server.key", folder / "ca.crt")
    links = LinkServer(Serving(), lambda hello, peer: b"")
    server = grpc.aio.server(options=server_options())

    async def connect(request_iterator: Any, context: Any) -> None:
        await links.serve(request_iterator, context)

    methods: dict[str, Any] = {
        "Link": grpc.stream_stream_rpc_method_handler(connect, Batch.FromString, Batch.SerializeToString),
        "Stream": grpc.stream_stream_rpc_method_handler(plain_stream, Item.FromString, Item.SerializeToString),
        "Unary": grpc.unary_unary_rpc_method_handler(unary, Item.FromString, Item.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_secure_port("127.0.0.1:0", tls.server_credentials(require_client_certificate=True))
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0.1)


class LinkSide:
    """The same work over a link."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def calls(self, concurrency: int) -> Work:
        """A closed loop of calls."""

        async def work(count: int) -> None:
            async def one(times: int) -> None:
                for _ in range(times):
                    await self.link.call(BODY, 10)

            await asyncio.gather(*(one(count // concurrency) for _ in range(concurrency)))

        return work

    def frames(self, burst: int) -> Work:
        """Frames one way, `burst` in each turn, each burst written before the next."""

        async def work(count: int) -> None:
            send = self.link.send_new
            for start in range(0, count, burst):
                for seq in range(start, start + burst):
                    send(FRAME, id=JOB, fence=65537, seq=seq, tokens=seq, flags=1, body=BODY)
                await self.link.drained()
            await self.link.call(b"", 10)

        return work


class StreamSide:
    """The same work over a plain stream with one message per item."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._reader = asyncio.get_running_loop().create_task(self._read())
        self._turn = asyncio.Lock()

    async def _read(self) -> None:
        while (item := await self._call.read()) is not grpc.aio.EOF:
            self._waiting.pop(item.id).set_result(item.body)

    async def _ask(self) -> None:
        id_ = new_id()
        answer = self._waiting[id_] = asyncio.get_running_loop().create_future()
        async with self._turn:
            await self._call.write(Item(kind=CALL, id=id_, body=BODY))
        await answer

    def calls(self, concurrency: int) -> Work:
        """A closed loop of calls."""

        async def work(count: int) -> None:
            async def one(times: int) -> None:
                for _ in range(times):
                    await self._ask()

            await asyncio.gather(*(one(count // concurrency) for _ in range(concurrency)))

        return work

    def frames(self, burst: int) -> Work:
        """Frames one way."""

        async def work(count: int) -> None:
            for seq in range(count):
                await self._call.write(Item(kind=FRAME, id=JOB, fence=65537, seq=seq, tokens=seq, body=BODY))
            await self._ask()

        return work

    async def close(self) -> None:
        """Ends the stream."""
        await self._call.done_writing()
        await self._reader


def unary_calls(method: Any, concurrency: int) -> Work:
    """A closed loop of unary RPCs."""

    async def work(count: int) -> None:
        async def one(times: int) -> None:
            for _ in range(times):
                await method(Item(kind=CALL, id=new_id(), body=BODY), timeout=10)

        await asyncio.gather(*(one(count // concurrency) for _ in range(concurrency)))

    return work


async def rate(work: Work, pids: tuple[int, int], seconds: float, guess: int) -> tuple[float, float]:
    """(items per CPU-second of both processes, wall microseconds an item): grows the count until it lasts `seconds`."""
    count = guess
    while True:
        cpu, wall = sum(map(cpu_seconds, pids)), time.perf_counter()
        await work(count)
        cpu, wall = sum(map(cpu_seconds, pids)) - cpu, time.perf_counter() - wall
        if wall >= seconds / 2:
            return count / cpu, wall / count * 1e6
        count = max(count * 2, round(count * seconds / max(wall, 1e-3) / 256) * 256)


def enqueue_us(link: Link) -> float:
    """Time of building and queueing one item, microseconds. Runs within one loop turn, so nothing is written meanwhile."""
    count = 5000
    began = time.perf_counter()
    for seq in range(count):
        link.send_new(FRAME, id=JOB, fence=65537, seq=seq, tokens=seq, body=BODY)
    return (time.perf_counter() - began) / count * 1e6


def deliver_us(link: Link) -> float:
    """Time of parsing one item of a full message and giving it to its receiver, microseconds."""
    message = Batch(items=[Item(kind=FRAME, id=JOB, fence=65537, seq=seq, body=BODY) for seq in range(256)])
    raw = message.SerializeToString()
    rounds = 40
    began = time.perf_counter()
    for _ in range(rounds):
        link.deliver(Batch.FromString(raw))
    return (time.perf_counter() - began) / rounds / 256 * 1e6


async def measure(
    link: Link, stream: StreamSide, unary_method: Any, pids: tuple[int, int], rounds: int, seconds: float
) -> dict[str, float]:
    """All figures: medians over the rounds, the alternatives interleaved."""
    side = LinkSide(link)
    works: dict[str, tuple[Work, int]] = {}
    for number in CONCURRENCIES:
        works[f"link_calls_per_cpu_s_{number}"] = (side.calls(number), 256)
        works[f"stream_calls_per_cpu_s_{number}"] = (stream.calls(number), 256)
        works[f"unary_calls_per_cpu_s_{number}"] = (unary_calls(unary_method, number), 256)
    for number in BURSTS:
        works[f"link_frames_per_cpu_s_burst_{number}"] = (side.frames(number), 512)
    works["stream_frames_per_cpu_s"] = (stream.frames(1), 512)
    values: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, (work, guess) in works.items():
            per_cpu, wall_us = await rate(work, pids, seconds, guess)
            values[name].append(per_cpu)
            if name.endswith("calls_per_cpu_s_1"):
                values.setdefault(name.replace("calls_per_cpu_s_1", "round_trip_us"), []).append(wall_us)
        values.setdefault("enqueue_us", []).append(enqueue_us(link))
        await link.drained()
        values.setdefault("deliver_us", []).append(deliver_us(link))
    figures = {name: statistics.median(all_) for name, all_ in values.items()}
    for number in CONCURRENCIES:
        for other in ("stream", "unary"):
            ratio = figures[f"link_calls_per_cpu_s_{number}"] / figures[f"{other}_calls_per_cpu_s_{number}"]
            figures[f"link_vs_{other}_calls_{number}"] = ratio
    for number in BURSTS:
        ratio = figures[f"link_frames_per_cpu_s_burst_{number}"] / figures["stream_frames_per_cpu_s"]
        figures[f"link_vs_stream_frames_burst_{number}"] = ratio
    return {name: round(value, 3 if value < 100 else 0) for name, value in figures.items()}


async def run(folder: Path, rounds: int, seconds: float) -> dict[str, float]:
    """Starts the other process, connects three ways, measures."""
    other = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.link",
        "--serve",
        str(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdin is not None
    try:
        port = int(await other.stdout.readline())
        address = f"127.0.0.1:{port}"
        tls = TlsIdentity(folder / "client.crt", folder / "client.key", folder / "ca.crt")
        client = LinkClient(
            address,
            f"/{SERVICE}/Link",
            credentials=tls,
            hello=lambda: b"",
            receiver=Serving(),
            peer=tls.identity,
        )
        running = asyncio.create_task(client.run())
        link = await client.up(10)
        async with channel(address, tls) as other_channel:
            stream = StreamSide(
                other_channel.stream_stream(
                    f"/{SERVICE}/Stream",
                    request_serializer=Item.SerializeToString,
                    response_deserializer=Item.FromString,
                )()
            )
            unary_method = other_channel.unary_unary(
                f"/{SERVICE}/Unary", request_serializer=Item.SerializeToString, response_deserializer=Item.FromString
            )
            figures = await measure(link, stream, unary_method, (os.getpid(), other.pid), rounds, seconds)
            await stream.close()
        await client.stop()
        await running
        return figures
    finally:
        other.stdin.close()
        await other.wait()


def certificates(folder: Path) -> None:
    """A CA and the two identities."""
    ca = FileCa.load_or_create(folder)
    for name, uri in (("server", service_uri("router")), ("client", service_uri("edge"))):
        ca.issue_files(name, uri)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each measurement")
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.serve))
        return
    with tempfile.TemporaryDirectory() as folder:
        certificates(Path(folder))
        figures = uvloop.run(run(Path(folder), args.rounds, args.seconds))
    for name, value in figures.items():
        print(f"{name:44} {value:12,.3f}" if value < 100 else f"{name:44} {value:12,.0f}")
    print(report.write("link", figures, command="make bench-link", seed=0))


if __name__ == "__main__":
    main()
