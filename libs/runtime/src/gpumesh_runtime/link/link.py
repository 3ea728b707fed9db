"""One end of a live link: what goes out, what comes in, and its end. Handshakes are in client.py and server.py.

Sending never awaits: items are encoded into the SendQueue and one writer task makes messages of them. Reading calls the receiver
synchronously for each item. Nothing is done per item that could be done per message.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Batch, Failure, Goodbye, GoodbyeReason, Item, Window
from gpumesh_runtime.errors import (
    as_mesh_error,
    from_failure,
)
from gpumesh_runtime.identity import Identity
from gpumesh_runtime.link.cancelled import CancelMemory
from gpumesh_runtime.link.items import (
    ASKS,
    CANCEL,
    ERROR,
    GOODBYE,
    HEARTBEAT,
    HELLO,
    PAYLOAD,
    REPLY,
    WELCOME,
    WINDOW,
)
from gpumesh_runtime.link.liveness import Liveness
from gpumesh_runtime.link.options import LinkOptions
from gpumesh_runtime.link.pulse import Pulse
from gpumesh_runtime.link.receiver import LinkDown, LinkEnd, LinkProtocolError, Receiver
from gpumesh_runtime.link.sending import Sending

# After a failed write: how long the reader may take to find out how the link ended.
_READER_MAY_TELL_S = 1.0


class Link(Sending):
    """One end of a live link.

    peer: who is at the other end. draining: it said Goodbye. suspect: it has been silent for 15 s. stats: what went by.
    Not thread-safe: one event loop.
    """

    def __init__(
        self,
        peer: Identity,
        receiver: Receiver,
        options: LinkOptions,
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._liveness = Liveness(options, loop.time(), random.random())  # noqa: S311 -- jitter, not a secret
        super().__init__(options, self._liveness, write)
        self.peer = peer
        self.draining = False
        self.suspect = False
        self.goodbye_received: Goodbye | None = None
        self._receiver = receiver
        self._cancelled = CancelMemory(options.cancel_memory_s)
        self._flows: dict[bytes, Callable[[Window], None]] = {}
        self._pulse = Pulse(
            self._liveness,
            self._writer,
            options.lost_s,
            beat=self._beat,
            on_suspect=self._fell_silent,
            on_lost=lambda: self.finish(LinkEnd.LOST),
        )
        self._announced = False
        self.ended: asyncio.Future[LinkEnd] = loop.create_future()

    def is_cancelled(self, id: bytes, fence: int = 0) -> bool:  # noqa: A002 -- the field's name
        """Whether the other side cancelled it within the last 60 s."""
        return self._cancelled.covers(id, fence, self._loop.time())

    def open_flow(self, id: bytes, on_window: Callable[[Window], None]) -> None:  # noqa: A002 -- the field's name
        """WINDOW items of `id` go to on_window instead of the receiver, until close_flow(id)."""
        self._flows[id] = on_window

    def close_flow(self, id: bytes) -> None:  # noqa: A002 -- the field's name
        """Ends open_flow."""
        self._flows.pop(id, None)

    # --- reading --------------------------------------------------------------------------------------------------------

    def deliver(self, batch: Batch) -> None:
        """Takes one message. Called by the reader, never during another call of itself."""
        now = self._loop.time()
        self._liveness.heard_at = now
        if self.suspect:
            self._set_suspect(False)
        items = batch.items
        count = len(items)
        stats = self.stats
        stats.messages_in += 1
        stats.items_in += count
        stats.bytes_in += batch.ByteSize()
        if count > self.options.max_items:
            self.protocol_error()
            return
        on_item = self._receiver.on_item
        answer = self._calls.answer
        cancelled = self._cancelled
        for item in items:
            kind: int = item.kind
            try:
                if kind > PAYLOAD:  # frames, ends, background: most of what comes
                    on_item(self, item)
                elif kind < 32:
                    self._on_control(kind, item, now)
                elif kind == REPLY:
                    if not answer(item.id, item.body):
                        on_item(self, item)
                elif kind == ERROR and self._calls.waits(item.id):
                    self._calls.fail(item.id, from_failure(Failure.FromString(item.body)))
                elif kind in ASKS and cancelled and cancelled.covers(item.id, item.fence, now):
                    stats.zombies_dropped += 1
                else:
                    on_item(self, item)
            except (DecodeError, LinkProtocolError):
                self.protocol_error()
            except Exception as error:  # noqa: BLE001, RUF100 -- one item's failure must not take the others' link down
                self._item_failed(kind, item, error)
            if self._end is not None:
                return

    def _on_control(self, kind: int, item: Item, now: float) -> None:
        if kind == HEARTBEAT:
            if item.body:
                self._receiver.on_item(self, item)
        elif kind == WINDOW and item.id in self._flows:
            self._flows[item.id](Window.FromString(item.body))
        elif kind == CANCEL:
            self._cancelled.add(item.id, item.fence, now)
            # Nobody reads what is queued for it; an end that waits to be told stays.
            self.stats.cancelled_items += self._queue.drop(item.id, keep_last=True)
            self._receiver.on_item(self, item)
        elif kind == GOODBYE:
            self.draining = True
            self.goodbye_received = Goodbye.FromString(item.body)
            self._receiver.on_goodbye(self, self.goodbye_received)
        elif kind in (HELLO, WELCOME):
            raise LinkProtocolError("a second handshake")
        else:
            self._receiver.on_item(self, item)

    def _item_failed(self, kind: int, item: Item, error: Exception) -> None:
        self.stats.item_errors += 1
        mesh = as_mesh_error(error)  # logs what is not a MeshError
        if kind in ASKS and item.id:
            self.fail(item.id, mesh, fence=item.fence)

    def protocol_error(self) -> None:
        """The other side broke the protocol: tell it why and end this link only."""
        self.goodbye(GoodbyeReason.GOODBYE_REASON_PROTOCOL_ERROR)
        self.finish(LinkEnd.PROTOCOL_ERROR)

    async def joined(self) -> None:
        """Waits for the writer's end, after the link's. Called by the owner before it closes the stream."""
        await self._writer.joined()

    async def last_words(self, within_s: float) -> None:
        """Writes what control is queued, past the end of the link: why it ended. Called by the owner, best effort."""
        await self._writer.last_words(within_s)

    # --- life and end ---------------------------------------------------------------------------------------------------

    def start(self, handshake_body: bytes) -> None:
        """The handshake is done: from here on items flow. Called once by client.py and server.py."""
        self._writer.start()
        self._pulse.start()
        self._announced = True
        self._receiver.on_up(self, handshake_body)

    def _beat(self, body: bytes) -> None:
        self.send_new(HEARTBEAT, body=body)

    def _fell_silent(self) -> None:
        if not self.suspect:
            self._set_suspect(True)

    @property
    def heartbeat_body(self) -> Callable[[], bytes] | None:
        """When set, heartbeats go at their interval whatever else is sent, with this body (node sessions: Status)."""
        return self._pulse.body

    @heartbeat_body.setter
    def heartbeat_body(self, body: Callable[[], bytes] | None) -> None:
        self._pulse.body = body

    def _set_suspect(self, suspect: bool) -> None:
        self.suspect = suspect
        on_suspect = getattr(self._receiver, "on_suspect", None)
        if on_suspect is not None:
            on_suspect(self, suspect)

    def _tell_overflow(self, id_: bytes) -> None:
        on_overflow = getattr(self._receiver, "on_overflow", None)
        if on_overflow is not None:
            # In a turn of its own: send() is called from the middle of somebody's state machine.
            self._loop.call_soon(on_overflow, self, id_)

    def _write_broke(self) -> None:
        # The reader says how the link ended: a Goodbye may still be waiting to be read. If it does not, we do.
        self._loop.call_later(_READER_MAY_TELL_S, self.lost)

    def lost(self) -> None:
        """The stream ended or broke: Goodbye if the other side said it, else LOST (or ours, if we had said it)."""
        if self.goodbye_received is not None:
            self.finish(LinkEnd.GOODBYE)
        else:
            self.finish(LinkEnd.CLOSED_BY_US if self._said_goodbye else LinkEnd.LOST)

    def finish(self, end: LinkEnd) -> None:
        """Ends the link now; only the first call counts. The owner (client.py, server.py) then closes the stream."""
        if self._end is not None:
            return
        self._end = end
        self._pulse.stop()
        self._calls.fail_all(LinkDown)
        self._flows.clear()
        self._writer.stop()
        if not self.ended.done():
            self.ended.set_result(end)
        if self._announced:
            self._receiver.on_down(self, end)

    # --- closing ---

    async def drained(self) -> None:
        """Waits until all that is queued has been written. Raises LinkDown when the link ends first."""
        await self._writer.drained()

    async def close(self) -> None:
        """Ends the link in order: Goodbye unless it was said, then what is queued (close_s at most), then the stream."""
        if self._end is None:
            self.goodbye()
            try:
                async with asyncio.timeout(self.options.close_s):
                    await self._writer.drained()
            except (TimeoutError, LinkDown):
                pass  # the other side does not read, or went first: close without the rest
            self.finish(LinkEnd.CLOSED_BY_US)
