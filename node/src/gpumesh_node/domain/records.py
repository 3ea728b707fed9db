"""What the journal's bytes mean. A segment is an 8-byte head and records; a record is length, CRC-32 and body, little-endian.

Everything after the first record that does not check out is ignored: that is where a crash cut the file.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from gpumesh_node.domain.deltas import Usage
from gpumesh_node.domain.job import Outcome, Receipt

SEGMENT_HEAD: Final = b"gmnj\x01\x00\x00\x00"  # four letters, version 1, three bytes to spare
_FRAME: Final = struct.Struct("<II")
_PUT: Final = struct.Struct("<B16sQBqqqqq")
_DROP: Final = struct.Struct("<B16sQ")
_COUNTER: Final = struct.Struct("<BQ")
_PUT_TAG: Final = 1
_DROP_TAG: Final = 2
_COUNTER_TAG: Final = 3
# A receipt token is a few hundred bytes; a length beyond this is damage, not a record.
MAX_BODY: Final = 64 * 1024

Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Put:
    """A receipt to keep. wall_s: when it was written, Unix seconds."""

    receipt: Receipt
    wall_s: int


@dataclass(frozen=True, slots=True)
class Drop:
    """The receipt of (job_id, fence) is settled."""

    key: Key


@dataclass(frozen=True, slots=True)
class Counter:
    """Sessions opened so far; only grows."""

    value: int


Record = Put | Drop | Counter


def encode_put(receipt: Receipt, wall_s: int) -> bytes:
    """A Put as a record."""
    usage = receipt.usage
    head = _PUT.pack(
        _PUT_TAG,
        receipt.job_id,
        receipt.fence,
        receipt.outcome.value,
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.cached_prompt_tokens,
        usage.reasoning_tokens,
        wall_s,
    )
    return _framed(head + receipt.token)


def encode_drop(key: Key) -> bytes:
    """A Drop as a record."""
    return _framed(_DROP.pack(_DROP_TAG, *key))


def encode_counter(value: int) -> bytes:
    """A Counter as a record."""
    return _framed(_COUNTER.pack(_COUNTER_TAG, value))


def scan(data: bytes) -> Iterator[tuple[Record, int]]:
    """Records of a segment with the offset after each, up to the first that is damaged or cut. A wrong head gives none."""
    if data[: len(SEGMENT_HEAD)] != SEGMENT_HEAD:
        return
    at = len(SEGMENT_HEAD)
    while at + _FRAME.size <= len(data):
        size, crc = _FRAME.unpack_from(data, at)
        body = data[at + _FRAME.size : at + _FRAME.size + size]
        if not 0 < size <= MAX_BODY or len(body) < size or zlib.crc32(body) != crc:
            return
        record = _decode(body)
        if record is None:
            return
        at += _FRAME.size + size
        yield record, at


def _framed(body: bytes) -> bytes:
    if len(body) > MAX_BODY:
        raise ValueError("a journal record is too long")
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _decode(body: bytes) -> Record | None:
    try:
        if body[0] == _PUT_TAG:
            _, job_id, fence, outcome, *counts, wall_s = _PUT.unpack_from(body)
            receipt = Receipt(job_id, fence, body[_PUT.size :], Outcome(outcome), Usage(*counts))
            return Put(receipt, wall_s)
        if body[0] == _DROP_TAG:
            _, job_id, fence = _DROP.unpack(body)
            return Drop((job_id, fence))
        if body[0] == _COUNTER_TAG:
            return Counter(_COUNTER.unpack(body)[1])
    except (struct.error, ValueError):
        return None
    return None
