"""Links under test: a receiver that records, a pair of links joined in memory on virtual time, and waiting with a deadline."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc.aio
import looptime

from gpumesh.common.v1.link_pb2 import Batch, Goodbye, Item, ItemKind
from gpumesh_runtime.identity import Identity, Role
from gpumesh_runtime.link import SERVICE_LINK, Link, LinkEnd, LinkOptions
from gpumesh_runtime.link.stream import read_until_end

Result = TypeVar("Result")
CALL = ItemKind.ITEM_KIND_CALL
FRAME = ItemKind.ITEM_KIND_FRAME
DONE = ItemKind.ITEM_KIND_DONE
CANCEL = ItemKind.ITEM_KIND_CANCEL
SUBMIT = ItemKind.ITEM_KIND_SUBMIT
PAYLOAD = ItemKind.ITEM_KIND_PAYLOAD
SETTLE = ItemKind.ITEM_KIND_SETTLE
ERROR = ItemKind.ITEM_KIND_ERROR
HEARTBEAT = ItemKind.ITEM_KIND_HEARTBEAT
WINDOW = ItemKind.ITEM_KIND_WINDOW


def virtual(main: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine on a loop whose time jumps to the next timer: 60 s of silence take no time."""
    with asyncio.Runner(loop_factory=lambda: looptime.new_event_loop(start=1000)) as runner:
        return runner.run(main)


class Recorder:
    """A receiver that remembers everything. `serve`, when given, is called for every item after it was recorded."""

    def __init__(self, serve: Callable[[Link, Item], None] | None = None) -> None:
        self.ups: list[tuple[Link, bytes]] = []
        self.items: list[Item] = []
        self.goodbyes: list[Goodbye] = []
        self.ends: list[LinkEnd] = []
        self.overflows: list[bytes] = []
        self.suspicions: list[bool] = []
        self._serve = serve
        self._changed = asyncio.Event()

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """Recorded."""
        self.ups.append((link, hello_or_welcome))
        self._changed.set()

    def on_item(self, link: Link, item: Item) -> None:
        """Recorded, then served."""
        self.items.append(item)
        self._changed.set()
        if self._serve is not None:
            self._serve(link, item)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """Recorded."""
        self.goodbyes.append(goodbye)
        self._changed.set()

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Recorded."""
        self.ends.append(end)
        self._changed.set()

    def on_overflow(self, link: Link, id_: bytes) -> None:
        """Recorded."""
        self.overflows.append(id_)
        self._changed.set()

    def on_suspect(self, link: Link, suspect: bool) -> None:
        """Recorded."""
        self.suspicions.append(suspect)
        self._changed.set()

    def of_kind(self, kind: int) -> list[Item]:
        """Items of one kind, in order of arrival."""
        return [item for item in self.items if item.kind == kind]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Waits until the condition holds, looking again after each callback. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


def echo(link: Link, item: Item) -> None:
    """Answers every call with its own body."""
    if item.kind == CALL:
        link.reply(item.id, item.body)


class Wire:
    """One direction of a stream in memory: one message under way, and a tap that can be shut."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        self._open = asyncio.Event()
        self._open.set()
        self._black_hole = False
        self.messages: list[bytes] = []
        self.sent_at: list[float] = []

    def stall(self) -> None:
        """The other side stops reading."""
        self._open.clear()

    def resume(self) -> None:
        """It reads again."""
        self._open.set()

    def swallow(self) -> None:
        """Messages are accepted and go nowhere, as on a path that lost its far end."""
        self._black_hole = True

    async def write(self, message: bytes) -> None:
        """Returns when the message is under way, as gRPC's flow control does."""
        await self._open.wait()
        self.messages.append(message)
        self.sent_at.append(asyncio.get_running_loop().time())
        if not self._black_hole:
            await self._queue.put(message)

    async def read(self) -> Any:
        """The next message, or EOF."""
        message = await self._queue.get()
        return grpc.aio.EOF if message is None else Batch.FromString(message)

    async def end(self) -> None:
        """Ends the stream after what is under way."""
        await self._queue.put(None)

    def batches(self) -> list[Batch]:
        """All messages so far, parsed."""
        return [Batch.FromString(message) for message in self.messages]


class Pair:
    """Two links joined in memory. left sends on `out`, right on `back`. Use as an async context manager."""

    def __init__(self, left: Recorder, right: Recorder, options: LinkOptions = SERVICE_LINK) -> None:
        self.out, self.back = Wire(), Wire()
        self.left = Link(Identity(Role.ROUTER, "router"), left, options, self.out.write)
        self.right = Link(Identity(Role.EDGE, "edge"), right, options, self.back.write)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Pair":
        self.left.start(b"welcome")
        self.right.start(b"hello")
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(read_until_end(self.left, self.back.read)),
            loop.create_task(read_until_end(self.right, self.out.read)),
        ]
        return self

    async def __aexit__(self, *args: object) -> None:
        for link in (self.left, self.right):
            link.finish(LinkEnd.CLOSED_BY_US)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.left.joined()
        await self.right.joined()
