"""What an item is on the wire: classes, fences, ids and the framing inside a Batch. Pure.

A Batch is `repeated Item items = 1`, whose protobuf encoding is the concatenation of (tag 0x0A, length, item) per item. Items are
encoded when they are queued, so a batch is written by joining bytes: 0.15 us an item against 0.31 us for building a Batch message, the
queue counts exact bytes, and a queued item does not keep the whole received batch alive that it came in (protobuf's arenas would).
"""

import os
from enum import IntEnum
from functools import lru_cache
from typing import Final

from gpumesh.common.v1.link_pb2 import Item, ItemFlag, ItemKind

ID_BYTES: Final = 16
# A frame counts as its body plus this in windows: header, SSE framing and bookkeeping of one frame (link.md rule 5).
FRAME_OVERHEAD_BYTES: Final = 256
# More than header, tag and length of any item whose id is 16 bytes (at most 53): room beside the body in a message bound.
ITEM_HEADER_BYTES: Final = 64
FLAG_FIRST: Final = int(ItemFlag.ITEM_FLAG_FIRST)
FLAG_LAST: Final = int(ItemFlag.ITEM_FLAG_LAST)
FIRST_OR_LAST: Final = FLAG_FIRST | FLAG_LAST

HELLO: Final = int(ItemKind.ITEM_KIND_HELLO)
WELCOME: Final = int(ItemKind.ITEM_KIND_WELCOME)
HEARTBEAT: Final = int(ItemKind.ITEM_KIND_HEARTBEAT)
GOODBYE: Final = int(ItemKind.ITEM_KIND_GOODBYE)
CANCEL: Final = int(ItemKind.ITEM_KIND_CANCEL)
WINDOW: Final = int(ItemKind.ITEM_KIND_WINDOW)
CALL: Final = int(ItemKind.ITEM_KIND_CALL)
REPLY: Final = int(ItemKind.ITEM_KIND_REPLY)
ERROR: Final = int(ItemKind.ITEM_KIND_ERROR)
SUBMIT: Final = int(ItemKind.ITEM_KIND_SUBMIT)
OFFER: Final = int(ItemKind.ITEM_KIND_OFFER)
PAYLOAD: Final = int(ItemKind.ITEM_KIND_PAYLOAD)
FRAME: Final = int(ItemKind.ITEM_KIND_FRAME)
DONE: Final = int(ItemKind.ITEM_KIND_DONE)

# Items that begin or end something by their nature, flagged or not: pacing never holds them.
ALWAYS_URGENT: Final = frozenset((CALL, REPLY, ERROR, SUBMIT, OFFER, DONE))
# Items that ask this side for work: one that a Cancel overtook is dropped by the link itself. None is numbered above PAYLOAD, which the
# reader's shortest path relies on.
ASKS: Final = frozenset((CALL, SUBMIT, OFFER, PAYLOAD))
assert max(ASKS) == PAYLOAD

_FIRST_DATA_KIND: Final = 32
_FIRST_BACKGROUND_KIND: Final = 64
_TRY_BITS: Final = 16
_TRY_MASK: Final = (1 << _TRY_BITS) - 1


class ItemClass(IntEnum):
    """How the writer treats an item; the kind's number decides."""

    CONTROL = 0
    DATA = 1
    BACKGROUND = 2


def class_of_kind(kind: int) -> ItemClass:
    """1-31 control, 32-63 data, from 64 background."""
    if kind >= _FIRST_BACKGROUND_KIND:
        return ItemClass.BACKGROUND
    return ItemClass.DATA if kind >= _FIRST_DATA_KIND else ItemClass.CONTROL


def fence(attempt: int, try_: int) -> int:
    """The fence of a try: the caller numbers attempts from 1, the scheduler tries from 1; the later wins.

    Raises ValueError when the try needs more than 16 bits or either is negative.
    """
    if not 0 <= try_ <= _TRY_MASK or attempt < 0:
        raise ValueError(f"attempt {attempt}, try {try_}")
    return attempt << _TRY_BITS | try_


def split_fence(value: int) -> tuple[int, int]:
    """(attempt, try) of a fence."""
    return value >> _TRY_BITS, value & _TRY_MASK


def fence_covers(cancelled: int, fence_: int) -> bool:
    """Whether a cancel of `cancelled` stops work of `fence_`: 0 stops all, try 0 the whole attempt and those before it."""
    if cancelled == 0 or fence_ == 0:
        return True
    if cancelled & _TRY_MASK == 0:
        return fence_ >> _TRY_BITS <= cancelled >> _TRY_BITS
    return fence_ <= cancelled


def rendered_bytes(item: Item) -> int:
    """What a frame counts for in windows: its body + 256."""
    return len(item.body) + FRAME_OVERHEAD_BYTES


@lru_cache(maxsize=16_384)  # lengths, fences and frame numbers come again and again: 0.05 us in place of 0.4
def varint(value: int) -> bytes:
    """A number as protobuf writes it. value: >= 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def prefix(size: int) -> bytes:
    """Tag and length of an item of `size` encoded bytes, as they stand before it inside a Batch."""
    return b"\x0a" + varint(size)


# prefix() for the sizes that occur all the time.
PREFIXES: Final = tuple(prefix(size) for size in range(4096))


def frame(encoded: bytes) -> bytes:
    """An encoded Item as it stands inside a Batch."""
    size = len(encoded)
    return (PREFIXES[size] if size < 4096 else prefix(size)) + encoded


# Parts of encode(): kind and the tag and length of an id, flags.
_KINDS: Final = tuple(b"\x08" + varint(kind) + b"\x12\x10" for kind in range(128))
_FLAGS: Final = tuple(b"\x30" + varint(flags) if flags else b"" for flags in range(64))


def encode(kind: int, id_: bytes, fence: int, seq: int, tokens: int, flags: int, body: bytes) -> bytes:
    """An encoded Item, byte for byte what protobuf makes (a test compares them), in a third of its time.

    Raises ValueError for a field that is out of its range, as protobuf does.
    """
    if len(id_) != ID_BYTES or not 0 < kind < 128 or not 0 <= flags < 64:
        item = Item(kind=kind, id=id_, fence=fence, seq=seq, tokens=tokens, flags=flags, body=body)  # type: ignore[arg-type]  # any int is a valid open enum value
        return item.SerializeToString()
    if (fence | seq | tokens) >> 64:  # negative ones too: their sign is endless
        raise ValueError("a number of an item is out of range")
    out = _KINDS[kind] + id_
    if fence:
        out += b"\x18" + varint(fence)
    if seq:
        out += b"\x20" + varint(seq)
    if tokens:
        out += b"\x28" + varint(tokens)
    if flags:
        out += _FLAGS[flags]
    size = len(body)
    if size:
        out += b"\x3a" + varint(size) + body
    return out


class _Ids:
    """Random ids, drawn 256 at a time: a system call per id costs more than all the rest of it."""

    def __init__(self) -> None:
        self._pool = b""
        self._at = 0

    def forget(self) -> None:
        """Drops the pool; a forked child must not repeat its parent's ids."""
        self._pool, self._at = b"", 0

    def new(self) -> bytes:
        at = self._at
        if at >= len(self._pool):
            self._pool, at = os.urandom(ID_BYTES * 256), 0
        self._at = at + ID_BYTES
        return self._pool[at : at + ID_BYTES]


_ids = _Ids()
os.register_at_fork(after_in_child=_ids.forget)


def new_id() -> bytes:
    """16 random bytes: the id of a job or of a call."""
    return _ids.new()
