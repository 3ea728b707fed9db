"""The directory's links: key lookups answered, and every reader's copy kept in step with the database.

State, not events: the database announces which part changed, the part is read again, and the difference goes to every link.
After a break everything is read again, so that no announcement can be lost. Several registries stay in step the same way.
"""

import asyncio
from typing import Final

from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.registry.v1 import directory_service_pb2 as pb
from gpumesh_registry import wire
from gpumesh_registry.domain import directory
from gpumesh_registry.domain.checks import is_key_id
from gpumesh_registry.domain.directory import Change, DirectoryState, Part
from gpumesh_registry.domain.keys import KeyIdentity
from gpumesh_registry.lookup import KeyLookup
from gpumesh_registry.store import DirectoryReader
from gpumesh_runtime.errors import Cancelled, MeshError, PermissionDenied, Reason, Unauthenticated, as_mesh_error
from gpumesh_runtime.health import Health
from gpumesh_runtime.identity import Role
from gpumesh_runtime.link import Link, LinkEnd
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.metrics import counter, gauge

_EVERYTHING: Final = frozenset(Part)
# Announcements of this long are read together: a burst of revocations costs one query.
_SETTLE_S: Final = 0.01
_RETRY_S: Final = 0.2
_log: Final = get_logger("gpumesh.registry.directory")
_LINKS: Final = gauge("gpumesh_registry_directory_links", "Routers and schedulers that follow the directory").cell
_UPDATES: Final = counter("gpumesh_registry_directory_updates_total", "Updates pushed to readers").cell
_RELOADS: Final = counter("gpumesh_registry_directory_reloads_total", "Readings of the database after a change").cell


class DirectoryHub:
    """The state that readers have, and the links to them. A link's Receiver."""

    def __init__(self, store: DirectoryReader, lookup_window_s: float, health: Health) -> None:
        self._store = store
        self._health = health
        self._state = DirectoryState()
        self._loaded = False
        self._links: set[Link] = set()
        self._stale: set[Part] = set()
        self._changed = asyncio.Event()
        self.lookup = KeyLookup(store, lookup_window_s, self.is_revoked)

    @property
    def loaded(self) -> bool:
        """Whether the state has been read at least once."""
        return self._loaded

    def is_revoked(self, key_id: str) -> bool:
        """Whether the key was revoked within the last minutes."""
        return key_id in self._state.revoked_keys

    # --- links ------------------------------------------------------------------------------------------------------

    def on_up(self, link: Link, hello: bytes) -> None:
        """A reader is there: it gets everything, unless there is nothing yet; then it gets it with the first reading."""
        self._links.add(link)
        _LINKS.set(len(self._links))
        if self._loaded:
            self._send(link, directory.whole(self._state))

    def on_item(self, link: Link, item: Item) -> None:
        """Answers LookupKey. A Cancel needs nothing: the answer is on its way or forgotten by the link."""
        if item.kind != ItemKind.ITEM_KIND_CALL:
            return
        if link.peer.role is not Role.ROUTER:
            raise PermissionDenied(Reason.PERMISSION_DENIED, "Only routers look keys up.")
        asked = pb.LookupKey.FromString(item.body)
        if not is_key_id(asked.key_id):
            raise Unauthenticated(Reason.INVALID_API_KEY, "The API key is not valid.")
        call_id = item.id

        def done(identity: KeyIdentity | None, error: MeshError | None) -> None:
            if identity is not None:
                link.reply(call_id, wire.identity_to_wire(identity))
            else:
                link.fail(call_id, error or Cancelled(Reason.CANCELLED))

        self.lookup.ask(asked.key_id, asked.key_sha256, done)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """A reader that drains still gets changes until it closes."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """The reader asks again when it is back."""
        self._links.discard(link)
        _LINKS.set(len(self._links))

    # --- the database -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the state in step, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._reload())

    def _announced(self, parts: frozenset[Part]) -> None:
        self._stale |= parts
        self._changed.set()

    async def _listen(self) -> None:
        while True:
            try:
                await self._store.listen(self._announced)
            except Exception as err:  # noqa: BLE001, RUF100 -- the database comes back; until then readers keep their copies
                self._health.set("database", "unreachable")
                _log.warning("directory does not hear the database", reason=as_mesh_error(err).reason.value)
            await asyncio.sleep(_RETRY_S)

    async def _reload(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SETTLE_S)
            parts = frozenset(self._stale) if self._loaded else _EVERYTHING
            self._stale.clear()
            self._changed.clear()
            try:
                new = await self._store.directory(parts, self._state)
                _RELOADS.add()
                self._health.set("database")
            except Exception as err:  # noqa: BLE001, RUF100 -- as above
                _log.warning("directory cannot read the database", reason=as_mesh_error(err).reason.value)
                self._announced(parts)
                await asyncio.sleep(_RETRY_S)
                continue
            self._become(new)

    def _become(self, new: DirectoryState) -> None:
        changes = directory.difference(self._state, new) if self._loaded else directory.whole(new)
        self._state, self._loaded = new, True
        for link in tuple(self._links):
            self._send(link, changes)

    @staticmethod
    def _send(link: Link, changes: list[Change]) -> None:
        if link.end is None:
            for change in changes:
                link.send_new(ItemKind.ITEM_KIND_UPDATE, body=wire.change_to_wire(change))
                _UPDATES.add()
