"""What waits to be written on one link, and when it may go. Pure: time comes in as an argument, bytes come out.

Three queues, one per class. take() gives the next message: control first, then data in the order it came (so every job keeps its
order), then background in the room that is left. The pacing rule (link.md rule 2) is here, because it decides what take() gives.
"""

from collections import deque
from typing import Final

from gpumesh_runtime.link.options import LinkOptions

# What a push asks of a sleeping writer, from "nothing new" up. The writer sleeps at a level and is woken by that or more.
RIDES: Final = 0  # background: goes along, or in 50 ms
PLAIN: Final = 1  # data that pacing may hold
URGENT: Final = 2  # control, first and last items, a full message: go now
NEVER: Final = 1e30

_Entry = tuple[bytes, bytes, bool]  # id, framed bytes, whether it is a last item


class SendQueue:
    """Bounded queues of encoded items.

    push_* return the level to wake the writer at, or -1 when a bound is exceeded; nothing was queued then.
    """

    __slots__ = (
        "_background",
        "_background_since",
        "_control",
        "_data",
        "_data_sent_at",
        "_id_bytes",
        "_options",
        "_popped",
        "_urgent_at",
        "background_bytes",
        "control_bytes",
        "data_bytes",
        "dropped_items",
        "taken_items",
    )

    def __init__(self, options: LinkOptions) -> None:
        self._options = options
        self._control: deque[bytes] = deque()
        self._data: deque[_Entry] = deque()
        self._background: deque[bytes] = deque()
        self._id_bytes: dict[bytes, int] = {}
        self._popped = 0  # data items that have left, ever
        self._urgent_at = 0  # one past the position, on the same count, of the last urgent data item
        self._data_sent_at = -NEVER
        self._background_since = NEVER
        self.control_bytes = 0
        self.data_bytes = 0
        self.background_bytes = 0
        self.taken_items = 0  # items in the message that take() gave last
        self.dropped_items = 0  # by cancels and overflow, ever

    def __len__(self) -> int:
        return len(self._control) + len(self._data) + len(self._background)

    @property
    def empty(self) -> bool:
        """Whether nothing is queued."""
        return not (self._data or self._control or self._background)

    @property
    def queued_bytes(self) -> int:
        """Of all classes."""
        return self.control_bytes + self.data_bytes + self.background_bytes

    def bytes_of(self, id_: bytes) -> int:
        """Data queued for one id."""
        return self._id_bytes.get(id_, 0)

    def push_control(self, framed: bytes) -> int:
        """Queues a control item."""
        size = self.control_bytes + len(framed)
        if size > self._options.queue_control_bytes:
            return -1
        self.control_bytes = size
        self._control.append(framed)
        return URGENT

    def push_data(self, id_: bytes, framed: bytes, urgent: bool, last: bool) -> int:
        """Queues a data item of id_; urgent ones (first, last) are not held by pacing."""
        size = len(framed)
        options = self._options
        total = self.data_bytes + size
        of_id = self._id_bytes.get(id_, 0) + size
        if total > options.queue_data_bytes or of_id > options.queue_id_bytes:
            return -1
        self.data_bytes = total
        self._id_bytes[id_] = of_id
        data = self._data
        data.append((id_, framed, last))
        if urgent:
            self._urgent_at = self._popped + len(data)
            return URGENT
        if total >= options.max_message_bytes or len(data) >= options.max_items:
            return URGENT
        return PLAIN

    def push_end(self, id_: bytes, framed: bytes) -> int:
        """Queues the end of an id whose data overflowed: beyond the data bounds, within the control bound on top."""
        total = self.data_bytes + len(framed)
        if total > self._options.queue_data_bytes + self._options.queue_control_bytes:
            return -1
        self.data_bytes = total
        self._id_bytes[id_] = self._id_bytes.get(id_, 0) + len(framed)
        self._data.append((id_, framed, True))
        self._urgent_at = self._popped + len(self._data)
        return URGENT

    def push_background(self, framed: bytes, now: float) -> int:
        """Queues a background item."""
        size = self.background_bytes + len(framed)
        if size > self._options.queue_background_bytes:
            return -1
        if not self._background:
            self._background_since = now
        self.background_bytes = size
        self._background.append(framed)
        return RIDES

    def drop(self, id_: bytes, *, keep_last: bool = False) -> int:
        """Takes the unsent data of id_ out of the queue and returns how many items that were.

        keep_last leaves an item with LAST: whoever waits for an end must get one.
        """
        if id_ not in self._id_bytes:
            return 0
        was_urgent = self._urgent_at > self._popped
        kept = [entry for entry in self._data if entry[0] != id_ or (keep_last and entry[2])]
        dropped = len(self._data) - len(kept)
        left = sum(len(entry[1]) for entry in kept if entry[0] == id_)
        self.data_bytes -= self._id_bytes.pop(id_) - left
        if left:
            self._id_bytes[id_] = left
        self._data.clear()
        self._data.extend(kept)
        # Positions have shifted. If something urgent was queued, treat the whole rest as urgent: early is safe, late is not.
        self._urgent_at = self._popped + len(kept) if was_urgent else 0
        self.dropped_items += dropped
        return dropped

    def _data_due(self) -> float:
        """When the queued data may go: NEVER when there is none, in the past when it may go now."""
        if not self._data:
            return NEVER
        options = self._options
        if (
            self._urgent_at > self._popped
            or self.data_bytes >= options.max_message_bytes
            or len(self._data) >= options.max_items
        ):
            return -NEVER
        return self._data_sent_at + options.pace_s

    def due(self) -> tuple[float, int]:
        """(when take() will give something, the level from which a push changes that)."""
        if self._control:
            return -NEVER, URGENT
        data = self._data_due()
        background = self._background_since + self._options.background_s if self._background else NEVER
        if data == NEVER:
            return background, PLAIN if self._background else RIDES
        return min(data, background), URGENT

    def take(self, now: float) -> bytes | None:
        """The next message, an encoded Batch; None when nothing may go yet. taken_items says how many items are in it."""
        control, data, background = self._control, self._data, self._background
        options = self._options
        data_goes = bool(data) and (
            self._data_due() <= now or (bool(control) and self.data_bytes <= options.ride_bytes)
        )
        overdue = self._background_since + options.background_s <= now
        if not (control or data_goes or overdue):
            return None
        parts: list[bytes] = []
        room = options.max_message_bytes
        if control:
            room = self._take_control(parts, room)
        # Much data behind a control item goes in a message of its own: the other side reads control the sooner.
        if data_goes and not control and (not parts or self.data_bytes <= options.ride_bytes):
            # A quarter of the message is for background that has waited its time: full messages must not starve it.
            kept = min(self.background_bytes, options.max_message_bytes // 4) if overdue else 0
            items = min(len(background), options.max_items // 4) if overdue else 0
            room = self._take_data(parts, room - kept, options.max_items - len(parts) - items, now) + kept
        if background and not control:
            self._take_background(parts, room)
        self.taken_items = len(parts)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _take_control(self, parts: list[bytes], room: int) -> int:
        control = self._control
        most = self._options.max_items
        while control and len(parts) < most and (len(control[0]) <= room or not parts):
            framed = control.popleft()
            parts.append(framed)
            size = len(framed)
            room -= size
            self.control_bytes -= size
        return room

    def _take_data(self, parts: list[bytes], room: int, most: int, now: float) -> int:
        data = self._data
        count = len(data)
        if self.data_bytes <= room and count <= most:  # all of it, the usual case
            parts.extend([entry[1] for entry in data])
            room -= self.data_bytes
            data.clear()
            self._id_bytes.clear()
            self.data_bytes = 0
        else:
            id_bytes = self._id_bytes
            count = 0
            while data and count < most and (len(data[0][1]) <= room or not parts):
                id_, framed, _ = data.popleft()
                parts.append(framed)
                size = len(framed)
                room -= size
                self.data_bytes -= size
                left = id_bytes[id_] - size
                if left:
                    id_bytes[id_] = left
                else:
                    del id_bytes[id_]
                count += 1
        if count:
            self._popped += count
            self._data_sent_at = now
        return room

    def _take_background(self, parts: list[bytes], room: int) -> None:
        background = self._background
        most = self._options.max_items
        while background and len(parts) < most and (len(background[0]) <= room or not parts):
            framed = background.popleft()
            parts.append(framed)
            size = len(framed)
            room -= size
            self.background_bytes -= size
        # What did not fit keeps the time of the oldest: early is harmless.
        if not background:
            self._background_since = NEVER
