"""Links over real grpc.aio with mTLS: handshakes, ends, reconnects, silence, overflow."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from gpumesh.common.v1.link_pb2 import Batch, Failure, GoodbyeReason, Item, ItemKind
from gpumesh_runtime.errors import Reason
from gpumesh_runtime.identity import Role
from gpumesh_runtime.link import FLAG_FIRST, SERVICE_LINK, LinkClient, LinkDown, LinkEnd
from tests.support.link_clients import FAST, QUICK, connecting, until
from tests.support.link_server import METHOD, Certificates, LinkHost, Tunnel
from tests.support.links import CANCEL, ERROR, FRAME, PAYLOAD, Recorder

JOB = b"j" * 16


async def test_both_sides_know_each_other_and_calls_are_answered(certificates: Certificates) -> None:
    receiver = Recorder()
    async with (
        LinkHost(certificates.service("router")) as host,
        connecting(host.address, certificates.service("edge"), receiver) as client,
    ):
        link = await client.up(10)
        assert link.peer.role is Role.ROUTER
        assert receiver.ups == [(link, b"welcome hello")]
        await until(lambda: len(host.links.links) == 1)
        (served,) = host.links.links
        assert (served.peer.role, served.peer.uri) == (Role.EDGE, "spiffe://gpumesh.local/service/edge")
        answers = await asyncio.gather(*(link.call(bytes([n % 256]) * n, 10) for n in range(300)))
        assert answers == [bytes([n % 256]) * n for n in range(300)]
        assert link.stats.messages_out < 50


async def test_a_link_carries_items_up_to_their_bound_and_refuses_none_within_it(certificates: Certificates) -> None:
    async with (
        LinkHost(certificates.service("router")) as host,
        connecting(host.address, certificates.service("edge"), Recorder()) as client,
    ):
        link = await client.up(10)
        body = bytes(SERVICE_LINK.max_item_bytes - 100)
        assert await link.call(body, 10) == body


async def test_stopping_the_client_is_goodbye_at_the_server(certificates: Certificates) -> None:
    near, far = Recorder(), Recorder()
    async with LinkHost(certificates.service("router"), receiver=far) as host:
        connection = connecting(host.address, certificates.service("edge"), near)
        async with connection as client:
            link = await client.up(10)
            link.send_new(FRAME, id=JOB)
        assert near.ends == [LinkEnd.CLOSED_BY_US]
        await far.until(lambda: bool(far.ends))
        assert far.ends == [LinkEnd.GOODBYE]
        assert [item.id for item in far.items] == [JOB]
        assert far.goodbyes[0].reason == GoodbyeReason.GOODBYE_REASON_DRAIN
        assert not host.links.links


async def test_closing_at_the_server_is_goodbye_at_the_client_which_comes_back(certificates: Certificates) -> None:
    near, far = Recorder(), Recorder()
    async with (
        LinkHost(certificates.service("router"), receiver=far) as host,
        connecting(host.address, certificates.service("edge"), near, QUICK),
    ):
        await far.until(lambda: len(far.ups) == 1)
        await far.ups[0][0].close()
        await near.until(lambda: bool(near.ends))
        assert near.ends == [LinkEnd.GOODBYE]
        await near.until(lambda: len(near.ups) == 2)
        assert near.ups[0][0] is not near.ups[1][0]


async def test_a_draining_server_says_goodbye_and_takes_no_new_links(certificates: Certificates) -> None:
    near, far = Recorder(), Recorder()
    async with (
        LinkHost(certificates.service("router"), receiver=far) as host,
        connecting(host.address, certificates.service("edge"), near, QUICK) as client,
    ):
        await far.until(lambda: len(far.ups) == 1)
        host.links.goodbye(drain_ms=1000)
        await near.until(lambda: bool(near.goodbyes))
        assert near.ups[0][0].draining
        await host.links.close()
        await until(lambda: client.last_error is not None and client.last_error.reason is Reason.DRAINING)
        assert near.ends == [LinkEnd.GOODBYE]
        assert len(near.ups) == 1


async def test_the_end_of_the_stream_without_goodbye_is_lost(certificates: Certificates) -> None:
    async def hang_up(request_iterator: Any, context: Any) -> None:
        await context.read()
        await context.write(Batch(items=[Item(kind=ItemKind.ITEM_KIND_WELCOME)]))
        await context.read()

    near = Recorder()
    async with (
        LinkHost(certificates.service("router"), connect=hang_up) as host,
        connecting(host.address, certificates.service("edge"), near) as client,
    ):
        link = await client.up(10)
        with pytest.raises(LinkDown):
            await link.call(b"", 10)
        assert near.ends == [LinkEnd.LOST]


async def test_a_client_that_vanishes_is_lost_at_the_server(certificates: Certificates) -> None:
    near, far = Recorder(), Recorder()
    async with (
        LinkHost(certificates.service("router"), receiver=far) as host,
        Tunnel(host.address) as tunnel,
        connecting(tunnel.address, certificates.service("edge"), near) as client,
    ):
        await client.up(10)
        await far.until(lambda: bool(far.ups))
        tunnel.cut()
        await far.until(lambda: bool(far.ends))
        await near.until(lambda: bool(near.ends))
        assert near.ends == far.ends == [LinkEnd.LOST]


async def test_a_cancelled_client_is_lost_at_the_server(certificates: Certificates) -> None:
    far = Recorder()
    async with LinkHost(certificates.service("router"), receiver=far) as host:
        client = LinkClient(
            host.address,
            METHOD,
            credentials=certificates.service("edge"),
            hello=lambda: b"",
            receiver=Recorder(),
        )
        running = asyncio.get_running_loop().create_task(client.run())
        await client.up(10)
        await far.until(lambda: bool(far.ups))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await far.until(lambda: bool(far.ends))
        assert far.ends == [LinkEnd.LOST]


async def test_the_link_is_up_again_within_a_second_of_a_killed_servers_return(certificates: Certificates) -> None:
    def start(port: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.support.link_server", str(certificates.folder), str(port)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])

    async def address_of(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        while not (line := await asyncio.to_thread(process.stdout.readline)).startswith("address "):
            assert line, "it ended"
        return line.split()[1]

    certificates.service("router")
    near = Recorder()
    server = await asyncio.to_thread(start, 0)
    try:
        address = await address_of(server)
        async with connecting(address, certificates.service("edge"), near) as client:
            link = await client.up(10)
            assert await link.call(b"1", 10) == b"1"
            server.kill()
            await near.until(lambda: bool(near.ends))
            assert near.ends == [LinkEnd.LOST]
            server.wait()
            assert server.stdout is not None
            server.stdout.close()
            server = await asyncio.to_thread(start, int(address.rpartition(":")[2]))
            assert await address_of(server) == address
            began = asyncio.get_running_loop().time()
            link = await client.up(10)
            assert asyncio.get_running_loop().time() - began < 2.0, "1 s of back-off, and a handshake"
            assert await link.call(b"2", 10) == b"2"
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


async def test_a_black_holed_peer_is_found_by_silence_at_both_ends(certificates: Certificates) -> None:
    near, far = Recorder(), Recorder()
    host = LinkHost(certificates.service("router"), receiver=far, options=FAST)
    async with (
        host,
        Tunnel(host.address) as tunnel,
        connecting(tunnel.address, certificates.service("edge"), near, FAST) as client,
    ):
        link = await client.up(10)
        await asyncio.sleep(0.15)
        assert not near.suspicions, "heartbeats keep it alive"
        tunnel.black_hole()
        began = asyncio.get_running_loop().time()
        with pytest.raises(LinkDown):
            await link.call(b"", 30)
        await far.until(lambda: bool(far.ends))
        assert 0.6 < asyncio.get_running_loop().time() - began < 5.0
        assert near.suspicions == [True]
        assert near.ends == far.ends == [LinkEnd.LOST]
        tunnel.cut()
        tunnel.heal()
        await near.until(lambda: len(near.ups) == 2)


async def test_a_reader_that_stalls_overflows_ids_by_name_and_a_cancel_overtakes_10_mb(
    certificates: Certificates,
) -> None:
    reading = asyncio.Event()
    came: list[Item] = []

    async def slow(request_iterator: Any, context: Any) -> None:
        await context.read()
        await context.write(Batch(items=[Item(kind=ItemKind.ITEM_KIND_WELCOME)]))
        await reading.wait()
        while (batch := await context.read()) is not grpc.aio.EOF:
            came.extend(batch.items)

    near = Recorder()
    async with (
        LinkHost(certificates.service("router"), connect=slow) as host,
        connecting(host.address, certificates.service("edge"), near) as client,
    ):
        link = await client.up(10)
        other, late = b"o" * 16, b"l" * 16
        link.send_new(FRAME, id=other, flags=FLAG_FIRST)
        # Until the transport takes no more, then 10 MB that stay in the queue.
        while not link.queued_bytes(other):
            link.send_new(PAYLOAD, id=other, body=bytes(200_000))
            await asyncio.sleep(0.001)
            if link.queued_bytes(other):
                await asyncio.sleep(0.05)
        for seq in range(1, 161):
            link.send_new(PAYLOAD, id=JOB, seq=seq, body=bytes(64 * 1024))
        assert link.queued_bytes(JOB) > 10 * 1024 * 1024
        for _ in range(300):
            link.send_new(FRAME, id=late, body=bytes(64 * 1024))
        assert link.queued_total_bytes < SERVICE_LINK.queue_data_bytes
        await near.until(lambda: near.overflows == [late])
        link.cancel(JOB, "CLIENT_GONE")
        assert link.queued_bytes(JOB) == 0
        reading.set()
        await until(lambda: any(item.kind == ERROR for item in came))
        of_job = [item.kind for item in came if item.id == JOB]
        assert of_job[-1] == CANCEL
        assert len(of_job) < 20, "but for what the transport had taken, 10 MB were overtaken"
        (error,) = [item for item in came if item.kind == ERROR]
        assert error.id == late
        assert Failure.FromString(error.body).reason == "SEND_QUEUE_FULL"
        assert link.end is None


PINGING = (("grpc.keepalive_time_ms", 60), ("grpc.keepalive_timeout_ms", 5_000))


@pytest.mark.parametrize("allowed_ms", [20, 600_000])
async def test_pings_during_a_long_silence_do_not_kill_the_link_where_the_server_allows_them(
    certificates: Certificates, allowed_ms: int
) -> None:
    """The option's name is right: with it a link lives through pings every 60 ms, without it gRPC hangs up (too_many_pings)."""
    near = Recorder()
    options: list[tuple[str, str | int]] = [("grpc.http2.min_ping_interval_without_data_ms", allowed_ms)]
    async with (
        LinkHost(certificates.service("router"), server_options=options) as host,
        connecting(host.address, certificates.service("edge"), near, channel_options=PINGING) as client,
    ):
        await client.up(10)
        if allowed_ms > 1000:
            await near.until(lambda: bool(near.ends))
            assert near.ends == [LinkEnd.LOST]
            return
        for _ in range(15):
            await asyncio.sleep(0.1)
        assert not near.ends
        link = await client.up(1)
        assert await link.call(b"still here", 5) == b"still here"


async def test_the_servers_own_options_allow_the_clients_own_pings() -> None:
    """Ours, as every Server and LinkClient sets them: what a server allows is below what a client sends."""
    from gpumesh_runtime.rpc.options import client_options, server_options  # noqa: PLC0415 -- only this test reads them

    client, server = dict(client_options()), dict(server_options())
    assert int(server["grpc.http2.min_ping_interval_without_data_ms"]) < int(client["grpc.keepalive_time_ms"])
    assert client["grpc.http2.max_pings_without_data"] == 0
