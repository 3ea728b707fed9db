"""API keys: `gm_live_<id>_<secret>_<crc32>`. The whole key is shown once; what is stored and compared is its SHA-256.

A plain hash is enough: the secret is 256 random bits, so there is nothing to guess, and a slow hash would cap throughput.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from gpumesh_runtime.error_types import Unauthenticated
from gpumesh_runtime.ids import base62, crc32_text
from gpumesh_runtime.reasons import Reason

PREFIX: Final = "gm_live_"
SECRET_BYTES: Final = 32
# How long a router may go on without asking again. Revocations are pushed, so this bounds only what a cut-off router can do.
CACHE_SECONDS: Final = 900


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as stored. sha256: of the whole key text, 32 bytes. revoke_time: None while it works."""

    key_id: str
    account_id: str
    name: str
    sha256: bytes = field(repr=False)
    create_time: datetime
    revoke_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What a lookup needs of a key and its account."""

    key_id: str
    account_id: str
    sha256: bytes = field(repr=False)
    revoked: bool = False
    suspended: bool = False


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """Whom a key belongs to and for how many seconds that may be cached."""

    key_id: str
    account_id: str
    cache_seconds: int = CACHE_SECONDS


def make(key_id: str, secret: bytes) -> str:
    """The key's text. secret: 32 random bytes. The checksum lets a client find a typing error before it asks anyone."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes")
    body = f"{PREFIX}{key_id}_{base62(secret)}"
    return f"{body}_{crc32_text(body)}"


def digest(text: str) -> bytes:
    """SHA-256 of the whole key."""
    return hashlib.sha256(text.encode()).digest()


def identify(record: KeyRecord | None, sha256: bytes) -> KeyIdentity:
    """Decides a lookup. An unknown id and a wrong secret look the same to the asker; only who has the key learns that it is revoked.

    Raises Unauthenticated (INVALID_API_KEY, REVOKED_API_KEY) or, for a suspended account, PermissionDenied.
    """
    if record is None or not hmac.compare_digest(record.sha256, sha256):
        raise Unauthenticated(Reason.INVALID_API_KEY, "The API key is not valid.")
    if record.revoked:
        raise Unauthenticated(Reason.REVOKED_API_KEY, "The API key was revoked.")
    if record.suspended:
        raise Unauthenticated.of(Reason.ACCOUNT_SUSPENDED, "The account is suspended.")
    return KeyIdentity(record.key_id, record.account_id)
