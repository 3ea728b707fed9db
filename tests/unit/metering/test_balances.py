"""The balance hub: lookups share a query, changes go to those who asked, the last value of each quarter second only."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, cast

import pytest

from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh.metering.v1.balance_service_pb2 import Balance, BalanceUpdate, LookupBalance
from gpumesh_metering import balances
from gpumesh_metering.balances import BalanceHub
from gpumesh_metering.domain.pricing import Price
from gpumesh_metering.store import BuyerBalance, LedgerStore
from gpumesh_runtime.errors import MeshError, Reason, Unavailable
from gpumesh_runtime.link import Link, LinkEnd


class FakeLink:
    """The part of a link that the hub uses; remembers what was sent."""

    def __init__(self) -> None:
        self.end: LinkEnd | None = None
        self.updates: list[BalanceUpdate] = []
        self.replies: dict[bytes, Balance] = {}
        self.failures: dict[bytes, Reason] = {}

    def send_new(self, kind: int, *, body: bytes) -> None:
        assert self.end is None
        assert kind == ItemKind.ITEM_KIND_UPDATE
        self.updates.append(BalanceUpdate.FromString(body))

    def reply(self, call_id: bytes, body: bytes) -> None:
        assert call_id not in self.replies
        self.replies[call_id] = Balance.FromString(body)

    def fail(self, call_id: bytes, error: MeshError) -> None:
        self.failures[call_id] = error.reason

    @property
    def link(self) -> Link:
        return cast("Link", self)

    def pushed(self) -> list[tuple[str, int, int]]:
        """Balances pushed so far."""
        return [
            (row.account_id, row.available_nano_usd, row.version) for update in self.updates for row in update.balances
        ]


class FakeStore:
    """Balances in memory; `away` refuses."""

    def __init__(self) -> None:
        self.rows: dict[str, BuyerBalance] = {}
        self.queries: list[list[str]] = []
        self.away = False

    async def balances(self, account_ids: Sequence[str]) -> list[BuyerBalance]:
        if self.away:
            raise Unavailable(Reason.DATABASE_UNAVAILABLE)
        self.queries.append(sorted(account_ids))
        return [self.rows.get(account, BuyerBalance(account, 0, 0)) for account in account_ids]


class Bench:
    """A hub with its store and two routers."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.tasks: list[asyncio.Task[None]] = []
        self.hub = BalanceHub(cast("LedgerStore", self.store), self.spawn)
        self.one, self.two = FakeLink(), FakeLink()
        for router in (self.one, self.two):
            self.hub.on_up(router.link, b"")

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))

    def ask(self, router: FakeLink, account_id: str, call_id: bytes) -> None:
        body = LookupBalance(account_id=account_id).SerializeToString()
        self.hub.on_item(router.link, Item(kind=ItemKind.ITEM_KIND_CALL, id=call_id, body=body))


pytestmark = pytest.mark.looptime


async def test_lookups_of_two_milliseconds_share_one_query_and_each_is_answered() -> None:
    bench = Bench()
    bench.store.rows["a"] = BuyerBalance("a", 5, 3)
    bench.ask(bench.one, "a", b"1")
    bench.ask(bench.two, "a", b"2")
    bench.ask(bench.one, "b", b"3")
    await asyncio.sleep(0.01)
    assert bench.store.queries == [["a", "b"]]
    assert (bench.one.replies[b"1"].available_nano_usd, bench.one.replies[b"1"].version) == (5, 3)
    assert bench.two.replies[b"2"].account_id == "a"
    assert bench.one.replies[b"3"].version == 0


async def test_changes_reach_only_those_who_asked_and_only_the_last_of_a_moment() -> None:
    bench = Bench()
    bench.ask(bench.one, "a", b"1")
    await asyncio.sleep(0.01)
    for version in (2, 4, 3):
        bench.hub.changed([BuyerBalance("a", version * 10, version), BuyerBalance("b", 1, 1)])
    assert bench.one.pushed() == []
    await asyncio.sleep(0.25)
    assert bench.one.pushed() == [("a", 40, 4)]
    assert bench.two.pushed() == []
    bench.hub.changed([BuyerBalance("a", 50, 5)])
    await asyncio.sleep(0.25)
    assert bench.one.pushed()[-1] == ("a", 50, 5)


async def test_database_away_fails_lookups_with_its_reason_and_the_router_is_still_told_later() -> None:
    bench = Bench()
    bench.store.away = True
    bench.ask(bench.one, "a", b"1")
    await asyncio.sleep(0.01)
    assert bench.one.failures == {b"1": Reason.DATABASE_UNAVAILABLE}
    bench.hub.changed([BuyerBalance("a", 1, 1)])
    await asyncio.sleep(0.25)
    assert bench.one.pushed() == [("a", 1, 1)]


async def test_router_that_went_away_is_forgotten_and_gets_nothing() -> None:
    bench = Bench()
    bench.ask(bench.one, "a", b"1")
    bench.ask(bench.two, "a", b"2")
    bench.one.end = LinkEnd.LOST
    bench.hub.on_down(bench.one.link, LinkEnd.LOST)
    await asyncio.sleep(0.01)
    bench.hub.changed([BuyerBalance("a", 1, 1)])
    bench.hub.set_prices({"m": Price(1, 2, 3)})
    await asyncio.sleep(0.25)
    assert bench.one.pushed() == []
    assert bench.two.pushed() == [("a", 1, 1)]


async def test_prices_are_sent_whole_at_once_and_again_only_when_they_changed() -> None:
    bench = Bench()
    assert [update.prices_whole for update in bench.one.updates] == [True]
    for _ in range(3):
        bench.hub.set_prices({"m": Price(1, 2, 3)})
    assert [dict(update.prices).keys() for update in bench.one.updates] == [set(), {"m"}]


async def test_follows_no_more_accounts_than_its_bound_and_forgets_the_oldest() -> None:
    bench = Bench()
    hub = BalanceHub(cast("LedgerStore", bench.store), bench.spawn, max_watched=3)
    router = FakeLink()
    hub.on_up(router.link, b"")
    bench.hub = hub
    for at in range(5):
        bench.ask(router, f"acct_{at}", bytes([at]))
    await asyncio.sleep(0.01)
    hub.changed([BuyerBalance(f"acct_{at}", 1, 1) for at in range(5)])
    await asyncio.sleep(0.25)
    assert sorted(account for account, _, _ in router.pushed()) == ["acct_2", "acct_3", "acct_4"]


async def test_many_changes_travel_in_updates_of_bounded_size() -> None:
    bench = Bench()
    for at in range(2500):
        bench.ask(bench.one, f"acct_{at}", at.to_bytes(2, "big"))
    await asyncio.sleep(0.01)
    bench.hub.changed([BuyerBalance(f"acct_{at}", 1, 1) for at in range(2500)])
    await asyncio.sleep(0.25)
    assert [len(update.balances) for update in bench.one.updates if update.balances] == [1000, 1000, 500]
    assert balances.PUSH_S + 0.05 <= 0.25, "with the link's wait for background items changes travel within 250 ms"
