"""Server and client over real TLS: errors, limits, deadlines, keepalive, health, drain, renewed certificates."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gpumesh.router.v1.inference_service_pb2 import InferRequest, InferResponse, ListModelsRequest, ListModelsResponse
from gpumesh.router.v1.inference_service_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.errors import (
    DeadlineExceeded,
    InsufficientBalance,
    Internal,
    InvalidArgument,
    MeshError,
    Reason,
    ResourceExhausted,
    Unavailable,
    from_grpc,
)
from gpumesh_runtime.identity import Role, peer_identity, service_uri
from gpumesh_runtime.rpc.client import channel, unary
from gpumesh_runtime.rpc.server import AddressInUseError, Server
from tests.support.certificates import Certificates


class Shop(InferenceServiceServicer):
    """A programmable servicer: `answer` decides what ListModels does; Infer streams until it is told to end."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.calls = 0
        self.cancelled = asyncio.Event()
        self.finish = asyncio.Event()

    async def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        self.calls += 1
        if self.answer is not None:
            await self.answer(context)
        return ListModelsResponse()

    async def Infer(self, request: InferRequest, context: Any) -> AsyncIterator[InferResponse]:
        try:
            yield InferResponse()
            await self.finish.wait()
            yield InferResponse()
            raise InsufficientBalance(Reason.INSUFFICIENT_BALANCE, "Empty.")
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Bench:
    """A server with the shop on it and a client stub."""

    def __init__(self, shop: Shop, server: Server, connection: grpc.aio.Channel) -> None:
        self.shop = shop
        self.server = server
        self.channel = connection
        self.stub: Any = InferenceServiceStub(connection)

    async def failure(self, **options: Any) -> MeshError:
        with pytest.raises(MeshError) as caught:
            await unary(self.stub.ListModels, ListModelsRequest(), 5.0, **options)
        return caught.value


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def bench(certificates: Certificates) -> AsyncIterator[Bench]:
    shop = Shop()
    server = Server("shop", "localhost:0", certificates.role(Role.ROUTER), development=True)
    server.add(shop, add_InferenceServiceServicer_to_server)
    await server.start()
    async with channel(f"localhost:{server.port}", certificates.role(Role.EDGE)) as connection:
        yield Bench(shop, server, connection)
    await server.stop(0)


async def test_a_mesh_error_arrives_as_it_was_raised(bench: Bench) -> None:
    async def refuse(context: Any) -> None:
        raise ResourceExhausted(Reason.QUEUE_FULL, "Busy.", metadata={"wait_s": "21"}, retry_after_s=21, retryable=True)

    bench.shop.answer = refuse
    err = await bench.failure()
    assert (type(err), err.reason, err.message, err.metadata) == (
        ResourceExhausted,
        Reason.QUEUE_FULL,
        "Busy.",
        {"wait_s": "21"},
    )
    assert (err.retry_after_s, err.retryable) == (21, True)


async def test_a_bug_leaves_as_a_neutral_sentence(bench: Bench) -> None:
    async def fail(context: Any) -> None:
        raise KeyError("what the client wrote")

    bench.shop.answer = fail
    err = await bench.failure()
    assert isinstance(err, Internal)
    assert err.metadata["hash"] in err.message
    assert "wrote" not in err.message


async def test_the_servicer_sees_who_calls(bench: Bench) -> None:
    seen = []

    async def look(context: Any) -> None:
        seen.append(peer_identity(context))

    bench.shop.answer = look
    await unary(bench.stub.ListModels, ListModelsRequest(), 5.0)
    assert [(identity.role, identity.uri) for identity in seen] == [(Role.EDGE, service_uri("edge"))]


async def test_a_unary_call_without_a_deadline_is_refused_before_the_servicer(bench: Bench) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await bench.stub.ListModels(ListModelsRequest())
    err = from_grpc(caught.value)
    assert isinstance(err, InvalidArgument)
    assert err.reason is Reason.DEADLINE_REQUIRED
    assert bench.shop.calls == 0


async def test_a_deadline_that_passes_is_deadline_exceeded_and_cancels_the_servicer(bench: Bench) -> None:
    ended = asyncio.Event()

    async def hang(context: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    bench.shop.answer = hang
    with pytest.raises(DeadlineExceeded):
        await unary(bench.stub.ListModels, ListModelsRequest(), 0.15)
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_stream_that_fails_midway_ends_with_its_reason_after_its_messages(bench: Bench) -> None:
    call = bench.stub.Infer(InferRequest())
    assert await call.read() is not grpc.aio.EOF
    bench.shop.finish.set()
    assert await call.read() is not grpc.aio.EOF
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(from_grpc(caught.value), InsufficientBalance)


async def test_a_client_that_leaves_cancels_the_stream_at_the_server(bench: Bench) -> None:
    call = bench.stub.Infer(InferRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(bench.shop.cancelled.wait(), 5)


async def test_a_message_over_4_mib_is_refused(bench: Bench) -> None:
    request = InferRequest()
    request.ParseFromString(b"\xfa\x3f\x80\x80\xc0\x02" + bytes(5 * 1024 * 1024))  # unknown field 1023, 5 MiB
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in bench.stub.Infer(request):
            pass
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_over_8_kib_is_refused(bench: Bench) -> None:
    await unary(bench.stub.ListModels, ListModelsRequest(), 5.0, metadata=[("x", "a" * 6000)])
    err = await bench.failure(metadata=[("x", "a" * 9000)])
    assert isinstance(err, ResourceExhausted)
    assert bench.shop.calls == 1


async def test_repeatable_calls_are_tried_again_after_unavailable_and_others_are_not(bench: Bench) -> None:
    async def twice_away(context: Any) -> None:
        if bench.shop.calls < 3:
            raise Unavailable(Reason.DATABASE_UNAVAILABLE, "Away.")

    bench.shop.answer = twice_away
    assert (await bench.failure()).reason is Reason.DATABASE_UNAVAILABLE
    assert bench.shop.calls == 1
    await unary(bench.stub.ListModels, ListModelsRequest(), 5.0, attempts=3)
    assert bench.shop.calls == 3


async def test_health_says_serving_and_then_not_serving_while_it_drains(bench: Bench) -> None:
    health = health_pb2_grpc.HealthStub(bench.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service="gpumesh.router.v1.InferenceService"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    await bench.server.drain()
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await unary(bench.stub.ListModels, ListModelsRequest(), 5.0)  # still served
    watch.cancel()


async def test_a_graceful_stop_lets_a_running_stream_finish_and_takes_no_new_call(bench: Bench) -> None:
    call = bench.stub.Infer(InferRequest())
    await call.read()
    stopping = asyncio.create_task(bench.server.stop(10))
    while (await bench.failure()).reason is not Reason.UNAVAILABLE:
        await asyncio.sleep(0.01)
    bench.shop.finish.set()
    assert await call.read() is not grpc.aio.EOF
    await asyncio.wait_for(stopping, 5)
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_development_servers_describe_themselves(bench: Bench) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(bench.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    assert "gpumesh.router.v1.InferenceService" in [service.name for service in answer.list_services_response.service]
    call.cancel()


async def test_a_port_that_is_taken_is_one_clear_error(bench: Bench, certificates: Certificates) -> None:
    second = Server("second", f"localhost:{bench.server.port}", certificates.role(Role.ROUTER))
    with pytest.raises(AddressInUseError, match=f"cannot listen on localhost:{bench.server.port}"):
        await second.start()


async def test_a_server_that_nobody_holds_goes_on_serving(certificates: Certificates) -> None:
    async def begin() -> int:
        server = Server("loose", "localhost:0", certificates.role(Role.ROUTER)).add(
            Shop(), add_InferenceServiceServicer_to_server
        )
        servers.append(server.stop)
        await server.start()
        return server.port

    servers: list[Any] = []
    port = await begin()
    async with channel(f"localhost:{port}", certificates.role(Role.EDGE)) as connection:
        await unary(InferenceServiceStub(connection).ListModels, ListModelsRequest(), 5.0)
    await servers[0](0)


async def test_an_idle_stream_survives_keepalive_pings_that_the_server_allows_and_not_those_that_it_does_not(
    certificates: Certificates,
) -> None:
    """gRPC's own server limit is one ping in 300 s without data: a silent prefill would end in GOAWAY too_many_pings."""
    pings = [("grpc.keepalive_time_ms", 200)]  # grpc sends one a second at most
    calls, servers, channels = [], [], []
    for least_ms in (500, 60_000):
        options = [("grpc.http2.min_ping_interval_without_data_ms", least_ms), ("grpc.http2.max_ping_strikes", 1)]
        shop = Shop()
        server = Server("pinged", "localhost:0", certificates.role(Role.ROUTER), options=options)
        server.add(shop, add_InferenceServiceServicer_to_server)
        await server.start()
        servers.append(server)
        connection = channel(f"localhost:{server.port}", certificates.role(Role.EDGE), options=pings)
        channels.append(connection)
        call: Any = InferenceServiceStub(connection).Infer(InferRequest())
        await call.read()
        calls.append((call, shop))
    (allowed, shop), (refused, _) = calls
    assert await asyncio.wait_for(refused.code(), 20) is grpc.StatusCode.UNAVAILABLE
    assert "pings" in await refused.details()
    assert not allowed.done()
    shop.finish.set()
    assert await allowed.read() is not grpc.aio.EOF
    for connection, server in zip(channels, servers, strict=True):
        await connection.close()
        await server.stop(0)


async def test_a_renewed_certificate_is_used_by_the_next_connection_without_a_restart(tmp_path: Path) -> None:
    ca = FileCa.load_or_create(tmp_path / "ca")
    server_tls = ca.issue_files("server", service_uri("router"), dns=["old.test"])
    server = Server("renewed", "127.0.0.1:0", server_tls).add(Shop(), add_InferenceServiceServicer_to_server)
    await server.start()
    client_tls = ca.issue_files("client", service_uri("edge"))

    async def reach(name: str) -> str:
        async with channel(f"127.0.0.1:{server.port}", client_tls, server_name=name) as connection:
            try:
                await unary(InferenceServiceStub(connection).ListModels, ListModelsRequest(), 5.0)
            except Unavailable:
                return "refused"
            return "ok"

    assert [await reach("old.test"), await reach("new.test")] == ["ok", "refused"]
    ca.issue_files("server", service_uri("router"), dns=["new.test"])
    assert [await reach("old.test"), await reach("new.test")] == ["refused", "ok"]
    await server.stop(0)
