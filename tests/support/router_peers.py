"""A real router process-in-a-task between scripted peers: a registry, a metering and a scheduler that say what a test tells them to."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumesh.common.v1.job_pb2 import Modality, Model, Price
from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.metering.v1.balance_service_pb2 import Balance, BalanceUpdate, BalanceWelcome, LookupBalance
from gpumesh.metering.v1.balance_service_pb2_grpc import add_BalanceServiceServicer_to_server
from gpumesh.registry.v1.directory_service_pb2 import (
    Directory,
    DirectoryWelcome,
    GetTokenizerRequest,
    GetTokenizerResponse,
    KeyIdentity,
    LookupKey,
)
from gpumesh.registry.v1.directory_service_pb2_grpc import (
    add_DirectoryServiceServicer_to_server,
)
from gpumesh.scheduler.v1.capacity_service_pb2 import Capacity, CapacityWelcome, ModelCapacity
from gpumesh.scheduler.v1.capacity_service_pb2_grpc import (
    add_CapacityServiceServicer_to_server,
)
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.error_types import MeshError, NotFound, Unauthenticated
from gpumesh_runtime.link import Link, LinkEnd, LinkServer
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.tls import TlsIdentity

LOOPBACK = "127.0.0.1"
TOKENIZER = b'{"model": {"type": "BPE"}}'
UPDATE = ItemKind.ITEM_KIND_UPDATE
TINY = Model(
    model_id="tiny", revision="r1", context_tokens=1024, modalities=[Modality.MODALITY_CHAT], aliases=["small"]
)
PRICE = Price(version=1, input_nano_usd_per_mtok=1_000_000, output_nano_usd_per_mtok=2_000_000)


def issue(ca: FileCa, folder: Path, uri: str) -> TlsIdentity:
    """A certificate for loopback."""
    return ca.issue_files(folder / uri.rsplit("/", 1)[-1], uri)


class Peer:
    """A server of one link service. Subclasses say what happens on up and on items. `links` are those that live."""

    add: Callable[[Any, Any], None]

    def __init__(self, welcome: bytes) -> None:
        self.links: list[Link] = []
        self.calls: list[bytes] = []
        self._links = LinkServer(self, lambda hello, peer: welcome)

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        """Serves one link."""
        await self._links.serve(request_iterator, context)

    WatchCapacity = Connect

    def on_up(self, link: Link, body: bytes) -> None:
        """Remembered; then the peer greets."""
        self.links.append(link)
        self.greet(link)

    def on_item(self, link: Link, item: Item) -> None:
        """Calls are answered."""
        if item.kind == ItemKind.ITEM_KIND_CALL:
            self.calls.append(item.body)
            self.answer(link, item)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """Nothing to do."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Forgotten."""
        self.links.remove(link)

    def greet(self, link: Link) -> None:
        """What is said first."""

    def answer(self, link: Link, item: Item) -> None:
        """What a call gets."""

    def push(self, body: bytes) -> None:
        """An Update to everyone."""
        for link in self.links:
            link.send_new(UPDATE, body=body)

    async def close(self) -> None:
        """Ends all links."""
        await self._links.close()


class FakeRegistry(Peer):
    """`keys`: digest -> account or refusal."""

    def __init__(self) -> None:
        super().__init__(DirectoryWelcome(registry_id="registry").SerializeToString())
        self.keys: dict[bytes, str | MeshError] = {}

    async def GetTokenizer(self, request: GetTokenizerRequest, context: Any) -> AsyncIterator[GetTokenizerResponse]:
        """The one tokenizer there is, in two pieces."""
        if request.tokenizer_sha256 != hashlib.sha256(TOKENIZER).hexdigest():
            raise NotFound(Reason.NOT_FOUND, "no such tokenizer")
        yield GetTokenizerResponse(chunk=TOKENIZER[:7])
        yield GetTokenizerResponse(chunk=TOKENIZER[7:])

    def greet(self, link: Link) -> None:
        link.send_new(UPDATE, body=Directory(models=[TINY], catalogue_whole=True).SerializeToString())

    def answer(self, link: Link, item: Item) -> None:
        wanted = LookupKey.FromString(item.body)
        found = self.keys.get(wanted.key_sha256, Unauthenticated(Reason.INVALID_API_KEY, "unknown"))
        if isinstance(found, MeshError):
            link.fail(item.id, found)
        else:
            body = KeyIdentity(key_id=wanted.key_id, account_id=found, cache_seconds=900)
            link.reply(item.id, body.SerializeToString())


class FakeMetering(Peer):
    """`balances`: account -> nano-USD."""

    def __init__(self) -> None:
        super().__init__(BalanceWelcome(metering_id="metering").SerializeToString())
        self.balances: dict[str, int] = {}
        self.silent = False

    def greet(self, link: Link) -> None:
        link.send_new(UPDATE, body=BalanceUpdate(prices={"tiny": PRICE}, prices_whole=True).SerializeToString())

    def answer(self, link: Link, item: Item) -> None:
        if self.silent:
            return
        account_id = LookupBalance.FromString(item.body).account_id
        balance = Balance(account_id=account_id, available_nano_usd=self.balances.get(account_id, 0), version=1)
        link.reply(item.id, balance.SerializeToString())


class FakeScheduler(Peer):
    """Says that it has one node with four slots."""

    def __init__(self, boot_id: str = "boot1") -> None:
        welcome = CapacityWelcome(scheduler_id="s0", scheduler_boot_id=boot_id, dispatch_address="127.0.0.1:9")
        super().__init__(welcome.SerializeToString())

    def greet(self, link: Link) -> None:
        self.say(nodes=1)

    def say(self, *, nodes: int) -> None:
        """A whole capacity update."""
        model = ModelCapacity(model_id="tiny", model_revision="r1", nodes=nodes, slots=4 * nodes, free_slots=4 * nodes)
        self.push(Capacity(models=[model], whole=True).SerializeToString())


@dataclass
class Peers:
    """The router's surroundings, each on its own port with its own certificate."""

    folder: Path
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    metering: FakeMetering = field(default_factory=FakeMetering)
    scheduler: FakeScheduler = field(default_factory=FakeScheduler)
    addresses: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ca = FileCa.load_or_create(self.folder / "ca")
        self._stack = AsyncExitStack()

    def identity(self, uri: str) -> TlsIdentity:
        """A certificate of this mesh."""
        return issue(self.ca, self.folder, uri)

    async def __aenter__(self) -> "Peers":
        for name, peer, add in (
            ("registry", self.registry, add_DirectoryServiceServicer_to_server),
            ("metering", self.metering, add_BalanceServiceServicer_to_server),
            ("scheduler", self.scheduler, add_CapacityServiceServicer_to_server),
        ):
            tls = self.identity(f"spiffe://gpumesh.local/service/{name}")
            server = Server(name, f"{LOOPBACK}:0", tls)
            server.add(peer, add)
            await server.start()
            self._stack.push_async_callback(server.stop, 0.1)
            self._stack.push_async_callback(peer.close)
            self.addresses[name] = f"{LOOPBACK}:{server.port}"
        return self

    async def __aexit__(self, *args: object) -> None:
        await self._stack.aclose()
