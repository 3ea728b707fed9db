"""What readers of the directory keep a copy of, and how one state differs from the next."""

from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Final

from gpumesh_registry.domain.catalogue import ModelEntry

# A reader caches a key no longer than keys.CACHE_SECONDS, so older revocations tell it nothing. A minute to spare.
REVOKED_KEYS_FOR: Final = timedelta(minutes=16)
# A node's certificate lives 24 h, so after that the handshake itself refuses.
REVOKED_NODES_FOR: Final = timedelta(hours=25)


class Part(StrEnum):
    """The parts of the state; each is read again when the database announces it."""

    MODELS = "models"
    KEYS = "keys"
    ACCOUNTS = "accounts"
    NODES = "nodes"


@dataclass(frozen=True, slots=True)
class DirectoryState:
    """All that a reader needs at the start. models: by id."""

    models: tuple[ModelEntry, ...] = ()
    revoked_keys: frozenset[str] = frozenset()
    suspended_accounts: frozenset[str] = frozenset()
    revoked_nodes: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Change:
    """What a reader must apply. models: None when the catalogue stays as it is. Repetition is harmless."""

    models: tuple[ModelEntry, ...] | None = None
    revoked_keys: tuple[str, ...] = ()
    suspended_accounts: tuple[str, ...] = ()
    restored_accounts: tuple[str, ...] = ()
    revoked_nodes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self != _NOTHING


_NOTHING: Final = Change()
# Ids of each kind in one update: four kinds of at most 64 bytes stay within the 256 KiB of an item, beside the whole catalogue.
_IDS_PER_KIND: Final = 200


def whole(state: DirectoryState) -> list[Change]:
    """The state as changes for a reader that has nothing."""
    return _split(
        Change(
            models=state.models,
            revoked_keys=tuple(sorted(state.revoked_keys)),
            suspended_accounts=tuple(sorted(state.suspended_accounts)),
            revoked_nodes=tuple(sorted(state.revoked_nodes)),
        )
    )


def difference(old: DirectoryState, new: DirectoryState) -> list[Change]:
    """What takes a reader from `old` to `new`. A revocation that only grew too old to matter is no change."""
    return _split(
        Change(
            models=None if old.models == new.models else new.models,
            revoked_keys=tuple(sorted(new.revoked_keys - old.revoked_keys)),
            suspended_accounts=tuple(sorted(new.suspended_accounts - old.suspended_accounts)),
            restored_accounts=tuple(sorted(old.suspended_accounts - new.suspended_accounts)),
            revoked_nodes=tuple(sorted(new.revoked_nodes - old.revoked_nodes)),
        )
    )


def _split(change: Change) -> list[Change]:
    """Bounds the size of each update. The first carries the catalogue."""
    longest = max(
        len(change.revoked_keys),
        len(change.suspended_accounts),
        len(change.restored_accounts),
        len(change.revoked_nodes),
    )
    if longest <= _IDS_PER_KIND:
        return [change] if change else []
    parts = []
    for start in range(0, longest, _IDS_PER_KIND):
        cut = slice(start, start + _IDS_PER_KIND)
        parts.append(
            replace(
                change,
                models=change.models if start == 0 else None,
                revoked_keys=change.revoked_keys[cut],
                suspended_accounts=change.suspended_accounts[cut],
                restored_accounts=change.restored_accounts[cut],
                revoked_nodes=change.revoked_nodes[cut],
            )
        )
    return parts
