"""When a peer's certificate ends, read from its PEM with nothing but the standard library.

TLS has verified the certificate; only one date is wanted of it, and importing a whole X.509 library for that costs 10 MB a process.
"""

import base64
import binascii
from datetime import UTC, datetime
from typing import Final

_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18


def certificate_end(pem: bytes) -> datetime | None:
    """notAfter of the first certificate (RFC 5280, 4.1); None when there is none to be found."""
    try:
        body = pem.split(b"-----BEGIN CERTIFICATE-----", 1)[1].split(b"-----END CERTIFICATE-----", 1)[0]
        certificate = _expect(_SEQUENCE, base64.b64decode(b"".join(body.split()), validate=True), 0)
        to_be_signed = _expect(_SEQUENCE, certificate[0], 0)[0]
        tag, _, at = _read(to_be_signed, 0)
        if tag != _VERSION:
            at = 0
        for _ in range(3):  # serial number, signature algorithm, issuer
            _, _, at = _read(to_be_signed, at)
        validity, _ = _expect(_SEQUENCE, to_be_signed, at)
        _, _, at = _read(validity, 0)  # notBefore
        tag, value, _ = _read(validity, at)
        return _time(tag, value.decode("ascii"))
    except (IndexError, ValueError, binascii.Error):
        return None


def _read(data: bytes, at: int) -> tuple[int, bytes, int]:
    """(tag, content, where the next element begins). Raises IndexError or ValueError for what is not DER."""
    tag, size, at = data[at], data[at + 1], at + 2
    if size & 0x80:
        count = size & 0x7F
        size = int.from_bytes(data[at : at + count], "big")
        at += count
    end = at + size
    if end > len(data):
        raise ValueError("cut short")
    return tag, data[at:end], end


def _expect(tag: int, data: bytes, at: int) -> tuple[bytes, int]:
    found, content, end = _read(data, at)
    if found != tag:
        raise ValueError("not a certificate")
    return content, end


def _time(tag: int, text: str) -> datetime:
    if tag == _UTC_TIME:
        # Two digits of the year: 50-99 are 19xx (RFC 5280, 4.1.2.5.1).
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("not a time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
