"""One request and its answer, over a connection of transport.py. Above this module nothing knows which HTTP server is underneath."""

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from gpumesh_edge_http.limits import Limits, Uploads
from gpumesh_runtime.errors import DeadlineExceeded, MeshError, PayloadTooLarge, Reason, ResourceExhausted

HTTP11: Final = (1, 1)
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_LAST_CHUNK: Final = b"0\r\n\r\n"


class Connection(Protocol):
    """What an exchange needs of its connection."""

    limits: Limits
    uploads: Uploads
    transport: asyncio.Transport | None

    @property
    def peername(self) -> Any:
        """The client's address as the socket gives it."""

    @property
    def writing_paused(self) -> bool:
        """Whether the transport is full."""

    def write(self, data: bytes) -> None:
        """Puts bytes on the transport; nothing when the client is gone."""


class ClientGoneError(Exception):
    """The connection went away while the request was being read."""


class Exchange:
    """One request and its answer. Stands in for aiohttp's request object, of which the low-level server needs very little.

    on_lost: called at once when the connection breaks. on_writable: called when a transport that was full has drained.
    status, bytes_out: what was answered, for the log line.
    """

    __slots__ = (
        "_chunked",
        "_message",
        "_payload",
        "_task",
        "bytes_in",
        "bytes_out",
        "headers",
        "keep_alive",
        "method",
        "on_lost",
        "on_writable",
        "path",
        "protocol",
        "stalled",
        "started",
        "status",
    )

    def __init__(self, message: RawRequestMessage, payload: StreamReader, protocol: Connection) -> None:
        self._message = message
        self._payload = payload
        self.protocol = protocol
        self._task: Any = None  # set to None by aiohttp at the end
        self._chunked = False
        self.method = message.method
        self.path = message.path
        self.headers = message.headers
        # An HTTP/1.0 client that asked to keep the connection would have to be told; none that matters does.
        self.keep_alive = not message.should_close and message.version >= HTTP11
        self.on_lost: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self.started = False
        self.stalled = False  # the client stopped reading and was cut off
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0

    # --- what aiohttp calls on a request object ---------------------------------------------------------------------------

    def _finish(self) -> None:
        """The handler has returned."""

    def _cancel(self, exc: BaseException) -> None:
        """The connection is lost; EdgeProtocol has told us already."""

    # --- reading --------------------------------------------------------------------------------------------------------

    @property
    def remote(self) -> str:
        """The client's address, empty when unknown."""
        peer = self.protocol.peername
        return str(peer[0]) if isinstance(peer, tuple) else ""

    async def read_body(self) -> bytes:
        """The whole body. Raises PayloadTooLarge, DeadlineExceeded (REQUEST_TIMEOUT) when it comes too slowly, ClientGoneError."""
        limits = self.protocol.limits
        length = self.headers.get("Content-Length")
        if length is not None and int(length) > limits.max_body_bytes:  # the parser has checked that it is a number
            raise self._too_large()
        payload = self._payload
        if payload.is_eof():
            body = payload.read_nowait()
        else:
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.protocol.write(_CONTINUE)
            body = await self._read_slowly(limits)
        self.bytes_in = len(body)
        if self.bytes_in > limits.max_body_bytes:
            raise self._too_large()
        return body

    async def _read_slowly(self, limits: Limits) -> bytes:
        parts: list[bytes] = []
        received = 0
        payload, uploads = self._payload, self.protocol.uploads
        loop = asyncio.get_running_loop()
        began = loop.time() + limits.body_grace_s
        try:
            while True:
                async with asyncio.timeout_at(began + received / limits.body_bytes_per_s):
                    part = await payload.readany()
                if not part:
                    return b"".join(parts)
                parts.append(part)
                received += len(part)
                uploads.bytes += len(part)
                if received > limits.max_body_bytes:
                    raise self._too_large()
                if uploads.bytes > limits.max_uploading_bytes:
                    self.keep_alive = False
                    text = "Too many large requests are coming in at the moment. Try again."
                    raise ResourceExhausted(Reason.RESOURCE_EXHAUSTED, text, retry_after_s=1.0)
        except TimeoutError:
            self.keep_alive = False
            text = f"The request body came slower than {limits.body_bytes_per_s} bytes/s. Send it again over a faster connection."
            raise DeadlineExceeded(Reason.REQUEST_TIMEOUT, text) from None
        except (MeshError, asyncio.CancelledError):
            raise
        except Exception as err:  # aiohttp's payload errors: the connection broke, or the chunked framing is wrong
            self.keep_alive = False
            raise ClientGoneError from err
        finally:
            uploads.bytes -= received

    def _too_large(self) -> MeshError:
        self.keep_alive = False  # the rest of the body is not read
        limit = self.protocol.limits.max_body_bytes
        text = f"The request body is larger than {limit} bytes. Send less text or fewer images."
        return PayloadTooLarge(Reason.PAYLOAD_TOO_LARGE, text, metadata={"limit": str(limit)})

    # --- answering ------------------------------------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Whether the client is gone."""
        transport = self.protocol.transport
        return transport is None or transport.is_closing()

    @property
    def writable(self) -> bool:
        """Whether the transport takes more without piling it up."""
        return not self.protocol.writing_paused

    def answer(self, status: int, status_line: bytes, headers: bytes, body: bytes) -> None:
        """A whole answer in one write. headers: complete lines, each with its CRLF."""
        self.started = True
        self.status = status
        close = b"" if self.keep_alive else b"Connection: close\r\n"
        data = b"%b%bContent-Length: %d\r\n%b\r\n%b" % (
            status_line,
            headers,
            len(body),
            close,
            b"" if self.method == "HEAD" else body,
        )
        self.bytes_out += len(data)
        self.protocol.write(data)

    def start_stream(self, status_line: bytes, headers: bytes, first: bytes) -> None:
        """Begins an answer of unknown length with its first bytes, in one write."""
        self.started = True
        self.status = 200
        self._chunked = self._message.version >= HTTP11
        if self._chunked:
            close = b"" if self.keep_alive else b"Connection: close\r\n"
            data = b"%b%bTransfer-Encoding: chunked\r\n%b\r\n%x\r\n%b\r\n" % (
                status_line,
                headers,
                close,
                len(first),
                first,
            )
        else:
            self.keep_alive = False
            data = b"%b%bConnection: close\r\n\r\n%b" % (status_line, headers, first)
        self.bytes_out += len(data)
        self.protocol.write(data)

    def write(self, data: bytes, *, last: bool = False) -> None:
        """More of a streamed answer; with `last` its end."""
        if self._chunked:
            data = (
                b"%x\r\n%b\r\n%b" % (len(data), data, _LAST_CHUNK if last else b"")
                if data
                else (_LAST_CHUNK if last else b"")
            )
        if data:
            self.bytes_out += len(data)
            self.protocol.write(data)

    def abort(self) -> None:
        """Closes the connection at once; what was not sent is lost."""
        self.keep_alive = False
        transport = self.protocol.transport
        if transport is not None:
            transport.abort()
