"""The one place that touches aiohttp's internals: its low-level server with requests and answers of our own.

aiohttp parses HTTP (its C parser), keeps connections alive and reads bodies. Answers do not go through StreamResponse: the bytes are put on
the transport in one write, which costs half (measured per request: 15 us against 22, per chunk 13-18 against 25-35). What is used of
aiohttp beyond its public surface is listed in tests/contract/test_aiohttp_internals.py, which fails when a new version changes it.

Rules kept here (mechanisms.md 10): 10 s for a request's head, bodies of at least 1 KiB/s, 30 s without progress of a write, a bounded
number of connections, requests that could be read in two ways refused (the parser does), SO_SNDBUF set so that a slow reader holds little.
"""

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from aiohttp import web
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from gpumesh_edge_http.exchange import Exchange
from gpumesh_edge_http.limits import Limits, Uploads


class _Answered:
    """What the handler returns to aiohttp: the answer is on the transport already."""

    __slots__ = ("keep_alive",)

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive

    async def prepare(self, request: Exchange) -> None:
        """Nothing is left to prepare."""

    async def write_eof(self) -> None:
        """Nothing is left to write."""


_KEEP: Final = _Answered(keep_alive=True)
_CLOSE: Final = _Answered(keep_alive=False)

Handler = Callable[[Exchange], Awaitable[None]]
Malformed = Callable[[Exchange, str], None]


class _InlineTasks:
    """The event loop as aiohttp's connection sees it before Python 3.12: requests run inside the connection's own task.

    aiohttp makes a task per request to give it its own context variables, which nothing here uses; it costs 5 us and a turn of the loop.
    From 3.12 on aiohttp starts that task eagerly, and this is not used.
    """

    __slots__ = ("_loop", "call_at", "create_future", "time")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.call_at = loop.call_at
        self.create_future = loop.create_future
        self.time = loop.time

    def create_task(self, work: Coroutine[Any, Any, Any]) -> Any:
        """A task for the connection's own coroutine; a request's coroutine as it is, to be awaited in place."""
        return self._loop.create_task(work) if getattr(work, "__name__", "") == "start" else work


class EdgeProtocol(RequestHandler):
    """aiohttp's connection, with direct writes and callbacks for loss and drain."""

    __slots__ = ("_last_buffer", "_stalled_since", "exchange", "head_since", "limits", "owner", "uploads")

    def __init__(self, owner: "EdgeServer", **kwargs: Any) -> None:
        super().__init__(owner.server, **kwargs)
        if sys.version_info < (3, 12):
            self._loop = owner.inline_loop
        self.owner = owner
        self.limits = owner.limits
        self.uploads = owner.uploads
        self.exchange: Exchange | None = None
        self.head_since = 0.0  # when the head that is awaited began; 0: none is
        self._stalled_since = 0.0
        self._last_buffer = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        super().connection_made(transport)
        self.head_since = self._loop.time()
        assert self.transport is not None  # set by super
        self.transport.set_write_buffer_limits(
            high=self.limits.write_buffer_bytes, low=self.limits.write_buffer_bytes // 4
        )
        if len(self.owner.server.connections_map) > self.limits.max_connections:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Bytes came; notes since when a head has been incomplete."""
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self.head_since = 0.0
        elif self.exchange is None and not self.head_since and not self._messages:
            self.head_since = self._loop.time()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The client is gone: whoever answers it hears so in this turn."""
        exchange = self.exchange
        super().connection_lost(exc)
        if exchange is not None and exchange.on_lost is not None:
            exchange.on_lost()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Reading goes on. aiohttp calls this for every body, paused or not, and parses nothing again each time: 3 us a request."""
        if self._reading_paused or self._buffer_paused:
            super().resume_reading(resume_parser)

    def resume_writing(self) -> None:
        """The transport drained: the answer may go on."""
        super().resume_writing()
        self._stalled_since = 0.0
        exchange = self.exchange
        if exchange is not None and exchange.on_writable is not None:
            exchange.on_writable()

    def write(self, data: bytes) -> None:
        """Puts bytes on the transport; nothing when the client is gone."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def handle_error(
        self, request: Any, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> Any:
        """Something that is not HTTP, or not HTTP as we read it. aiohttp would log parts of it and answer in plain text."""
        exchange: Exchange = request
        exchange.keep_alive = False
        self.owner.malformed(exchange, type(exc).__name__ if exc is not None else "")
        return _CLOSE

    def look(self, now: float) -> None:
        """Called each second: closes connections whose head or whose reading stalls."""
        transport = self.transport
        if transport is None:
            return
        if self.head_since and now - self.head_since > self.limits.header_timeout_s:
            self.owner.head_timeouts += 1
            transport.close()
            self.force_close()
            return
        if not self.writing_paused:
            return
        waiting = transport.get_write_buffer_size()
        if waiting != self._last_buffer or not self._stalled_since:
            self._last_buffer, self._stalled_since = waiting, now
        elif now - self._stalled_since > self.limits.write_stall_s:
            self.owner.write_stalls += 1
            if self.exchange is not None:
                self.exchange.stalled = True
            transport.abort()


class _Server(web.Server):
    """aiohttp's low-level server, making our protocol."""

    def __init__(
        self, owner: "EdgeServer", handler: Callable[[Any], Awaitable[Any]], factory: Any, **kwargs: Any
    ) -> None:
        super().__init__(handler, request_factory=factory, handler_cancellation=True, **kwargs)
        self._owner = owner

    @property
    def connections_map(self) -> dict[Any, Any]:
        """Live connections, not copied."""
        return self._connections

    def __call__(self) -> EdgeProtocol:
        return EdgeProtocol(self._owner, loop=self._loop, **self._kwargs)


class EdgeServer:
    """Listens and calls `handler` for each request; `malformed` answers what could not be parsed.

    The handler answers through the exchange before it returns, and is cancelled when the client goes away.
    """

    def __init__(self, handler: Handler, malformed: Malformed, limits: Limits) -> None:
        self.limits = limits
        self.uploads = Uploads()
        self.malformed = malformed
        self._closing = False
        self.head_timeouts = 0
        self.write_stalls = 0
        self._handler = handler
        self.server = _Server(
            self,
            self._handle,
            self._make_exchange,
            access_log=None,
            keepalive_timeout=limits.idle_timeout_s,
            lingering_time=2.0,
            auto_decompress=False,
            max_line_size=limits.max_line_bytes,
            max_field_size=limits.max_header_bytes,
            max_headers=limits.max_headers,
        )
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.get_running_loop()
        self.inline_loop: Any = _InlineTasks(self._loop)
        self._timer: asyncio.TimerHandle | None = None
        self.port = 0

    def _make_exchange(self, message: Any, payload: StreamReader, protocol: Any, writer: Any, task: Any) -> Exchange:
        del writer, task
        exchange = Exchange(message, payload, protocol)
        if self._closing:
            exchange.keep_alive = False
        return exchange

    async def _handle(self, exchange: Exchange) -> _Answered:
        protocol: Any = exchange.protocol
        protocol.exchange = exchange
        try:
            await self._handler(exchange)
            if protocol.writing_paused:
                # A client that pipelines and does not read must not pile up answers.
                await protocol._drain_helper()
        finally:
            protocol.exchange = None
        return _KEEP if exchange.keep_alive else _CLOSE

    async def start(self, host: str, port: int, tls: Any = None) -> None:
        """Binds and serves. port 0 takes a free one (see `port`). Raises OSError."""
        listening = await self._bind(host, port)
        self._listener = await self._loop.create_server(self.server, sock=listening, ssl=tls, backlog=1024)
        self.port = listening.getsockname()[1]
        self._tick()

    async def _bind(self, host: str, port: int) -> socket.socket:
        infos = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = infos[0]
        listening = socket.socket(family, kind, proto)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Accepted sockets inherit it; the kernel doubles what is asked.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.limits.send_buffer_bytes // 2)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
        listening.setblocking(False)
        return listening

    def _tick(self) -> None:
        self._timer = self._loop.call_later(1.0, self._tick)
        now = self._loop.time()
        for protocol in self.server.connections:
            if isinstance(protocol, EdgeProtocol):
                protocol.look(now)

    @property
    def connections(self) -> int:
        """Clients connected."""
        return len(self.server.connections_map)

    def close_listener(self) -> None:
        """Takes no new connections; idle ones are closed, requests that run go on."""
        self._closing = True
        if self._listener is not None:
            self._listener.close()
        for protocol in self.server.connections:
            protocol.close()
            if not isinstance(protocol, EdgeProtocol):
                continue
            if protocol.exchange is not None:
                protocol.exchange.keep_alive = False  # an answer that has not begun tells its client
            elif protocol.transport is not None:
                protocol.transport.close()

    async def stop(self, timeout_s: float) -> None:
        """Closes everything, waiting `timeout_s` for requests that run."""
        if self._timer is not None:
            self._timer.cancel()
        self.close_listener()
        await self.server.shutdown(timeout_s)
        if self._listener is not None:
            await self._listener.wait_closed()
