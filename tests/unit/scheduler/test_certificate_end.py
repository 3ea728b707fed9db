"""The end of a certificate, compared with what a full X.509 library reads."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from gpumesh_runtime.identity import Role
from gpumesh_scheduler.certificate_end import certificate_end
from tests.support.certificates import Certificates


def test_it_reads_a_certificate_of_our_own_ca(tmp_path: Path) -> None:
    pem = Certificates(tmp_path).role(Role.NODE).pem().certificate
    assert certificate_end(pem) == x509.load_pem_x509_certificate(pem).not_valid_after_utc


@pytest.mark.parametrize("year", [1990, 2030, 2049, 2050, 2090])
def test_it_reads_both_forms_of_a_date(year: int) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x" * 60)])
    end = datetime(year, 3, 4, 5, 6, 7, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(2**150 + 1)
        .not_valid_before(end - timedelta(days=1))
        .not_valid_after(end)
        .sign(key, hashes.SHA256())
    )
    assert certificate_end(certificate.public_bytes(serialization.Encoding.PEM)) == end


@pytest.mark.parametrize(
    "pem",
    [
        b"",
        b"not a certificate",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----",
    ],
)
def test_what_is_no_certificate_has_no_end(pem: bytes) -> None:
    assert certificate_end(pem) is None
