"""The sending half of a link: items into the queue, calls, cancels, overflow. Nothing here awaits."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from gpumesh.common.v1.link_pb2 import Cancel, Goodbye, GoodbyeReason, Item
from gpumesh_runtime.errors import MeshError, PayloadTooLarge, Reason, ResourceExhausted, to_failure
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
    PREFIXES,
    REPLY,
    encode,
    frame,
    new_id,
    prefix,
)
from gpumesh_runtime.link.liveness import Liveness
from gpumesh_runtime.link.options import LinkOptions
from gpumesh_runtime.link.receiver import LinkDown, LinkEnd
from gpumesh_runtime.link.send_queue import SendQueue
from gpumesh_runtime.link.stats import LinkStats
from gpumesh_runtime.link.writer import Writer

_EMPTY = b""


class Sending(ABC):
    """What a Link can send; Link adds reading, life and end."""

    def __init__(self, options: LinkOptions, liveness: Liveness, write: Callable[[bytes], Awaitable[None]]) -> None:
        self.options = options
        self.stats = LinkStats()
        self._loop = asyncio.get_running_loop()
        self._queue = SendQueue(options)
        self._calls = Calls(self._call_expired)
        self._overflowed = CancelMemory(options.cancel_memory_s)
        self._refuses = False  # whether _overflowed was ever used: one test per item in place of a look-up
        self._max_item_bytes = options.max_item_bytes
        self._writer = Writer(self._queue, liveness, self.stats, write, self._write_broke)
        self._said_goodbye = False
        self._end: LinkEnd | None = None

    @abstractmethod
    def finish(self, end: LinkEnd) -> None:
        """Ends the link."""

    @abstractmethod
    def _write_broke(self) -> None:
        """Nothing can be written any more."""

    @abstractmethod
    def _tell_overflow(self, id_: bytes) -> None:
        """Tells the receiver that what was queued for id_ went over a bound."""

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
        self._enqueue(kind, id, fence, flags, encode(kind, id, fence, seq, tokens, flags, body))

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

    def drop(self, id: bytes) -> int:  # noqa: A002 -- the field's name
        """Drops the data of id that has not left, and says how many items that were: a later fence replaced them."""
        return self._queue.drop(id)

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
                if self._queue.push_end(id_, frame(encode(ERROR, id_, fence, 0, 0, FLAG_LAST, body))) < 0:
                    self.finish(LinkEnd.LOST)
                    return
                self._writer.wake()
        self._tell_overflow(id_)

    def _call_expired(self, id_: bytes) -> None:
        self.cancel(id_, Reason.DEADLINE_EXCEEDED.value)
