"""Server-sent events, incrementally: bytes in as the network cuts them, data of whole events out.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html (only `data` matters here; comments and other fields are skipped).
"""

from typing import Final

# One event of an engine is a token or a whole tool call; 4 MiB is the largest message that gRPC receives anywhere in the mesh.
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024


class SseError(ValueError):
    """The stream is not one of server-sent events that we accept. The text never quotes the stream."""


class SseParser:
    """Cuts a byte stream into events. Lines may end in LF, CR LF or CR; a piece may end anywhere, also inside a character."""

    __slots__ = ("_after_cr", "_started", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._after_cr = False
        self._started = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Takes the next bytes; returns the data of each event that they complete, in order. Raises SseError."""
        if self._after_cr or b"\r" in piece:
            piece = self._with_line_feeds(piece)
        buffer = self._tail + piece if self._tail else piece
        if not self._started and buffer:
            if buffer[:3] == b"\xef\xbb\xbf":
                buffer = buffer[3:]
            self._started = len(buffer) > 2
        if b"\n\n" not in buffer:
            self._keep(buffer)
            return []
        blocks = buffer.split(b"\n\n")
        self._keep(blocks.pop())
        events = []
        for block in blocks:
            # Nearly every event of every engine is this one line.
            if block[:6] == b"data: " and b"\n" not in block:
                events.append(block[6:])
            elif (data := _data_of(block)) is not None:
                events.append(data)
        return events

    def finish(self) -> list[bytes]:
        """The stream has ended: an event that lacks only its blank line still counts (some servers end on `data: [DONE]`)."""
        block, self._tail = self._tail, b""
        data = _data_of(block)
        return [] if data is None else [data]

    def _keep(self, tail: bytes) -> None:
        if len(tail) > MAX_EVENT_BYTES:
            raise SseError(f"an event is longer than {MAX_EVENT_BYTES} bytes")
        self._tail = tail

    def _with_line_feeds(self, piece: bytes) -> bytes:
        """CR LF and CR as LF. A CR at the end of a piece counts at once; the LF that may follow in the next piece belongs to it."""
        if not piece:
            return piece
        if self._after_cr and piece[:1] == b"\n":
            piece = piece[1:]
        self._after_cr = piece[-1:] == b"\r"
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data_of(block: bytes) -> bytes | None:
    """The data lines of one block, joined with LF; None when it has none."""
    found: list[bytes] = []
    for line in block.split(b"\n"):
        if line[:5] == b"data:":
            found.append(line[6:] if line[5:6] == b" " else line[5:])
        elif line == b"data":
            found.append(b"")
    return b"\n".join(found) if found else None
