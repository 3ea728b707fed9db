"""Links over real grpc.aio with mTLS: who is refused, garbage, and stopping whatever the other side does."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from gpumesh.common.v1.link_pb2 import Batch, Item, ItemKind
from gpumesh_runtime.errors import PermissionDenied, Reason, Unavailable, from_grpc
from gpumesh_runtime.identity import Identity
from gpumesh_runtime.link import SERVICE_LINK, LinkClient, LinkEnd
from gpumesh_runtime.rpc.client import channel
from tests.support.link_clients import QUICK, connecting, until
from tests.support.link_server import METHOD, Certificates, LinkHost, Tunnel
from tests.support.links import CALL, PAYLOAD, Recorder

JOB = b"j" * 16


async def test_a_refused_hello_names_its_reason_and_is_tried_again(certificates: Certificates) -> None:
    refusals = 0

    def welcome(hello: bytes, peer: Identity) -> bytes:
        nonlocal refusals
        refusals += 1
        if refusals < 3:
            raise PermissionDenied(Reason.NODE_REVOKED, "This node was revoked.")
        return b"well"

    async with (
        LinkHost(certificates.service("router"), welcome=welcome) as host,
        connecting(host.address, certificates.service("edge"), Recorder(), QUICK) as client,
    ):
        await until(lambda: client.last_error is not None)
        assert client.last_error is not None
        assert client.last_error.reason is Reason.NODE_REVOKED
        await client.up(10)
        assert client.last_error is None
        assert refusals == 3


async def test_nobody_at_the_address_is_unavailable_and_stop_ends_the_waiting(certificates: Certificates) -> None:
    client = LinkClient(
        "127.0.0.1:1",
        METHOD,
        credentials=certificates.service("edge"),
        hello=lambda: b"",
        receiver=Recorder(),
    )
    running = asyncio.get_running_loop().create_task(client.run())
    with pytest.raises(Unavailable):
        await client.up(0.15)
    await client.stop()
    await running


async def raw_call(certificates: Certificates, address: str, messages: list[bytes]) -> grpc.aio.AioRpcError:
    """Sends raw bytes as a stranger would and gives the status that ends the stream."""
    async with channel(address, certificates.service("edge")) as connection:
        stream: Any = connection.stream_stream(METHOD)()
        for message in messages:
            await stream.write(message)
        try:
            while await stream.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError("the stream ended without an error")


@pytest.mark.parametrize("first", [b"\xff\xff\xff", b"", Batch(items=[Item(kind=CALL)]).SerializeToString()])
async def test_a_link_that_does_not_begin_with_hello_is_refused(certificates: Certificates, first: bytes) -> None:
    far = Recorder()
    async with LinkHost(certificates.service("router"), receiver=far) as host:
        error = await raw_call(certificates, host.address, [first])
        assert from_grpc(error).reason in (Reason.PROTOCOL_ERROR, Reason.INTERNAL)
        assert not far.ups


async def test_no_hello_at_all_is_deadline_exceeded(certificates: Certificates) -> None:
    options = replace(SERVICE_LINK, handshake_s=0.1)
    async with LinkHost(certificates.service("router"), options=options) as host:
        error = await raw_call(certificates, host.address, [])
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_garbage_on_a_live_link_ends_that_link_only(certificates: Certificates) -> None:
    near, far = Recorder(), Recorder()
    async with (
        LinkHost(certificates.service("router"), receiver=far) as host,
        connecting(host.address, certificates.service("edge"), near) as client,
    ):
        good = await client.up(10)
        async with channel(host.address, certificates.service("edge")) as connection:
            stream: Any = connection.stream_stream(METHOD, response_deserializer=Batch.FromString)()
            await stream.write(Batch(items=[Item(kind=ItemKind.ITEM_KIND_HELLO)]).SerializeToString())
            await stream.read()
            await stream.write(b"\xff\xff\xff")
            await far.until(lambda: bool(far.ends))
        assert far.ends == [LinkEnd.PROTOCOL_ERROR]
        assert good.end is None


async def test_stopping_ends_also_where_the_other_side_reads_nothing(certificates: Certificates) -> None:
    released = asyncio.Event()

    async def deaf(request_iterator: Any, context: Any) -> None:
        await context.read()
        await context.write(Batch(items=[Item(kind=ItemKind.ITEM_KIND_WELCOME)]))
        await released.wait()

    options = replace(SERVICE_LINK, close_s=0.1)
    async with LinkHost(certificates.service("router"), connect=deaf) as host:
        connection = connecting(host.address, certificates.service("edge"), Recorder(), options)
        async with connection as client:
            link = await client.up(10)
            for _ in range(100):
                link.send_new(PAYLOAD, id=JOB, body=bytes(100_000))
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 5.0
        released.set()


async def test_stopping_while_connecting_ends_at_once(certificates: Certificates) -> None:
    async with Tunnel("127.0.0.1:1") as tunnel:
        tunnel.black_hole()
        connection = connecting(tunnel.address, certificates.service("edge"), Recorder())
        async with connection:
            await asyncio.sleep(0.05)
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 1.0


async def test_an_exception_while_a_link_comes_up_leaves_nothing_running(certificates: Certificates) -> None:
    class Broken(Recorder):
        def on_up(self, link: Any, hello_or_welcome: bytes) -> None:
            super().on_up(link, hello_or_welcome)
            raise KeyError("bug")

    far, near = Broken(), Recorder()
    async with (
        LinkHost(certificates.service("router"), receiver=far) as host,
        connecting(host.address, certificates.service("edge"), near, QUICK),
    ):
        await far.until(lambda: len(far.ends) >= 2)
        assert set(far.ends) == {LinkEnd.LOST}
    assert not host.links.links
