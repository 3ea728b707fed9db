"""What the registry needs of its database. One implementation: postgres.py."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from gpumesh_registry.domain.catalogue import ModelEntry
from gpumesh_registry.domain.directory import DirectoryState, Part
from gpumesh_registry.domain.keys import ApiKey, KeyRecord
from gpumesh_registry.domain.owners import Account, Node, Provider


class Accounts(Protocol):
    """Accounts, keys, providers, nodes. Every method may raise Unavailable (DATABASE_UNAVAILABLE)."""

    async def create_account(self, account_id: str, name: str) -> Account:
        """The account; the first answer again for a repeat. Raises AlreadyExists when the id has another name."""

    async def list_accounts(self, limit: int, before: int | None) -> Sequence[Account]:
        """Newest first, of positions below `before`."""

    async def create_key(self, key_id: str, account_id: str, name: str, sha256: bytes) -> ApiKey:
        """Raises NotFound (no such account) or AlreadyExists (the id was used: its secret cannot be shown again)."""

    async def list_keys(self, account_id: str) -> Sequence[ApiKey]:
        """Newest first, revoked ones included. Raises NotFound."""

    async def revoke_key(self, key_id: str) -> ApiKey:
        """The key, revoked now or earlier. Raises NotFound."""

    async def create_provider(self, provider_id: str, name: str) -> Provider:
        """The provider; the first answer again for a repeat. Raises AlreadyExists when the id has another name."""

    async def create_enrolment_token(self, provider_id: str, sha256: bytes, expire_time: datetime) -> None:
        """Raises NotFound (no such provider)."""

    async def revoke_node(self, node_id: str) -> Node:
        """The node, revoked now or earlier. Raises NotFound."""


class Enrolments(Protocol):
    """Tokens and nodes, for the nodes' own door."""

    async def enrol_node(self, token_sha256: bytes, public_key_sha256: bytes, new_node_id: str, now: datetime) -> Node:
        """Uses a token: one transaction that locks it. Raises what domain.enrolment.use_token raises."""

    async def get_node(self, node_id: str) -> Node | None:
        """The node, or None."""

    async def node_renewed(self, node_id: str, now: datetime) -> None:
        """Writes down when a node last renewed."""


class Models(Protocol):
    """The catalogue."""

    async def put_model(self, entry: ModelEntry) -> ModelEntry:
        """As stored. Raises AlreadyExists (a name belongs to another model), InvalidArgument (unknown tokenizer), ResourceExhausted."""

    async def list_models(self) -> tuple[ModelEntry, ...]:
        """By id."""

    async def remove_model(self, model_id: str) -> None:
        """Raises NotFound."""

    async def put_tokenizer(self, sha256_hex: str, content: bytes) -> None:
        """Repetition is harmless."""

    def read_tokenizer(self, sha256_hex: str, chunk_bytes: int) -> AsyncIterator[bytes]:
        """The pieces of a tokenizer that a model of the catalogue uses. Raises NotFound."""


class DirectoryReader(Protocol):
    """What the directory service reads."""

    async def find_keys(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        """Those that exist, by id: one query however many."""

    async def directory(self, parts: frozenset[Part], base: DirectoryState) -> DirectoryState:
        """`base` with the given parts read again, all in one snapshot of the database."""

    async def listen(self, announced: Callable[[frozenset[Part]], None]) -> None:
        """Calls `announced` with what changed, first with every part once it listens. Returns or raises when the connection ends."""
