"""One end of a live link: what goes out, what comes in, and its end. Handshakes are in client.py and server.py.

Sending never awaits: items are encoded into the SendQueue and one writer task makes messages of them. Reading calls the receiver
synchronously for each item. Nothing is done per item that could be done per message.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Batch, Cancel, Failure, Goodbye, GoodbyeReason, Item, Window
from gpumesh_runtime.errors import (
    MeshError,
    PayloadTooLarge,
    Reason,
    ResourceExhausted,
    as_mesh_error,
    from_failure,
    to_failure,
)
from gpumesh_runtime.identity import Identity
from gpumesh_runtime.link.calls import Calls, OnAnswer
from gpumesh_runtime.link.cancelled import CancelMemory
from gpumesh_runtime.link.items import (
    ALWAYS_URGENT,
    ASKS,
    CALL,
    CANCEL,
    ERROR,
    FIRST_OR_LAST,
    FLAG_LAST,
    GOODBYE,
    HEARTBEAT,
    HELLO,
    PREFIXES,
    REPLY,
    WELCOME,
    WINDOW,
    frame,
    new_id,
    prefix,
)
from gpumesh_runtime.link.liveness import Life, Liveness
from gpumesh_runtime.link.options import LinkOptions
from gpumesh_runtime.link.receiver import LinkDown, LinkEnd, LinkProtocolError, Receiver
from gpumesh_runtime.link.send_queue import SendQueue
from gpumesh_runtime.link.stats import LinkStats
from gpumesh_runtime.link.writer import Writer

_EMPTY = b""


class Link:
    """One end of a live link.

    peer: who is at the other end. draining: it said Goodbye. suspect: it has been silent for 15 s. stats: what went by.
    heartbeat_body: when set, heartbeats go at their interval whatever else is sent, with this body (node sessions: Status).
    Not thread-safe: one event loop.
    """

    def __init__(
        self,
        peer: Identity,
        receiver: Receiver,
        options: LinkOptions,
        write: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self.peer = peer
        self.options = options
        self.stats = LinkStats()
        self.draining = False
        self.suspect = False
        self.heartbeat_body: Callable[[], bytes] | None = None
        self.goodbye_received: Goodbye | None = None
        self._receiver = receiver
        self._loop = loop = asyncio.get_running_loop()
        self._queue = SendQueue(options)
        self._calls = Calls(self._call_expired)
        self._cancelled = CancelMemory(options.cancel_memory_s)
        self._overflowed = CancelMemory(options.cancel_memory_s)
        self._refuses = False  # whether _overflowed was ever used: one test per item in place of a look-up
        self._max_item_bytes = options.max_item_bytes
        self._flows: dict[bytes, Callable[[Window], None]] = {}
        self._liveness = Liveness(options, loop.time(), random.random())  # noqa: S311 -- jitter, not a secret
        self._tick_timer: asyncio.TimerHandle | None = None
        self._writer = Writer(self._queue, self._liveness, self.stats, write)
        self._said_goodbye = False
        self._announced = False
        self._end: LinkEnd | None = None
        self.ended: asyncio.Future[LinkEnd] = loop.create_future()

    # --- sending --------------------------------------------------------------------------------------------------------

    @property
    def end(self) -> LinkEnd | None:
        """How it ended; None while it lives."""
        return self._end

    def send(self, item: Item) -> None:
        """Queues an item; the number of its kind says its class. Never awaits.

        Raises LinkDown when the link has ended and PayloadTooLarge for an item over max_item_bytes. A full queue raises nothing: it
        ends the item's id (both sides hear SEND_QUEUE_FULL), not the link.
        """
        self._enqueue(item.kind, item.id, item.fence, item.flags, item.SerializeToString())

    def send_new(
        self,
        kind: int,
        *,
        id: bytes = _EMPTY,  # noqa: A002 -- the field's name
        body: bytes = _EMPTY,
        fence: int = 0,
        seq: int = 0,
        tokens: int = 0,
        flags: int = 0,
    ) -> None:
        """Makes an item and queues it, as send() does."""
        item = Item(kind=kind, id=id, fence=fence, seq=seq, tokens=tokens, flags=flags, body=body)  # type: ignore[arg-type]  # any int is a valid open enum value
        self._enqueue(kind, id, fence, flags, item.SerializeToString())

    def _enqueue(self, kind: int, id_: bytes, fence: int, flags: int, encoded: bytes) -> None:
        if self._end is not None:
            raise LinkDown
        size = len(encoded)
        if size > self._max_item_bytes:
            raise PayloadTooLarge(Reason.PAYLOAD_TOO_LARGE, metadata={"limit": str(self._max_item_bytes)})
        framed = (PREFIXES[size] if size < 4096 else prefix(size)) + encoded
        if kind >= 64:
            level = self._queue.push_background(framed, self._loop.time())
        elif kind >= 32:
            if self._refuses and kind != ERROR and self._overflowed.covers(id_, fence, self._loop.time()):
                return  # it ended by overflow: the rest of it would arrive with a hole
            urgent = flags & FIRST_OR_LAST != 0 or kind in ALWAYS_URGENT
            level = self._queue.push_data(id_, framed, urgent, flags & FLAG_LAST != 0)
        else:
            level = self._queue.push_control(framed)
        if level >= self._writer.wake_level:
            self._writer.wake()
        elif level < 0:
            self._overflow(kind, id_, fence)

    def call(self, body: bytes, timeout_s: float, id: bytes | None = None) -> "asyncio.Future[bytes]":  # noqa: A002 -- the field's name
        """Asks the other side; the future gives the body of its Reply.

        It raises what the other side failed with (a MeshError), DeadlineExceeded after timeout_s (the other side gets a Cancel), or
        LinkDown. Cancelling the future only forgets the answer; cancel(id) stops the work.
        """
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._call(body, timeout_s, id or new_id(), future, None)
        return future

    def ask(self, body: bytes, timeout_s: float, on_answer: OnAnswer, id: bytes | None = None) -> None:  # noqa: A002 -- the field's name
        """As call(), with a callback (body, None) or (None, error) in place of a future: saves a turn of the loop and 2 us."""
        self._call(body, timeout_s, id or new_id(), None, on_answer)

    def _call(
        self,
        body: bytes,
        timeout_s: float,
        id_: bytes,
        future: "asyncio.Future[bytes] | None",
        on_answer: OnAnswer | None,
    ) -> None:
        self._calls.add(id_, timeout_s, future, on_answer)
        try:
            self.send_new(CALL, id=id_, body=body)
        except MeshError as error:
            self._calls.fail(id_, error)

    def reply(self, id: bytes, body: bytes) -> None:  # noqa: A002 -- the field's name
        """Answers Call `id`. Does nothing on a link that has ended: nobody waits there."""
        if self._end is None:
            self.send_new(REPLY, id=id, body=body)

    def fail(self, id: bytes, error: BaseException, *, seq: int = 0, fence: int = 0, flags: int = FLAG_LAST) -> None:  # noqa: A002 -- the field's name
        """Ends Call or job `id` with an error; seq is the number of frames sent before. Does nothing on a link that has ended."""
        if self._end is None:
            body = to_failure(error).SerializeToString()
            self.send_new(ERROR, id=id, body=body, seq=seq, fence=fence, flags=flags)

    def cancel(self, id: bytes, reason: str, fence: int = 0, delivered_tokens: int = 0) -> None:  # noqa: A002 -- the field's name
        """Stops job or call `id` at the other side: overtakes data, and what is queued for it here is dropped.

        fence 0 stops all of it, one with try 0 the attempt, else that try. Does nothing on a link that has ended.
        """
        if self._end is not None:
            return
        self.stats.cancelled_items += self._queue.drop(id)
        body = Cancel(reason=reason, delivered_tokens=delivered_tokens).SerializeToString()
        self.send_new(CANCEL, id=id, fence=fence, body=body)

    def is_cancelled(self, id: bytes, fence: int = 0) -> bool:  # noqa: A002 -- the field's name
        """Whether the other side cancelled it within the last 60 s."""
        return self._cancelled.covers(id, fence, self._loop.time())

    def goodbye(self, reason: int = GoodbyeReason.GOODBYE_REASON_DRAIN, drain_ms: int = 0) -> None:
        """Tells the other side to give no new ids; what runs goes on, at most drain_ms. Once; close() ends the link."""
        if self._end is None and not self._said_goodbye:
            self._said_goodbye = True
            body = Goodbye(reason=reason, drain_ms=drain_ms).SerializeToString()  # type: ignore[arg-type]  # any int is a valid open enum value
            self.send_new(GOODBYE, body=body)

    def queued_bytes(self, id: bytes) -> int:  # noqa: A002 -- the field's name
        """Data of id that has not left."""
        return self._queue.bytes_of(id)

    @property
    def queued_total_bytes(self) -> int:
        """Of all classes."""
        return self._queue.queued_bytes

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

    def open_flow(self, id: bytes, on_window: Callable[[Window], None]) -> None:  # noqa: A002 -- the field's name
        """WINDOW items of `id` go to on_window instead of the receiver, until close_flow(id)."""
        self._flows[id] = on_window

    def close_flow(self, id: bytes) -> None:  # noqa: A002 -- the field's name
        """Ends open_flow."""
        self._flows.pop(id, None)

    # --- overflow -------------------------------------------------------------------------------------------------------

    def _overflow(self, kind: int, id_: bytes, fence: int) -> None:
        self.stats.overflows += 1
        if kind < 32:
            # Control is bounded by what runs; only a peer that reads nothing lets it pile up.
            self.finish(LinkEnd.LOST)
            return
        if kind < 64:
            self._overflowed.add(id_, fence, self._loop.time())
            self._refuses = True
            self._queue.drop(id_)
            error = ResourceExhausted(Reason.SEND_QUEUE_FULL, "Data piled up faster than it could be sent.")
            if kind == CALL:
                self._calls.fail(id_, error)
            elif kind in ASKS:
                self.cancel(id_, error.reason.value, fence)
            else:
                body = to_failure(error).SerializeToString()
                end = Item(kind=ERROR, id=id_, fence=fence, flags=FLAG_LAST, body=body)  # type: ignore[arg-type]  # any int is a valid open enum value
                if self._queue.push_end(id_, frame(end.SerializeToString())) < 0:
                    self.finish(LinkEnd.LOST)
                    return
                self._writer.wake()
        on_overflow = getattr(self._receiver, "on_overflow", None)
        if on_overflow is not None:
            # In a turn of its own: send() is called from the middle of somebody's state machine.
            self._loop.call_soon(on_overflow, self, id_)

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
                if kind < 32:
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
        self._on_tick()
        self._announced = True
        self._receiver.on_up(self, handshake_body)

    def _on_tick(self) -> None:
        if self._end is not None:
            return
        now = self._loop.time()
        life, beat = self._liveness.tick(now)
        if life is Life.LOST or self._writer.stalled_s(now) >= self.options.lost_s:
            self.finish(LinkEnd.LOST)
            return
        if life is Life.SUSPECT and not self.suspect:
            self._set_suspect(True)
        if beat:
            self._liveness.sent_at = now
            self.send_new(HEARTBEAT, body=self.heartbeat_body() if self.heartbeat_body else _EMPTY)
        self._writer.counts_as_beat = self.heartbeat_body is None
        self._tick_timer = self._loop.call_later(self._liveness.next_tick(now), self._on_tick)

    def _set_suspect(self, suspect: bool) -> None:
        self.suspect = suspect
        on_suspect = getattr(self._receiver, "on_suspect", None)
        if on_suspect is not None:
            on_suspect(self, suspect)

    def _call_expired(self, id_: bytes) -> None:
        self.cancel(id_, Reason.DEADLINE_EXCEEDED.value)

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
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._calls.fail_all(LinkDown)
        self._flows.clear()
        self._writer.stop()
        if not self.ended.done():
            self.ended.set_result(end)
        if self._announced:
            self._receiver.on_down(self, end)
