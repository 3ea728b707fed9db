"""How a node enters: a one-time token, bound on first use to the key that came with it, so that a repeat is harmless."""

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from gpumesh_registry.domain.checks import invalid
from gpumesh_registry.domain.owners import Node
from gpumesh_runtime.error_types import MeshError, Unauthenticated
from gpumesh_runtime.ids import base62, crc32_text
from gpumesh_runtime.reasons import Reason

TOKEN_PREFIX: Final = "gm_enrol_"  # noqa: S105 -- the public prefix of a token, not a token
TOKEN_BYTES: Final = 32
_DEFAULT_LIFETIME_S: Final = 600
_MIN_LIFETIME_S: Final = 60
_MAX_LIFETIME_S: Final = 86_400
CERTIFICATE_LIFETIME: Final = timedelta(hours=24)
# Laptops sleep: a certificate that ended less than this ago still renews, with its key.
RENEW_WITHIN: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token as stored. node: the node it made on first use; None while unused."""

    provider_id: str
    expire_time: datetime
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class OldCertificate:
    """What a renewal shows: a certificate that our CA signed, read."""

    provider_id: str
    node_id: str
    not_after: datetime
    public_key_sha256: bytes = field(repr=False)


def lifetime(seconds: int) -> timedelta:
    """How long a token works: 60 s to a day, 0 means 10 min. Raises InvalidArgument."""
    if seconds and not _MIN_LIFETIME_S <= seconds <= _MAX_LIFETIME_S:
        raise invalid(
            "lifetime_s", f"lifetime_s must be {_MIN_LIFETIME_S} to {_MAX_LIFETIME_S}, or 0 for {_DEFAULT_LIFETIME_S}."
        )
    return timedelta(seconds=seconds or _DEFAULT_LIFETIME_S)


def make_token(secret: bytes) -> str:
    """The token's text. secret: 32 random bytes."""
    body = f"{TOKEN_PREFIX}{base62(secret)}"
    return f"{body}_{crc32_text(body)}"


def token_digest(token: str) -> bytes:
    """SHA-256 under which a token is stored. Raises Unauthenticated for what is not a token at all."""
    body, _, checksum = token.rpartition("_")
    if not body.startswith(TOKEN_PREFIX) or len(token) > 100 or checksum != crc32_text(body):
        raise token_refused()
    return hashlib.sha256(token.encode()).digest()


def token_refused() -> Unauthenticated:
    """Unknown, used and expired look the same to a stranger."""
    return Unauthenticated(
        Reason.ENROLMENT_TOKEN_INVALID, "The enrolment token is unknown, used or expired; ask for a new one."
    )


def node_revoked() -> MeshError:
    """A revoked node gets no certificate."""
    return MeshError.of(Reason.NODE_REVOKED, "This node was revoked; its certificate cannot be renewed.")


def use_token(record: TokenRecord | None, public_key_sha256: bytes, now: datetime) -> Node | None:
    """Decides an enrolment: the node that this token already made with this key, or None: make one.

    A repeat after the token's end is answered too, for as long as the node's key is the same: the first answer may have been lost.
    Raises Unauthenticated (ENROLMENT_TOKEN_INVALID, NODE_REVOKED).
    """
    if record is None:
        raise token_refused()
    if record.node is not None:
        if record.node.public_key_sha256 != public_key_sha256:
            raise token_refused()
        if record.node.revoke_time is not None:
            raise node_revoked()
        return record.node
    if record.expire_time <= now:
        raise token_refused()
    return None


def may_renew(old: OldCertificate, node: Node | None, csr_key_sha256: bytes, now: datetime) -> None:
    """Decides a renewal. Raises CERTIFICATE_INVALID (too old, another key, unknown node) or NODE_REVOKED."""
    if node is not None and node.revoke_time is not None:
        raise node_revoked()
    if (
        node is None
        or node.provider_id != old.provider_id
        or old.public_key_sha256 != csr_key_sha256
        or now > old.not_after + RENEW_WITHIN
    ):
        raise certificate_refused()


def certificate_refused() -> MeshError:
    """The old certificate does not entitle to a new one."""
    return MeshError.of(
        Reason.CERTIFICATE_INVALID, "The certificate is not ours, is too old, or belongs to another key; enrol again."
    )
