"""Identifiers: job ids, prefixed ids, base62, checksums. Randomness comes from the operating system."""

import secrets
import zlib
from typing import Final

_ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUE: Final = {char: index for index, char in enumerate(_ALPHABET)}
_ID_BYTES: Final = 12  # 96 bits: no collision expected below 2^48 ids
JOB_ID_BYTES: Final = 16


def new_job_id() -> bytes:
    """16 random bytes: id of a job or of a call on a link."""
    return secrets.token_bytes(JOB_ID_BYTES)


def job_id_text(job_id: bytes) -> str:
    """A job id as 32 hex digits, for logs and answers."""
    return job_id.hex()


def new_id(noun: str) -> str:
    """`<noun>_<17 base62 characters>`, for example `acct_0aZ...`; 96 random bits."""
    return f"{noun}_{base62(secrets.token_bytes(_ID_BYTES))}"


def base62(data: bytes) -> str:
    """Bytes as base62, of a length that depends on len(data) only (32 bytes: 43 characters)."""
    number = int.from_bytes(data, "big")
    width = base62_width(len(data))
    out = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        out.append(_ALPHABET[digit])
    return "".join(reversed(out))


def base62_width(size: int) -> int:
    """Characters that `size` bytes need in base62."""
    width, top, limit = 0, 1, 1 << (8 * size)
    while top < limit:
        width, top = width + 1, top * 62
    return width


def from_base62(text: str, size: int) -> bytes:
    """The reverse of base62. Raises ValueError for another alphabet, length or range."""
    if len(text) != base62_width(size):
        raise ValueError("wrong length")
    number = 0
    for char in text:
        digit = _VALUE.get(char)
        if digit is None:
            raise ValueError("not base62")
        number = number * 62 + digit
    try:
        return number.to_bytes(size, "big")
    except OverflowError:
        raise ValueError("out of range") from None


def crc32_text(text: str) -> str:
    """CRC-32 of ASCII text as 6 base62 characters: catches typing errors before anything is looked up."""
    return base62(zlib.crc32(text.encode()).to_bytes(4, "big"))


def random_bits(bits: int) -> int:
    """A random number of `bits` bits."""
    return secrets.randbits(bits)
