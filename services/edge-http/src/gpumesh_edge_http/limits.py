"""Bounds of the HTTP side, each with its reason. Times in seconds."""

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB


class Uploads:
    """Bytes of bodies that are still coming in."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Source where none is given: mechanisms.md 10."""

    max_body_bytes: int = 8 * MIB
    # Bodies that are still coming in, over all connections together: 10,000 clients with 8 MiB each must not fill the memory.
    max_uploading_bytes: int = 512 * MIB
    header_timeout_s: float = 10.0
    body_bytes_per_s: int = KIB
    # A body's first bytes may take this long before the rate counts.
    body_grace_s: float = 5.0
    write_stall_s: float = 30.0
    # What a slow reader may make us hold: this buffer, plus the window of frames under way (dispatch: 128 KiB).
    write_buffer_bytes: int = 64 * KIB
    # The kernel's own buffer; without a bound it grows to 4 MiB a connection.
    send_buffer_bytes: int = 128 * KIB
    # Longer than the keep-alive of common load balancers (60 s), so that they close first.
    idle_timeout_s: float = 75.0
    max_connections: int = 10_000
    max_headers: int = 64
    max_line_bytes: int = 8 * KIB
    max_header_bytes: int = 8 * KIB
    # Comments keep proxies from closing a stream that waits for its first token.
    keep_alive_comment_s: float = 10.0
