"""A CA and a certificate of every role, for tests that run real TLS."""

from pathlib import Path

from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import Role, node_uri, operator_uri, service_uri
from gpumesh_runtime.tls import TlsIdentity

URIS = {
    Role.EDGE: service_uri("edge"),
    Role.ROUTER: service_uri("router"),
    Role.REGISTRY: service_uri("registry"),
    Role.METERING: service_uri("metering"),
    Role.SCHEDULER: service_uri("scheduler", "s1"),
    Role.NODE: node_uri("acme", "gpu-1"),
    Role.OPERATOR: operator_uri("eve"),
}


class Certificates:
    """One CA in a folder; certificates are made when first asked for and may all serve on localhost."""

    def __init__(self, folder: Path) -> None:
        self.ca = FileCa.load_or_create(folder)
        self._made: dict[str, TlsIdentity] = {}

    def role(self, role: Role) -> TlsIdentity:
        """A certificate of that role; for PUBLIC the CA alone."""
        return TlsIdentity.ca_only(self.ca.ca_file) if role is Role.PUBLIC else self.uri(URIS[role])

    def uri(self, uri: str) -> TlsIdentity:
        """A certificate of that identity."""
        if uri not in self._made:
            self._made[uri] = self.ca.issue_files(f"identity-{len(self._made)}", uri)
        return self._made[uri]
