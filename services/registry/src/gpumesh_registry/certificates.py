"""Certificates of nodes: reading requests and old certificates, signing new ones. The rules are in domain.enrolment."""

import asyncio
import hashlib
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpumesh_registry.domain import enrolment
from gpumesh_registry.domain.checks import invalid
from gpumesh_registry.domain.enrolment import OldCertificate
from gpumesh_runtime.ca import FileCa, Issued
from gpumesh_runtime.errors import MeshError
from gpumesh_runtime.identity import Role, node_uri, parse_spiffe

_MAX_CSR_BYTES: Final = 4096
_MAX_PEM_BYTES: Final = 16_384


def _key_sha256(key: object) -> bytes:
    """SHA-256 of a key's SubjectPublicKeyInfo. Raises ValueError for anything but P-256."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a P-256 key")
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


class Csr:
    """A certificate request that parses, is signed by its own key, and asks for a P-256 key. Raises InvalidArgument."""

    def __init__(self, der: bytes) -> None:
        wrong = invalid("csr_der", "csr_der is not a PKCS#10 request with a valid signature by a P-256 key.")
        if not 0 < len(der) <= _MAX_CSR_BYTES:
            raise wrong
        try:
            csr = x509.load_der_x509_csr(der)
            valid = csr.is_signature_valid
            self.key_sha256 = _key_sha256(csr.public_key())
        except (ValueError, TypeError, InvalidSignature) as err:
            raise wrong from err
        if not valid:
            raise wrong
        self.pem = csr.public_bytes(Encoding.PEM)


class NodeCertificates:
    """The CA as the registry uses it. Signing runs in a thread: it costs a millisecond, which a link should not wait for."""

    def __init__(self, ca: FileCa) -> None:
        self._ca = ca
        self._root = x509.load_pem_x509_certificate(ca.certificate_pem)

    @property
    def ca_pem(self) -> str:
        """What nodes check schedulers against."""
        return self._ca.certificate_pem.decode()

    async def sign(self, csr: Csr, provider_id: str, node_id: str) -> Issued:
        """A client certificate of 24 h for the request's key."""
        uri = node_uri(provider_id, node_id)
        return await asyncio.to_thread(self._ca.sign_csr, csr.pem, uri, lifetime=enrolment.CERTIFICATE_LIFETIME)

    def read_old(self, pem: str) -> OldCertificate:
        """A node's certificate that our CA signed, expired or not. Raises CERTIFICATE_INVALID."""
        if len(pem) > _MAX_PEM_BYTES:
            raise enrolment.certificate_refused()
        try:
            certificate = x509.load_pem_x509_certificate(pem.encode())
            certificate.verify_directly_issued_by(self._root)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
            identity = parse_spiffe(uri)
            key_sha256 = _key_sha256(certificate.public_key())
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, MeshError) as err:
            raise enrolment.certificate_refused() from err
        if identity.role is not Role.NODE:
            raise enrolment.certificate_refused()
        not_after: datetime = certificate.not_valid_after_utc
        return OldCertificate(identity.provider_id, identity.node_id, not_after, key_sha256)
