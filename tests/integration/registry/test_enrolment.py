"""How a node gets its certificate, over server TLS and with a real CA."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gpumesh.registry.v1 import account_service_pb2 as accounts
from gpumesh.registry.v1 import enrolment_service_pb2 as pb
from gpumesh.registry.v1.account_service_pb2_grpc import AccountServiceStub
from gpumesh.registry.v1.enrolment_service_pb2_grpc import EnrolmentServiceStub
from gpumesh_registry.domain import enrolment
from gpumesh_runtime.ca import FileCa, csr_for_key, make_key_and_csr
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.identity import node_uri
from gpumesh_runtime.rpc.client import unary
from tests.support.registry import RunningRegistry, running_registry

pytestmark = pytest.mark.postgres


@pytest.fixture
async def registry(postgres_dsn: str, tmp_path: Path) -> AsyncIterator[RunningRegistry]:
    async with running_registry(postgres_dsn, tmp_path) as running:
        yield running


async def token(registry: RunningRegistry) -> str:
    stub: Any = AccountServiceStub(registry.operator())
    await unary(stub.CreateProvider, accounts.CreateProviderRequest(provider_id="prov_p", name="Pat"), 5)
    made = await unary(stub.CreateEnrolmentToken, accounts.CreateEnrolmentTokenRequest(provider_id="prov_p"), 5)
    return str(made.enrolment_token)


def der(csr_pem: bytes) -> bytes:
    return x509.load_pem_x509_csr(csr_pem).public_bytes(serialization.Encoding.DER)


async def enrol(registry: RunningRegistry, token_text: str, csr_pem: bytes) -> pb.EnrolNodeResponse:
    stub: Any = EnrolmentServiceStub(registry.anyone())
    return await unary(stub.EnrolNode, pb.EnrolNodeRequest(enrolment_token=token_text, csr_der=der(csr_pem)), 5)


async def renew(registry: RunningRegistry, certificate_pem: str, csr_pem: bytes) -> pb.RenewCertificateResponse:
    stub: Any = EnrolmentServiceStub(registry.anyone())
    request = pb.RenewCertificateRequest(certificate_pem=certificate_pem, csr_der=der(csr_pem))
    return await unary(stub.RenewCertificate, request, 5)


async def reason_of(call: Any) -> Reason:
    with pytest.raises(MeshError) as caught:
        await call
    return caught.value.reason


async def test_a_token_and_a_request_become_a_node_with_a_certificate_of_24_hours(registry: RunningRegistry) -> None:
    key, csr = make_key_and_csr("spiffe://gpumesh.local/operator/mallory")
    answer = await enrol(registry, await token(registry), csr)
    certificate = x509.load_pem_x509_certificate(answer.certificate_pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [node_uri("prov_p", answer.node_id)]
    assert certificate.public_key() == serialization.load_pem_private_key(key, None).public_key()
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(hours=23, minutes=55) < left <= timedelta(hours=24)
    assert answer.ca_pem == registry.ca.certificate_pem.decode()
    assert list(answer.scheduler_addresses) == ["scheduler.test:1"]


async def test_the_same_token_and_key_again_give_the_same_node_and_another_key_is_refused(
    registry: RunningRegistry,
) -> None:
    text = await token(registry)
    _, csr = make_key_and_csr("")
    first = await enrol(registry, text, csr)
    second = await enrol(registry, text, csr)
    assert second.node_id == first.node_id
    _, other = make_key_and_csr("")
    assert await reason_of(enrol(registry, text, other)) is Reason.ENROLMENT_TOKEN_INVALID


async def test_a_token_that_was_never_given_is_refused(registry: RunningRegistry) -> None:
    _, csr = make_key_and_csr("")
    made_up = enrolment.make_token(b"t" * 32)
    assert await reason_of(enrol(registry, made_up, csr)) is Reason.ENROLMENT_TOKEN_INVALID


async def test_a_request_that_does_not_parse_is_refused_and_does_not_use_the_token_up(
    registry: RunningRegistry,
) -> None:
    text = await token(registry)
    stub: Any = EnrolmentServiceStub(registry.anyone())
    for wrong in (b"", b"no csr", b"x" * 5000):
        request = pb.EnrolNodeRequest(enrolment_token=text, csr_der=wrong)
        assert await reason_of(unary(stub.EnrolNode, request, 5)) is Reason.INVALID_ARGUMENT
    _, csr = make_key_and_csr("")
    assert (await enrol(registry, text, csr)).node_id


async def test_a_certificate_renews_with_its_own_key_only(registry: RunningRegistry) -> None:
    key, csr = make_key_and_csr("")
    first = await enrol(registry, await token(registry), csr)
    renewed = await renew(registry, first.certificate_pem, csr_for_key(key, ""))
    assert renewed.certificate_pem != first.certificate_pem
    _, other = make_key_and_csr("")
    assert await reason_of(renew(registry, first.certificate_pem, other)) is Reason.CERTIFICATE_INVALID


async def test_an_expired_certificate_renews_for_30_days(registry: RunningRegistry) -> None:
    key, csr = make_key_and_csr("")
    node = await enrol(registry, await token(registry), csr)
    uri = node_uri("prov_p", node.node_id)
    for days, works in ((29, True), (31, False)):
        old = registry.ca.sign_csr(csr, uri, lifetime=-timedelta(days=days)).certificate.decode()
        call = renew(registry, old, csr_for_key(key, ""))
        if works:
            assert (await call).certificate_pem
        else:
            assert await reason_of(call) is Reason.CERTIFICATE_INVALID


async def test_certificates_that_are_not_a_nodes_of_ours_do_not_renew(
    registry: RunningRegistry, tmp_path: Path
) -> None:
    key, csr = make_key_and_csr("")
    node = await enrol(registry, await token(registry), csr)
    stranger = FileCa.load_or_create(tmp_path / "stranger")
    of_a_stranger = stranger.sign_csr(csr, node_uri("prov_p", node.node_id)).certificate.decode()
    of_a_service = registry.ca.sign_csr(csr, "spiffe://gpumesh.local/service/router").certificate.decode()
    of_nobody = registry.ca.sign_csr(csr, node_uri("prov_p", "node_unknown")).certificate.decode()
    for wrong in (of_a_stranger, of_a_service, of_nobody, "", "no certificate"):
        assert await reason_of(renew(registry, wrong, csr_for_key(key, ""))) is Reason.CERTIFICATE_INVALID


async def test_a_revoked_node_neither_renews_nor_enrols_again(registry: RunningRegistry) -> None:
    text = await token(registry)
    key, csr = make_key_and_csr("")
    node = await enrol(registry, text, csr)
    operator: Any = AccountServiceStub(registry.operator())
    first = await unary(operator.RevokeNode, accounts.RevokeNodeRequest(node_id=node.node_id), 5)
    again = await unary(operator.RevokeNode, accounts.RevokeNodeRequest(node_id=node.node_id), 5)
    assert again == first
    assert await reason_of(renew(registry, node.certificate_pem, csr_for_key(key, ""))) is Reason.NODE_REVOKED
    assert await reason_of(enrol(registry, text, csr)) is Reason.NODE_REVOKED


async def test_operators_methods_are_not_served_on_the_public_listener(registry: RunningRegistry) -> None:
    stub: Any = AccountServiceStub(registry.anyone())
    assert await reason_of(unary(stub.ListAccounts, accounts.ListAccountsRequest(), 5)) is Reason.UNIMPLEMENTED
