"""The registry's enrolment side, as far as a node sees it: public TLS, a CA, tokens, and refusals on demand."""

from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gpumesh.registry.v1 import enrolment_service_pb2 as enrolment
from gpumesh.registry.v1 import enrolment_service_pb2_grpc
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.identity import node_uri, service_uri
from gpumesh_runtime.rpc.server import Server


class FakeRegistry(enrolment_service_pb2_grpc.EnrolmentServiceServicer):
    """Enrols one node ("n1" of "p1") for the token "token". Async context manager. lifetime: of certificates."""

    def __init__(self, ca: FileCa, schedulers: list[str], lifetime: timedelta = timedelta(hours=24)) -> None:
        self.lifetime = lifetime
        self.keys: set[bytes] = set()
        self.enrolments = 0
        self.renewals = 0
        self.refuse: Reason | None = None
        self._ca = ca
        self._schedulers = schedulers
        self._server = Server(
            "fake-registry", "localhost:0", ca.issue_files("registry", service_uri("registry")), public=True
        )
        self._server.add(self, enrolment_service_pb2_grpc.add_EnrolmentServiceServicer_to_server)

    async def __aenter__(self) -> "FakeRegistry":
        await self._server.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._server.stop(0)

    @property
    def address(self) -> str:
        """host:port."""
        return f"localhost:{self._server.port}"

    def _sign(self, csr_der: bytes) -> tuple[str, Any]:
        csr = x509.load_der_x509_csr(csr_der).public_bytes(serialization.Encoding.PEM)
        issued = self._ca.sign_csr(csr, node_uri("p1", "n1"), lifetime=self.lifetime)
        return issued.certificate.decode(), issued.not_after

    async def EnrolNode(self, request: enrolment.EnrolNodeRequest, context: Any) -> enrolment.EnrolNodeResponse:
        """Enrols."""
        if self.refuse is not None:
            raise MeshError.of(self.refuse)
        if request.enrolment_token != "token":
            raise MeshError.of(Reason.ENROLMENT_TOKEN_INVALID)
        self.enrolments += 1
        certificate, end = self._sign(request.csr_der)
        answer = enrolment.EnrolNodeResponse(
            node_id="n1",
            provider_id="p1",
            certificate_pem=certificate,
            ca_pem=self._ca.certificate_pem.decode(),
            scheduler_addresses=self._schedulers,
        )
        answer.expire_time.FromDatetime(end)
        return answer

    async def RenewCertificate(
        self, request: enrolment.RenewCertificateRequest, context: Any
    ) -> enrolment.RenewCertificateResponse:
        """Renews."""
        if self.refuse is not None:
            raise MeshError.of(self.refuse)
        assert "BEGIN CERTIFICATE" in request.certificate_pem
        self.renewals += 1
        certificate, end = self._sign(request.csr_der)
        answer = enrolment.RenewCertificateResponse(
            certificate_pem=certificate, ca_pem=self._ca.certificate_pem.decode()
        )
        answer.expire_time.FromDatetime(end)
        return answer
