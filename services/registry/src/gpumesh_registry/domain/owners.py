"""Buyers' accounts, providers and nodes as stored."""

from dataclasses import dataclass, field
from datetime import datetime

from gpumesh_runtime.error_types import AlreadyExists
from gpumesh_runtime.reasons import Reason


@dataclass(frozen=True, slots=True)
class Account:
    """A buyer. position: grows with each new account, for paging."""

    account_id: str
    name: str
    create_time: datetime
    suspended: bool = False
    position: int = 0


@dataclass(frozen=True, slots=True)
class Provider:
    """Who owns nodes."""

    provider_id: str
    name: str
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Node:
    """A provider's machine. public_key_sha256: of the key's SubjectPublicKeyInfo, 32 bytes."""

    node_id: str
    provider_id: str
    public_key_sha256: bytes = field(repr=False)
    create_time: datetime
    revoke_time: datetime | None = None


def same_or_conflict(stored_name: str, asked_name: str, param: str) -> None:
    """Ids come from callers: a repeat with the same fields is the first answer again. Raises AlreadyExists when fields differ."""
    if stored_name != asked_name:
        raise AlreadyExists(
            Reason.ALREADY_EXISTS,
            f"This {param} is in use with another name; make a new one.",
            metadata={"param": param},
        )
