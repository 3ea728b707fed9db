"""Identities, the file CA, and the access options of every RPC."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from gpumesh.common.v1 import access_pb2
from gpumesh_runtime.access import all_services, matrix, roles_of
from gpumesh_runtime.ca import FileCa, csr_for_key, make_key_and_csr
from gpumesh_runtime.errors import InvalidArgument, Reason, Unauthenticated
from gpumesh_runtime.identity import PUBLIC, Role, node_uri, operator_uri, parse_spiffe, peer_identity, service_uri


class Context:
    """What identity reads of a gRPC context."""

    def __init__(self, **auth: list[bytes]) -> None:
        self._auth = auth

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> FileCa:
    return FileCa.load_or_create(tmp_path_factory.mktemp("ca"))


def test_roles_are_numbered_as_in_the_proto() -> None:
    wire = {name.removeprefix("ROLE_"): number for name, number in access_pb2.Role.items() if number}
    assert {role.name: int(role) for role in Role} == wire


def test_each_kind_of_uri_is_understood() -> None:
    edge = parse_spiffe(service_uri("edge", "pod-7"))
    assert (edge.role, edge.name, edge.instance) == (Role.EDGE, "edge", "pod-7")
    node = parse_spiffe(node_uri("acme", "gpu-1"))
    assert (node.role, node.provider_id, node.node_id, node.name) == (Role.NODE, "acme", "gpu-1", "gpu-1")
    assert parse_spiffe(operator_uri("eve")).role is Role.OPERATOR


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://gpumesh.local",
        "spiffe://gpumesh.local/",
        "spiffe://other.local/service/edge",
        "spiffe://gpumesh.local.evil/service/edge",
        "http://gpumesh.local/service/edge",
        "spiffe://gpumesh.local/service/unknown",
        "spiffe://gpumesh.local/service/edge/",
        "spiffe://gpumesh.local/service/edge/a/b",
        "spiffe://gpumesh.local/service/edge\n",
        "spiffe://gpumesh.local/provider/p/node/",
        "spiffe://gpumesh.local/provider//node/n",
        "spiffe://gpumesh.local/provider/p/node/n/../../../service/router",
        "spiffe://gpumesh.local/operator/",
        "spiffe://gpumesh.local/SERVICE/edge",
        "spiffe://gpumesh.local/service/edge?x=1",
        "spiffe://gpumesh.local/service/e%64ge",
        "spiffe://gpumesh.local/operator/" + "a" * 64,
    ],
)
def test_anything_else_is_no_identity(uri: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        parse_spiffe(uri)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_a_peer_without_certificate_is_public_and_one_with_a_foreign_certificate_is_nobody() -> None:
    assert peer_identity(Context()) is PUBLIC
    assert (
        peer_identity(Context(peer_spiffe_id=[service_uri("router").encode()], x509_pem_cert=[b"x"])).role
        is Role.ROUTER
    )
    for auth in (
        {"x509_pem_cert": [b"x"]},
        {
            "x509_pem_cert": [b"x"],
            "peer_uri": [b"spiffe://gpumesh.local/service/edge", b"spiffe://gpumesh.local/service/router"],
        },
        {"x509_pem_cert": [b"x"], "peer_uri": [b"\xff"]},
    ):
        with pytest.raises(Unauthenticated):
            peer_identity(Context(**auth))


def test_every_rpc_of_every_service_carries_an_access_option() -> None:
    services = all_services()
    assert len(services) >= 5
    found = matrix()
    assert len(found) == sum(len(service.methods) for service in services)
    for service in services:
        for method in service.methods:
            assert roles_of(method)


def test_the_ca_is_made_once_and_its_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    first = FileCa.load_or_create(tmp_path / "ca")
    again = FileCa.load_or_create(tmp_path / "ca")
    assert first.certificate_pem == again.certificate_pem
    tls = first.issue_files("router", service_uri("router"))
    assert tls.identity == parse_spiffe(service_uri("router"))
    for key in ("ca.key", "router.key"):
        assert stat.S_IMODE((tmp_path / "ca" / key).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700


def test_an_issued_certificate_chains_to_the_ca_and_says_what_it_may_do(ca: FileCa) -> None:
    issued = ca.issue(service_uri("scheduler", "a"), dns=["localhost"], ip=["127.0.0.1", "::1"])
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.certificate_pem))
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    key = serialization.load_pem_private_key(issued.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp256r1"
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not basic.ca


def test_a_nodes_request_is_signed_for_the_identity_we_chose_not_the_one_it_asked_for(ca: FileCa) -> None:
    key, csr = make_key_and_csr(service_uri("router"))
    issued = ca.sign_csr(csr, node_uri("p1", "n1"))
    certificate = x509.load_pem_x509_certificate(issued.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [name.value for name in names] == [node_uri("p1", "n1")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert ExtendedKeyUsageOID.SERVER_AUTH not in usage  # a node must never be able to stand in for a server
    assert abs(issued.not_after - datetime.now(UTC) - timedelta(hours=24)) < timedelta(minutes=1)
    own = serialization.load_pem_private_key(key, None)
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    assert certificate.public_key() == own.public_key()
    assert ca.sign_csr(csr_for_key(key, ""), node_uri("p1", "n1")).serial != issued.serial


def rsa_request() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def forged_request() -> bytes:
    _, csr = make_key_and_csr(node_uri("p", "n"))
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize(
    "csr",
    [b"", b"garbage", b"x" * 20_000, rsa_request(), forged_request()],
    ids=["empty", "text", "huge", "rsa", "forged"],
)
def test_a_bad_request_is_refused(ca: FileCa, csr: bytes) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ca.sign_csr(csr, node_uri("p1", "n1"))
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_the_ca_signs_no_identity_that_is_not_of_the_mesh(ca: FileCa) -> None:
    with pytest.raises(Unauthenticated):
        ca.issue("spiffe://elsewhere/service/router")
