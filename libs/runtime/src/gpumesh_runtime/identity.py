"""Who is at the other end of a connection: the SPIFFE URI in its certificate, parsed. Pure, except for
peer_identity, which reads a gRPC context.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, Protocol

from gpumesh_runtime.error_types import Unauthenticated
from gpumesh_runtime.reasons import Reason

TRUST_DOMAIN: Final = "gpumesh.local"
_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_SERVICE: Final = re.compile(rf"service/(edge|router|registry|metering|scheduler)(?:/({_NAME}))?")
_NODE: Final = re.compile(rf"provider/({_NAME})/node/({_NAME})")
_OPERATOR: Final = re.compile(rf"operator/({_NAME})")


class Role(IntEnum):
    """What an identity is. The numbers are those of gpumesh.common.v1.Role (a test compares them)."""

    PUBLIC = 1
    EDGE = 2
    ROUTER = 3
    REGISTRY = 4
    METERING = 5
    SCHEDULER = 6
    NODE = 7
    OPERATOR = 8


@dataclass(frozen=True, slots=True)
class Identity:
    """An authenticated peer.

    role: what it is. name: "router", the node's or operator's name, or "public". uri: its SPIFFE URI, empty for PUBLIC.
    provider_id, node_id: of a node, else empty. instance: of a service, else empty.
    """

    role: Role
    name: str
    uri: str = ""
    provider_id: str = ""
    node_id: str = ""
    instance: str = ""


PUBLIC: Final = Identity(Role.PUBLIC, "public")


def service_uri(service: str, instance: str = "", domain: str = TRUST_DOMAIN) -> str:
    """spiffe://<domain>/service/<service>[/<instance>]."""
    return f"spiffe://{domain}/service/{service}" + (f"/{instance}" if instance else "")


def node_uri(provider_id: str, node_id: str, domain: str = TRUST_DOMAIN) -> str:
    """spiffe://<domain>/provider/<provider>/node/<node>."""
    return f"spiffe://{domain}/provider/{provider_id}/node/{node_id}"


def operator_uri(name: str, domain: str = TRUST_DOMAIN) -> str:
    """spiffe://<domain>/operator/<name>."""
    return f"spiffe://{domain}/operator/{name}"


def parse_spiffe(uri: str, domain: str = TRUST_DOMAIN) -> Identity:
    """A SPIFFE URI as an identity. Raises Unauthenticated (CERTIFICATE_INVALID) for anything that is not exactly one
    of ours.
    """
    prefix = f"spiffe://{domain}/"
    path = uri.removeprefix(prefix)
    if path != uri:
        if match := _SERVICE.fullmatch(path):
            return Identity(Role[match[1].upper()], match[1], uri, instance=match[2] or "")
        if match := _NODE.fullmatch(path):
            return Identity(Role.NODE, match[2], uri, provider_id=match[1], node_id=match[2])
        if match := _OPERATOR.fullmatch(path):
            return Identity(Role.OPERATOR, match[1], uri)
    raise Unauthenticated(Reason.CERTIFICATE_INVALID, "The certificate does not name an identity of this mesh.")


@lru_cache(maxsize=4096)  # one entry per peer; unary calls and new links of the same peer do not parse again
def _cached(uri: bytes) -> Identity:
    try:
        return parse_spiffe(uri.decode("ascii"))
    except UnicodeDecodeError:
        raise Unauthenticated(
            Reason.CERTIFICATE_INVALID, "The certificate does not name an identity of this mesh."
        ) from None


class HasAuthContext(Protocol):
    """The part of a gRPC servicer context that identity needs."""

    def auth_context(self) -> Any:
        """Property name -> list of values, as gRPC gives them."""


def peer_identity(context: HasAuthContext) -> Identity:
    """Who called. PUBLIC when there is no client certificate; Unauthenticated when there is one that is not of this
    mesh.

    gRPC verified the chain during the handshake; peer_spiffe_id is present only for a certificate with exactly one
    SPIFFE URI.
    """
    auth = context.auth_context()
    uris = auth.get("peer_spiffe_id") or auth.get("peer_uri")
    if uris:
        if len(uris) == 1:
            return _cached(bytes(uris[0]))
    elif not auth.get("x509_pem_cert"):
        return PUBLIC
    raise Unauthenticated(Reason.CERTIFICATE_INVALID, "The certificate does not name exactly one identity.")


def peer_certificate_pem(context: HasAuthContext) -> bytes:
    """The client's certificate, PEM; empty without one. For its end date: keep it when a long stream opens."""
    values = context.auth_context().get("x509_pem_cert")
    return bytes(values[0]) if values else b""
