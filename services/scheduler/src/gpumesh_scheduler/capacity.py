"""CapacityService: what this scheduler can take, pushed to routers. A snapshot at once, changes every 200 ms, the whole each second."""

from typing import Final

from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.scheduler.v1.capacity_service_pb2 import Capacity, CapacityWelcome, ModelCapacity
from gpumesh_runtime.link import Link, LinkEnd, LinkProtocolError
from gpumesh_runtime.logs import get_logger
from gpumesh_scheduler.desk import Desk
from gpumesh_scheduler.domain.nouns import ModelKey
from gpumesh_scheduler.domain.pools import Capacity as PoolCapacity
from gpumesh_scheduler.wire import capacity_to_wire

log = get_logger("gpumesh.scheduler.capacity")

_NOTHING: Final = PoolCapacity(0, 0, 0, 0, frozenset())


class Watchers:
    """Receiver of all routers' capacity links, and what is told to them."""

    def __init__(self, desk: Desk, dispatch_address: str) -> None:
        self._desk = desk
        self.links: set[Link] = set()
        self.advertise(dispatch_address)

    def advertise(self, dispatch_address: str) -> None:
        """Sets what Welcome tells: where callers reach this scheduler, host:port."""
        desk = self._desk
        self._welcome = CapacityWelcome(
            scheduler_id=desk.scheduler_id, scheduler_boot_id=desk.boot_id, dispatch_address=dispatch_address
        ).SerializeToString()

    def welcome(self, body: bytes, peer: object) -> bytes:
        """Body of Welcome."""
        del body, peer
        return self._welcome

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """A router watches: it gets everything."""
        del hello_or_welcome
        self.links.add(link)
        link.send(self._item(self._whole()))
        log.info("router watches", peer=link.peer.uri)

    def on_item(self, link: Link, item: Item) -> None:
        """Routers only listen."""
        raise LinkProtocolError("a watcher sends nothing")

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The router stops."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """One less."""
        self.links.discard(link)

    def tell_changes(self) -> None:
        """Models whose capacity changed since the last call."""
        changed = self._desk.board.pools.changed
        if changed:
            keys = list(changed)
            changed.clear()
            if self.links:
                self._tell(Capacity(models=[self._model(key) for key in keys], draining=self._desk.board.draining))

    def tell_whole(self) -> None:
        """Everything, changed or not: a lost update costs a second at most."""
        self._desk.board.pools.changed.clear()
        if self.links:
            self._tell(self._whole())

    def _tell(self, capacity: Capacity) -> None:
        item = self._item(capacity)
        for link in self.links:
            link.send(item)

    @staticmethod
    def _item(capacity: Capacity) -> Item:
        return Item(kind=ItemKind.ITEM_KIND_UPDATE, body=capacity.SerializeToString())

    def _whole(self) -> Capacity:
        board = self._desk.board
        keys = {*board.pools.pools, *board.queue.models()}
        return Capacity(models=[self._model(key) for key in sorted(keys)], whole=True, draining=board.draining)

    def _model(self, key: ModelKey) -> ModelCapacity:
        board = self._desk.board
        pool = board.pools.pools.get(key)
        queued_tokens = sum(job.terms.cost for job in board.queue.waiting(key))
        return capacity_to_wire(
            key, pool.capacity() if pool is not None else _NOTHING, board.queued(key), queued_tokens
        )
