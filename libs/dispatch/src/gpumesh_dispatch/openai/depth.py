"""Bounds how deep a JSON body nests: engines behind us parse it with parsers that recurse."""

import re
from typing import Final

MAX_DEPTH: Final = 32
_STRING: Final = re.compile(rb'"[^"]*"')
_DROP: Final = bytes(set(range(256)) - set(b'[]{}"'))


def too_deep(body: bytes, limit: int = MAX_DEPTH) -> bool:
    """Whether valid JSON nests deeper than `limit` levels. Short bodies cost two counts; long ones about 2 ns a byte."""
    if body.count(b"{") + body.count(b"[") <= limit:
        return False
    # Escaped backslashes go first, then escaped quotes: what is left of a quote is a string's end. A run of backslashes is replaced from
    # the left, so an odd one keeps its last, which belongs to the character after it.
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRING.sub(b"", body.translate(None, _DROP))
    depth = 0
    for char in brackets:
        if char in b"[{":
            depth += 1
            if depth > limit:
                return True
        else:
            depth -= 1
    return False
