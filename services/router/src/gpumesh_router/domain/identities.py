"""API keys as this router knows them: answers of the registry, cached, with revocations applied at once."""

import hmac
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from gpumesh_runtime.error_types import MeshError, PermissionDenied, Unauthenticated
from gpumesh_runtime.reasons import Reason

MAX_CACHE_S: Final = 900.0
"""A cached identity is asked for again after this at the latest (architecture.md 4: the registry may be away that long)."""
REFUSAL_CACHE_S: Final = 5.0
"""A refused key is asked for again after this: a key that was just created must not stay refused."""
_MAX_ENTRIES: Final = 100_000
_MAX_REFUSALS: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    account_id: str
    expires: float


@dataclass(slots=True)
class Identities:
    """key id -> account, least recently stored first to go. Times: monotonic seconds."""

    _known: OrderedDict[str, _Known] = field(default_factory=OrderedDict)
    _refused: OrderedDict[bytes, tuple[MeshError, float]] = field(default_factory=OrderedDict)
    _revoked: set[str] = field(default_factory=set)
    _suspended: set[str] = field(default_factory=set)

    def account_of(self, key_id: str, digest: bytes, now: float) -> str | None:
        """The key's account, or None when the registry must be asked. `digest`: SHA-256 of the whole key.

        Raises Unauthenticated (REVOKED_API_KEY, INVALID_API_KEY) or PermissionDenied (ACCOUNT_SUSPENDED).
        """
        if key_id in self._revoked:
            raise Unauthenticated(Reason.REVOKED_API_KEY, "This API key was revoked. Use another one.")
        known = self._known.get(key_id)
        if known is not None and known.expires > now:
            if hmac.compare_digest(known.digest, digest):
                if known.account_id in self._suspended:
                    raise PermissionDenied(Reason.ACCOUNT_SUSPENDED, "This account is suspended. Ask the operator.")
                return known.account_id
            raise Unauthenticated(Reason.INVALID_API_KEY, "The API key is wrong. Check it for a missing character.")
        refused = self._refused.get(digest)
        if refused is not None and refused[1] > now:
            raise refused[0]
        return None

    def remember(self, key_id: str, digest: bytes, account_id: str, cache_s: float, now: float) -> None:
        """Stores the registry's yes."""
        self._known[key_id] = _Known(digest, account_id, now + min(cache_s, MAX_CACHE_S))
        self._known.move_to_end(key_id)
        if len(self._known) > _MAX_ENTRIES:
            self._known.popitem(last=False)

    def refuse(self, digest: bytes, error: MeshError, now: float) -> None:
        """Stores the registry's no."""
        self._refused[digest] = (error, now + REFUSAL_CACHE_S)
        if len(self._refused) > _MAX_REFUSALS:
            self._refused.popitem(last=False)

    def revoke(self, key_ids: list[str]) -> None:
        """Refuses these keys from now on."""
        for key_id in key_ids:
            self._revoked.add(key_id)
            self._known.pop(key_id, None)

    def suspend(self, account_ids: list[str]) -> None:
        """Refuses these accounts from now on."""
        self._suspended.update(account_ids)

    def restore(self, account_ids: list[str]) -> None:
        """Lets these accounts in again."""
        self._suspended.difference_update(account_ids)
