"""Certificates as gRPC wants them. One identity per process: a certificate, its key, and the CA that every peer must
chain to.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from gpumesh_runtime.identity import Identity, parse_spiffe

# GeneralName uniformResourceIdentifier: tag 0x86, one length byte (a URI of ours is shorter than 128), the URI (RFC 5280, 4.2.1.6).
_SAN_URI: Final = re.compile(rb"\x86([\x09-\x7f])(spiffe://[\x21-\x7e]*)")


@dataclass(frozen=True, slots=True)
class Pem:
    """Bytes of the three files at one moment."""

    certificate: bytes
    key: bytes
    ca: bytes


class TlsIdentity:
    """Three PEM files: certificate (chain), private key, CA. They are read again when they change.

    A client that has no certificate (public RPCs) leaves certificate and key empty and gives the CA alone.
    Raises OSError when a file cannot be read.
    """

    def __init__(self, cert_file: str | Path, key_file: str | Path, ca_file: str | Path) -> None:
        self.cert_file = Path(cert_file) if cert_file else None
        self.key_file = Path(key_file) if key_file else None
        self.ca_file = Path(ca_file)
        self._stamp: tuple[tuple[int, int, int], ...] = ()
        self._pem = self.pem()

    @classmethod
    def ca_only(cls, ca_file: str | Path) -> "TlsIdentity":
        """For a client of public RPCs: checks the server, shows no certificate."""
        return cls("", "", ca_file)

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        files = [path.stat() for path in (self.cert_file, self.key_file, self.ca_file) if path]
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in files)

    def pem(self) -> Pem:
        """The files' bytes, read again if any changed since the last call."""
        stamp = self._stat()
        if stamp != self._stamp:
            self._pem = Pem(
                self.cert_file.read_bytes() if self.cert_file else b"",
                self.key_file.read_bytes() if self.key_file else b"",
                self.ca_file.read_bytes(),
            )
            self._stamp = stamp
        return self._pem

    @property
    def identity(self) -> Identity:
        """Who this process is, from its own certificate. Raises Unauthenticated when it has no mesh identity."""
        # A scan for the URI in the DER, not an X.509 parser: it is our own file, and `cryptography` costs a process 8 MB.
        body = self.pem().certificate.partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END")[0]
        der = base64.b64decode(body)
        uris = [match[2][: match[1][0]] for match in _SAN_URI.finditer(der)]
        return parse_spiffe(uris[0].decode("ascii") if len(uris) == 1 else "")

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a client. Make them anew for each new channel, so that a renewed certificate is used."""
        pem = self.pem()
        return grpc.ssl_channel_credentials(pem.ca, pem.key or None, pem.certificate or None)

    def server_credentials(self, *, require_client_certificate: bool) -> grpc.ServerCredentials:
        """For a server. Each handshake uses the files as they are then; a half-written pair keeps the previous one."""
        last = self.pem()

        def config(pem: Pem) -> grpc.ServerCertificateConfiguration:
            roots = pem.ca if require_client_certificate else None
            return grpc.ssl_server_certificate_configuration([(pem.key, pem.certificate)], root_certificates=roots)

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal last
            try:
                now = self.pem()
            except OSError:
                return None  # being replaced at this moment: the previous pair stays in use
            if now is last:
                return None
            last = now
            return config(now)

        return grpc.dynamic_ssl_server_credentials(
            config(last),
            fetch,  # type: ignore[arg-type]  # gRPC documents None for "unchanged"; the stubs do not
            require_client_certificate,
        )
