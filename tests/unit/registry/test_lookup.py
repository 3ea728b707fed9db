"""Key lookups share queries, and never bring a revoked key back."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

import pytest

from gpumesh_registry.domain import keys
from gpumesh_registry.domain.directory import DirectoryState, Part
from gpumesh_registry.domain.keys import KeyIdentity, KeyRecord
from gpumesh_registry.lookup import KeyLookup
from gpumesh_runtime.errors import MeshError, Reason, Unavailable

HASH = keys.digest("the key")


class Store:
    """Knows the keys k0 ... k9; can be told to fail or to wait."""

    def __init__(self) -> None:
        self.queries: list[Sequence[str]] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def find_keys(self, key_ids: Sequence[str]) -> Mapping[str, KeyRecord]:
        """One query."""
        self.queries.append(key_ids)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {
            key_id: KeyRecord(key_id, "acct_a", HASH) for key_id in key_ids if key_id in {f"k{n}" for n in range(10)}
        }

    async def directory(self, parts: frozenset[Part], base: DirectoryState) -> DirectoryState:
        """Not asked here."""
        return base

    async def listen(self, announced: Callable[[frozenset[Part]], None]) -> None:
        """Not asked here."""


def ask(lookup: KeyLookup, key_id: str) -> "asyncio.Future[KeyIdentity]":
    future: asyncio.Future[KeyIdentity] = asyncio.get_running_loop().create_future()

    def done(identity: KeyIdentity | None, error: MeshError | None) -> None:
        if identity is not None:
            future.set_result(identity)
        elif error is not None:
            future.set_exception(error)

    lookup.ask(key_id, HASH, done)
    return future


async def reason_of(future: "asyncio.Future[KeyIdentity]") -> Reason:
    with pytest.raises(MeshError) as caught:
        await future
    return caught.value.reason


async def test_lookups_that_come_together_share_one_query() -> None:
    store = Store()
    lookup = KeyLookup(store, 0.001, lambda _: False)
    answers = await asyncio.gather(*(ask(lookup, f"k{number % 10}") for number in range(100)))
    assert len(store.queries) == 1
    assert len(store.queries[0]) == 10
    assert {answer.account_id for answer in answers} == {"acct_a"}


async def test_a_full_batch_does_not_wait_for_the_window() -> None:
    store = Store()
    lookup = KeyLookup(store, 3600, lambda _: False)
    await asyncio.gather(*(ask(lookup, "k1") for _ in range(500)))
    assert len(store.queries) == 1


async def test_a_key_revoked_while_its_query_ran_is_refused() -> None:
    store, revoked = Store(), set[str]()
    store.gate.clear()
    lookup = KeyLookup(store, 0, revoked.__contains__)
    future = ask(lookup, "k1")
    while not store.queries:
        await asyncio.sleep(0)
    revoked.add("k1")  # the announcement overtakes the answer of the query
    store.gate.set()
    assert await reason_of(future) is Reason.REVOKED_API_KEY


async def test_a_database_that_fails_answers_everybody_retryably() -> None:
    store = Store()
    lookup = KeyLookup(store, 0, lambda _: False)
    for error, reason in (
        (Unavailable(Reason.DATABASE_UNAVAILABLE, retryable=True), Reason.DATABASE_UNAVAILABLE),
        (TimeoutError(), Reason.REGISTRY_UNAVAILABLE),
    ):
        store.error = error
        assert [await reason_of(future) for future in [ask(lookup, "k1"), ask(lookup, "k2")]] == [reason, reason]


async def test_lookups_that_pile_up_are_refused_rather_than_kept() -> None:
    store = Store()
    store.gate.clear()
    lookup = KeyLookup(store, 0, lambda _: False)
    waiting = [ask(lookup, "k1") for _ in range(20_000)]
    with pytest.raises(Unavailable):
        ask(lookup, "k1")
    store.gate.set()
    await asyncio.gather(*waiting)
    assert (await ask(lookup, "k1")).key_id == "k1"
