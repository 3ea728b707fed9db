"""A certificate authority in a folder, for one machine: EC P-256, key files readable by their owner only.

On Kubernetes cert-manager takes its place; the registry uses `sign_csr` for nodes on both.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gpumesh_runtime.error_types import InvalidArgument
from gpumesh_runtime.files import write_private
from gpumesh_runtime.identity import parse_spiffe
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.tls import TlsIdentity

_BACKDATE: Final = timedelta(minutes=5)  # machines' clocks differ; a certificate must not be from their future
_CA_LIFETIME: Final = timedelta(days=3650)
_LEAF_LIFETIME: Final = timedelta(days=365)
_MAX_CSR_BYTES: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate (PEM, leaf only) and, when we made it, its key (PEM, PKCS 8; empty for a signed request)."""

    certificate: bytes
    key: bytes
    not_after: datetime
    serial: int


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_key_and_csr(uri: str) -> tuple[bytes, bytes]:
    """A new P-256 key and a signing request for `uri`, both PEM: what a node makes before it enrols."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _key_pem(key), csr_for_key(_key_pem(key), uri)


def csr_for_key(key_pem: bytes, uri: str) -> bytes:
    """A signing request for `uri` with an existing key (renewal), PEM."""
    key = serialization.load_pem_private_key(key_pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidArgument(Reason.CERTIFICATE_INVALID, "The key is not an elliptic-curve key.")
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uri:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False
        )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class FileCa:
    """ca.crt and ca.key in a folder. `load_or_create` makes them once, before any process starts."""

    def __init__(self, folder: str | Path) -> None:
        """Loads an existing CA. Raises FileNotFoundError when there is none."""
        self.folder = Path(folder)
        self.certificate_pem = (self.folder / "ca.crt").read_bytes()
        self._certificate = x509.load_pem_x509_certificate(self.certificate_pem)
        key = serialization.load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{self.folder / 'ca.key'} is not an elliptic-curve key")
        self._key = key

    @property
    def ca_file(self) -> Path:
        """The CA certificate, which every process trusts."""
        return self.folder / "ca.crt"

    @classmethod
    def load_or_create(cls, folder: str | Path, name: str = "gpumesh local CA") -> "FileCa":
        """The CA in `folder`, made first if there is none. The folder is made too, for its owner only."""
        path = Path(folder)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not ((path / "ca.crt").exists() and (path / "ca.key").exists()):
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = _self_signed(key, name)
            write_private(path / "ca.key", _key_pem(key))
            (path / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return cls(path)

    def issue(
        self,
        uri: str,
        *,
        dns: Sequence[str] = (),
        ip: Sequence[str] = (),
        lifetime: timedelta = _LEAF_LIFETIME,
    ) -> Issued:
        """A new key and certificate for a mesh identity; with dns or ip names it may also serve. Raises
        Unauthenticated for a foreign uri.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), uri, dns, ip, lifetime)
        return Issued(
            certificate.public_bytes(serialization.Encoding.PEM),
            _key_pem(key),
            certificate.not_valid_after_utc,
            certificate.serial_number,
        )

    def issue_files(
        self,
        stem: str | Path,
        uri: str,
        *,
        dns: Sequence[str] = ("localhost",),
        ip: Sequence[str] = ("127.0.0.1", "::1"),
        lifetime: timedelta = _LEAF_LIFETIME,
    ) -> TlsIdentity:
        """issue(), written to <stem>.crt and <stem>.key (0600). A relative stem is inside the CA's folder."""
        issued = self.issue(uri, dns=dns, ip=ip, lifetime=lifetime)
        certificate, key = self.folder / f"{stem}.crt", self.folder / f"{stem}.key"
        certificate.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(key, issued.key)
        write_private(certificate, issued.certificate)
        return TlsIdentity(certificate, key, self.ca_file)

    def sign_csr(self, csr_pem: bytes, uri: str, *, lifetime: timedelta = timedelta(hours=24)) -> Issued:
        """A client certificate for `uri` with the key of a signing request.

        Only the request's key is used; the identity is the caller's decision and whatever names the request asks for are ignored.
        Raises InvalidArgument (CERTIFICATE_INVALID) when it is malformed, its signature is wrong, or its key is not P-256.
        """
        key = _csr_key(csr_pem)
        certificate = self._sign(key, uri, (), (), lifetime)
        return Issued(
            certificate.public_bytes(serialization.Encoding.PEM),
            b"",
            certificate.not_valid_after_utc,
            certificate.serial_number,
        )

    def _sign(
        self, key: ec.EllipticCurvePublicKey, uri: str, dns: Sequence[str], ip: Sequence[str], lifetime: timedelta
    ) -> x509.Certificate:
        identity = parse_spiffe(uri)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
        names += [x509.DNSName(name) for name in dns]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in ip]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if dns or ip:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        now = datetime.now(UTC)
        not_after = min(now + lifetime, self._certificate.not_valid_after_utc)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now, not_after) - _BACKDATE)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _csr_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    bad = InvalidArgument(Reason.CERTIFICATE_INVALID, "The certificate signing request is not a valid P-256 request.")
    if len(csr_pem) > _MAX_CSR_BYTES:
        raise bad
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        valid = csr.is_signature_valid
    except (ValueError, InvalidSignature, TypeError) as err:
        raise bad from err
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise bad
    return key


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _self_signed(key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + _CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
