"""What routers know of balances and prices: lookups answered in groups, changes pushed to those who asked.

A router asks once per account and is told of each change afterwards, within 250 ms, for as long as its link lives. A
busy account changes a hundred times a second: only the last value of each quarter second travels. Versions let the
reader drop what is older than what it has, so the order of lookups and pushes does not matter.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh.metering.v1.balance_service_pb2 import LookupBalance
from gpumesh_metering import wire
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.store import BuyerBalance, LedgerStore
from gpumesh_runtime.errors import InvalidArgument, MeshError, Reason, Unavailable
from gpumesh_runtime.link import Goodbye, Link, LinkEnd
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.metrics import counter, gauge

log = get_logger("gpumesh.metering.balances")

LOOKUP_S: Final = 0.002  # lookups that come within this share a query
PUSH_S: Final = 0.2  # changes wait this long for more; with the link's 50 ms for background items that makes 250 ms
MAX_WATCHED: Final = (
    200_000  # accounts per router; the oldest is forgotten beyond it (the router asks again when its copy ages)
)
MAX_ACCOUNT_CHARACTERS: Final = 200
_UPDATE_ROWS: Final = 1_000  # balances in one item: about 50 KB

_LOOKUPS: Final = counter("gpumesh_metering_balance_lookups_total", "Balances that routers asked for").cell
_PUSHED: Final = counter("gpumesh_metering_balances_pushed_total", "Changed balances sent to routers").cell
_ROUTERS: Final = gauge("gpumesh_metering_router_links", "Links from routers").cell

Spawn = Callable[[Coroutine[Any, Any, None], str], object]


class _Router:
    """One router's link: the accounts that it follows, and what it has yet to be told."""

    __slots__ = ("dirty", "link", "watched")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.watched: dict[str, None] = {}  # ordered: the oldest goes first
        self.dirty: dict[str, BuyerBalance] = {}


class BalanceHub:
    """Receiver of the BalanceService's links, and the one who tells them of changes. Single event loop; nothing blocks.

    spawn: runs a coroutine for the hub and keeps hold of it.
    """

    def __init__(self, store: LedgerStore, spawn: Spawn, *, max_watched: int = MAX_WATCHED) -> None:
        self._store = store
        self._max_watched = max_watched
        self._spawn = spawn
        self._routers: dict[Link, _Router] = {}
        self._watchers: dict[str, set[_Router]] = {}
        self._asked: dict[str, list[tuple[Link, bytes]]] = {}
        self._lookup_timer: asyncio.TimerHandle | None = None
        self._push_timer: asyncio.TimerHandle | None = None
        self._prices: bytes = wire.prices_to_wire({})

    # --- the links' callbacks
    # -------------------------------------------------------------------------------------------

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """A router came: it gets the whole price list."""
        self._routers[link] = _Router(link)
        _ROUTERS.value = len(self._routers)
        _send(link, self._prices)

    def on_item(self, link: Link, item: Item) -> None:
        """A lookup, answered with the others of these two milliseconds. Anything else is not for us."""
        if item.kind != ItemKind.ITEM_KIND_CALL:
            return
        try:
            account_id = LookupBalance.FromString(item.body).account_id
        except DecodeError:
            account_id = ""
        if not account_id or len(account_id) > MAX_ACCOUNT_CHARACTERS or "\x00" in account_id:
            link.fail(item.id, InvalidArgument(Reason.INVALID_ARGUMENT, "LookupBalance needs an account id."))
            return
        _LOOKUPS.value += 1
        # Before the query: a change that commits while it runs is pushed, and its version tells which is newer.
        self._watch(self._routers[link], account_id)
        self._asked.setdefault(account_id, []).append((link, item.id))
        if self._lookup_timer is None:
            self._lookup_timer = asyncio.get_running_loop().call_later(LOOKUP_S, self._look_up)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The router stops; until its link ends it is still told."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """The router is gone, and with it what it followed."""
        router = self._routers.pop(link, None)
        _ROUTERS.value = len(self._routers)
        if router is not None:
            for account_id in router.watched:
                self._unwatch(router, account_id)

    # --- what metering tells it
    # -----------------------------------------------------------------------------------------

    def changed(self, rows: Sequence[BuyerBalance]) -> None:
        """Buyers' balances after a commit."""
        for row in rows:
            for router in self._watchers.get(row.account_id, ()):
                seen = router.dirty.get(row.account_id)
                if seen is None or seen.version < row.version:
                    router.dirty[row.account_id] = row
                if self._push_timer is None:
                    self._push_timer = asyncio.get_running_loop().call_later(PUSH_S, self._push)

    def set_prices(self, prices: dict[str, Price]) -> None:
        """The whole price list, at the start and after each change."""
        body = wire.prices_to_wire(prices)
        if body == self._prices:
            return
        self._prices = body
        for link in self._routers:
            _send(link, self._prices)

    # --- inside
    # ---------------------------------------------------------------------------------------------------------

    def _watch(self, router: _Router, account_id: str) -> None:
        if account_id not in router.watched:
            if len(router.watched) >= self._max_watched:
                oldest = next(iter(router.watched))
                del router.watched[oldest]
                self._unwatch(router, oldest)
            router.watched[account_id] = None
            self._watchers.setdefault(account_id, set()).add(router)

    def _unwatch(self, router: _Router, account_id: str) -> None:
        watchers = self._watchers.get(account_id)
        if watchers is not None:
            watchers.discard(router)
            if not watchers:
                del self._watchers[account_id]

    def _look_up(self) -> None:
        self._lookup_timer = None
        asked, self._asked = self._asked, {}
        self._spawn(self._answer(asked), "balance lookup")

    async def _answer(self, asked: dict[str, list[tuple[Link, bytes]]]) -> None:
        try:
            rows = await self._store.balances(list(asked))
        except MeshError as err:
            for waiting in asked.values():
                for link, call_id in waiting:
                    link.fail(call_id, err)
            return
        for row in rows:
            body = wire.balance_to_wire(row).SerializeToString()
            for link, call_id in asked[row.account_id]:
                link.reply(call_id, body)

    def _push(self) -> None:
        self._push_timer = None
        for router in self._routers.values():
            rows = list(router.dirty.values())
            router.dirty.clear()
            for start in range(0, len(rows), _UPDATE_ROWS):
                _send(router.link, wire.update_to_wire(rows[start : start + _UPDATE_ROWS]))
            _PUSHED.value += len(rows)


def _send(link: Link, body: bytes) -> None:
    if link.end is None:  # else on_down follows, and the router asks anew on its next link
        link.send_new(ItemKind.ITEM_KIND_UPDATE, body=body)


async def watch_prices(store: LedgerStore, hub: BalanceHub, every_s: float) -> None:
    """Reads the price list now and then, so that a price set through another process arrives as well. Runs until
    cancelled.
    """
    while True:
        await asyncio.sleep(every_s)
        try:
            hub.set_prices(await store.prices())
        except Unavailable:
            log.warning("cannot read prices, the routers keep what they have")
