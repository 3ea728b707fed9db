"""The full cross product: every identity calls every RPC of every service, on both kinds of listener, over real TLS.

The services are whatever the generated code defines, so a new RPC is in this test as soon as it exists. A servicer
that answers UNIMPLEMENTED
stands behind each: reaching it means "allowed".
"""

import importlib
import pkgutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor
from grpc_health.v1 import health_pb2_grpc

import gpumesh
from gpumesh_runtime.access import MissingAccessError, all_services, method_path, roles_of
from gpumesh_runtime.ca import make_key_and_csr
from gpumesh_runtime.errors import MeshError, Reason, Unimplemented, from_grpc
from gpumesh_runtime.identity import Role, node_uri
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.tls import TlsIdentity
from tests.support.certificates import Certificates

SERVICES = all_services()
CALLERS = list(Role)


def add_functions() -> dict[str, Any]:
    """Service name -> its generated add function."""
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(gpumesh.__path__, "gpumesh."):
        if module.name.endswith("_pb2_grpc"):
            generated = importlib.import_module(module.name)
            package = module.name.rpartition(".")[0]
            for name in vars(generated):
                if name.startswith("add_") and name.endswith("Servicer_to_server"):
                    found[f"{package}.{name[4:-18]}"] = getattr(generated, name)
    return found


class Everything:
    """A servicer for any service: each method that is reached says so."""

    def __init__(self, service: descriptor.ServiceDescriptor) -> None:
        for method in service.methods:
            setattr(self, method.name, reached_stream if method.server_streaming else reached)


async def reached(request: Any, context: Any) -> Any:
    raise Unimplemented(Reason.UNIMPLEMENTED, "reached")


async def reached_stream(request: Any, context: Any) -> AsyncIterator[Any]:
    raise Unimplemented(Reason.UNIMPLEMENTED, "reached")
    yield  # makes it a generator


@dataclass
class Mesh:
    """Both listeners with every service on them."""

    certificates: Certificates
    internal: Server
    public: Server


async def call(connection: grpc.aio.Channel, method: descriptor.MethodDescriptor) -> MeshError:
    """Calls with an empty request."""
    kinds = {
        (False, False): connection.unary_unary,
        (False, True): connection.unary_stream,
        (True, False): connection.stream_unary,
        (True, True): connection.stream_stream,
    }
    make: Any = kinds[method.client_streaming, method.server_streaming]
    stub = make(method_path(method), request_serializer=bytes, response_deserializer=bytes)
    try:
        # A stream is opened and nothing is written: grpc.aio reports a write that meets a refusal as INTERNAL, whatever the refusal said.
        started = stub(timeout=10) if method.client_streaming else stub(b"", timeout=10)
        if method.server_streaming:
            await started.read()
        else:
            await started
    except grpc.aio.AioRpcError as err:
        return from_grpc(err)
    raise AssertionError(f"{method.full_name} answered, though nothing here does")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
async def mesh(certificates: Certificates) -> AsyncIterator[Mesh]:
    own = certificates.role(Role.ROUTER)
    made = Mesh(certificates, Server("internal", "localhost:0", own), Server("public", "localhost:0", own, public=True))
    adders = add_functions()
    for server in (made.internal, made.public):
        for service in SERVICES:
            server.add(Everything(service), adders[service.full_name])
        await server.start()
    yield made
    await made.internal.stop(0)
    await made.public.stop(0)


def expected_internal(role: Role, method: descriptor.MethodDescriptor) -> Reason:
    """What the access option says, on the listener where each caller has a certificate."""
    if role is Role.PUBLIC:
        return Reason.UNAVAILABLE  # the handshake itself fails without a client certificate
    allowed = roles_of(method)
    return Reason.UNIMPLEMENTED if role in allowed or Role.PUBLIC in allowed else Reason.PERMISSION_DENIED


def expected_public(method: descriptor.MethodDescriptor) -> Reason:
    """On the public listener nobody has an identity, whatever certificate he holds."""
    return Reason.UNIMPLEMENTED if Role.PUBLIC in roles_of(method) else Reason.PERMISSION_DENIED


@pytest.mark.parametrize("role", CALLERS, ids=lambda role: role.name)
async def test_each_identity_reaches_exactly_the_rpcs_that_its_role_allows(mesh: Mesh, role: Role) -> None:
    wrong = []
    own = mesh.certificates.role(role)
    async with (
        channel(f"localhost:{mesh.internal.port}", own) as internal,
        channel(f"localhost:{mesh.public.port}", own) as public,
    ):
        for service in SERVICES:
            for method in service.methods:
                for connection, expected in (
                    (internal, expected_internal(role, method)),
                    (public, expected_public(method)),
                ):
                    got = (await call(connection, method)).reason
                    if got is not expected:
                        wrong.append(f"{method.full_name}: {got} instead of {expected}")
    assert not wrong


async def test_a_certificate_of_another_ca_reaches_nothing(mesh: Mesh, tmp_path: Path) -> None:
    forged = Certificates(tmp_path).role(Role.OPERATOR)
    honest_ca = mesh.certificates.ca.ca_file
    forged.ca_file = honest_ca
    method = SERVICES[0].methods[0]
    async with channel(f"localhost:{mesh.internal.port}", forged) as connection:
        assert (await call(connection, method)).reason is Reason.UNAVAILABLE


async def test_a_client_refuses_a_server_of_another_ca(mesh: Mesh, tmp_path: Path) -> None:
    other = Certificates(tmp_path).role(Role.EDGE)
    async with channel(f"localhost:{mesh.internal.port}", other) as connection:
        assert (await call(connection, SERVICES[0].methods[0])).reason is Reason.UNAVAILABLE


async def test_a_node_cannot_stand_in_for_a_server(certificates: Certificates, tmp_path: Path) -> None:
    key, csr = make_key_and_csr("")
    (tmp_path / "n.key").write_bytes(key)
    (tmp_path / "n.crt").write_bytes(certificates.ca.sign_csr(csr, node_uri("acme", "evil")).certificate)
    server = Server("fake", "localhost:0", TlsIdentity(tmp_path / "n.crt", tmp_path / "n.key", certificates.ca.ca_file))
    await server.start()
    async with channel(f"localhost:{server.port}", certificates.role(Role.EDGE)) as connection:
        assert (await call(connection, SERVICES[0].methods[0])).reason is Reason.UNAVAILABLE
    await server.stop(0)


async def test_a_service_with_an_rpc_without_access_option_cannot_be_served(certificates: Certificates) -> None:
    server = Server("x", "localhost:0", certificates.role(Role.ROUTER))
    with pytest.raises(MissingAccessError, match="Check"):  # a service of others, whose RPCs carry no option of ours
        server.add(health_pb2_grpc.HealthServicer(), health_pb2_grpc.add_HealthServicer_to_server)
