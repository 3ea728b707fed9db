"""The router's links to the processes that it copies from (registry, metering, schedulers): they keep the desk true."""

import functools
from collections.abc import Callable
from typing import Final

from gpumesh.common.v1 import job_pb2
from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.metering.v1 import balance_service_pb2 as balance_pb2
from gpumesh.registry.v1 import directory_service_pb2 as directory_pb2
from gpumesh.scheduler.v1 import capacity_service_pb2 as capacity_pb2
from gpumesh_router.domain.admission import Desk
from gpumesh_router.wire import capacity_from_wire, model_from_wire, prices_from_wire
from gpumesh_runtime.clock import Clock
from gpumesh_runtime.error_types import DeadlineExceeded, MeshError, Unauthenticated, Unavailable
from gpumesh_runtime.link import Link, LinkClient, LinkEnd
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.tls import TlsIdentity

DIRECTORY_METHOD: Final = "/gpumesh.registry.v1.DirectoryService/Connect"
BALANCE_METHOD: Final = "/gpumesh.metering.v1.BalanceService/Connect"
CAPACITY_METHOD: Final = "/gpumesh.scheduler.v1.CapacityService/WatchCapacity"

Done = Callable[[MeshError | None], None]


class _Coalesced:
    """Fetches in flight by key: the second asker of the same thing waits for the first one's answer."""

    def __init__(self) -> None:
        self._waiting: dict[str | bytes, list[Done]] = {}

    def join(self, key: str | bytes, done: Done) -> bool:
        """Adds a waiter; True when it is the first and must start the fetch."""
        waiters = self._waiting.get(key)
        if waiters is None:
            self._waiting[key] = [done]
            return True
        waiters.append(done)
        return False

    def finish(self, key: str | bytes, error: MeshError | None) -> None:
        """Answers everyone who waits for `key`."""
        for done in self._waiting.pop(key, ()):
            done(error)


class Registry:
    """Link to the registry: the catalogue, revocations, and keys on demand."""

    def __init__(
        self,
        address: str,
        tls: TlsIdentity,
        desk: Desk,
        clock: Clock,
        router_id: str,
        *,
        timeout_s: float,
        on_catalogue: Callable[[list[job_pb2.Model]], None],
    ) -> None:
        self._desk = desk
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_catalogue = on_catalogue
        self._fetches = _Coalesced()
        hello = directory_pb2.DirectoryHello(reader_id=router_id).SerializeToString()
        self.client = LinkClient(address, DIRECTORY_METHOD, credentials=tls, hello=lambda: hello, receiver=self)

    def fetch_key(self, key_id: str, digest: bytes, done: Done) -> None:
        """Asks whom a key belongs to; stores a yes or a no at the desk."""
        if not self._fetches.join(digest, done):
            return
        link = self.client.link
        if link is None:
            self._fetches.finish(digest, _away(Reason.REGISTRY_UNAVAILABLE, "The registry"))
            return
        body = directory_pb2.LookupKey(key_id=key_id, key_sha256=digest).SerializeToString()
        link.ask(body, self._timeout_s, functools.partial(self._key_fetched, key_id, digest))

    def _key_fetched(self, key_id: str, digest: bytes, body: bytes | None, error: MeshError | None) -> None:
        now = self._clock.monotonic()
        if body is not None:
            identity = directory_pb2.KeyIdentity.FromString(body)
            self._desk.identities.remember(key_id, digest, identity.account_id, identity.cache_seconds, now)
            self._fetches.finish(digest, None)
            return
        refusal = _lookup_error(error, Reason.REGISTRY_UNAVAILABLE, "The registry")
        if isinstance(refusal, Unauthenticated):
            self._desk.identities.refuse(digest, refusal, now)
        self._fetches.finish(digest, refusal)

    def on_up(self, link: Link, body: bytes) -> None:
        """The registry sends the whole catalogue by itself."""

    def on_item(self, link: Link, item: Item) -> None:
        """Applies a Directory update."""
        if item.kind != ItemKind.ITEM_KIND_UPDATE:
            return
        update = directory_pb2.Directory.FromString(item.body)
        identities = self._desk.identities
        identities.revoke(list(update.revoked_key_ids))
        identities.suspend(list(update.suspended_account_ids))
        identities.restore(list(update.restored_account_ids))
        if update.catalogue_whole:
            self._desk.catalogue.replace_models(model_from_wire(model) for model in update.models)
            self._on_catalogue(list(update.models))

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The client reconnects by itself."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Cached identities and models go on."""


class Metering:
    """Link to metering: prices, and balances of the accounts that were asked for."""

    def __init__(
        self,
        address: str,
        tls: TlsIdentity,
        desk: Desk,
        clock: Clock,
        router_id: str,
        *,
        timeout_s: float,
        on_prices: Callable[[], None],
    ) -> None:
        self._desk = desk
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_prices = on_prices
        self._fetches = _Coalesced()
        hello = balance_pb2.BalanceHello(router_id=router_id).SerializeToString()
        self.client = LinkClient(address, BALANCE_METHOD, credentials=tls, hello=lambda: hello, receiver=self)

    def fetch_balance(self, account_id: str, done: Done) -> None:
        """Asks what an account can spend; from then on metering pushes its changes."""
        if not self._fetches.join(account_id, done):
            return
        link = self.client.link
        if link is None:
            self._fetches.finish(account_id, _away(Reason.METERING_UNAVAILABLE, "Metering"))
            return
        body = balance_pb2.LookupBalance(account_id=account_id).SerializeToString()
        link.ask(body, self._timeout_s, functools.partial(self._balance_fetched, account_id))

    def _balance_fetched(self, account_id: str, body: bytes | None, error: MeshError | None) -> None:
        if body is None:
            self._fetches.finish(account_id, _lookup_error(error, Reason.METERING_UNAVAILABLE, "Metering"))
            return
        balance = balance_pb2.Balance.FromString(body)
        self._desk.balances.update(account_id, balance.available_nano_usd, balance.version)
        self._fetches.finish(account_id, None)

    def on_up(self, link: Link, body: bytes) -> None:
        """Balances known from an earlier link are asked for again when next needed."""
        self._desk.balances.up()

    def on_item(self, link: Link, item: Item) -> None:
        """Applies a BalanceUpdate."""
        if item.kind != ItemKind.ITEM_KIND_UPDATE:
            return
        update = balance_pb2.BalanceUpdate.FromString(item.body)
        for balance in update.balances:
            self._desk.balances.update(balance.account_id, balance.available_nano_usd, balance.version)
        if update.prices or update.prices_whole:
            self._desk.catalogue.update_prices(prices_from_wire(update.prices), whole=update.prices_whole)
            self._on_prices()

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The client reconnects by itself."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Balances are spent from for a while more."""
        self._desk.balances.down(self._clock.monotonic())


class SchedulerWatch:
    """Link to one scheduler: its capacity."""

    def __init__(self, address: str, tls: TlsIdentity, desk: Desk, clock: Clock, router_id: str) -> None:
        self._address = address
        self._desk = desk
        self._clock = clock
        self._scheduler_id = ""
        hello = capacity_pb2.CapacityHello(router_id=router_id).SerializeToString()
        self.client = LinkClient(address, CAPACITY_METHOD, credentials=tls, hello=lambda: hello, receiver=self)

    def on_up(self, link: Link, body: bytes) -> None:
        """A boot of the scheduler answered."""
        welcome = capacity_pb2.CapacityWelcome.FromString(body)
        self._scheduler_id = welcome.scheduler_id
        self._desk.capacity.up(
            welcome.scheduler_id,
            welcome.scheduler_boot_id,
            welcome.dispatch_address or self._address,
            self._clock.monotonic(),
        )

    def on_item(self, link: Link, item: Item) -> None:
        """Applies a Capacity update."""
        if item.kind != ItemKind.ITEM_KIND_UPDATE:
            return
        update = capacity_pb2.Capacity.FromString(item.body)
        self._desk.capacity.update(
            self._scheduler_id,
            (capacity_from_wire(model) for model in update.models),
            whole=update.whole,
            draining=update.draining,
            now=self._clock.monotonic(),
        )

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """It drains: nothing new goes there."""
        self._desk.capacity.down(self._scheduler_id)

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """It is gone, for now."""
        self._desk.capacity.down(self._scheduler_id)


class Upstreams:
    """Where missing copies come from: the two fetches as admission wants them."""

    def __init__(self, registry: Registry, metering: Metering) -> None:
        self.fetch_key = registry.fetch_key
        self.fetch_balance = metering.fetch_balance


def _away(reason: Reason, who: str) -> Unavailable:
    return Unavailable(
        reason, f"{who} cannot be reached at the moment. Try again in a second.", retry_after_s=1.0, retryable=True
    )


def _lookup_error(error: MeshError | None, reason: Reason, who: str) -> MeshError:
    """What a caller is told when a lookup failed: the answer itself if it was one, else that `who` is away."""
    if error is None or isinstance(error, Unavailable | DeadlineExceeded):
        return _away(reason, who)
    return error
