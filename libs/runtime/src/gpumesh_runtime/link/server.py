"""The serving side of links: called from a servicer's streaming method."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Batch, GoodbyeReason
from gpumesh_runtime.errors import DeadlineExceeded, InvalidArgument, MeshError, Reason, Unavailable, abort
from gpumesh_runtime.identity import Identity, peer_identity
from gpumesh_runtime.link.items import HELLO, WELCOME
from gpumesh_runtime.link.link import Link
from gpumesh_runtime.link.options import SERVICE_LINK, LinkOptions
from gpumesh_runtime.link.receiver import LinkEnd, Receiver
from gpumesh_runtime.link.stream import first_item, read_until_end, single, stop_task

Welcome = Callable[[bytes, Identity], bytes]
# How long the last words of a link that ends for a protocol error may take.
_LAST_WORDS_S: Final = 0.5


async def serve_link(
    request_iterator: Any,
    context: "grpc.aio.ServicerContext[Any, Any]",
    *,
    receiver: Receiver,
    welcome: Welcome,
    options: LinkOptions = SERVICE_LINK,
) -> None:
    """Serves one link inside `async def Connect(self, request_iterator, context)`; returns when it has ended.

    welcome(body of Hello, peer) gives the body of Welcome, or raises a MeshError to refuse. request_iterator is not used: the link reads
    and writes through the context. Ends the RPC with DEADLINE_EXCEEDED when no Hello comes, PROTOCOL_ERROR when something else does.
    """
    del request_iterator
    peer = peer_identity(context)
    read = context.read
    try:
        async with asyncio.timeout(options.handshake_s):
            first = await read()
    except TimeoutError:
        await abort(context, DeadlineExceeded(Reason.DEADLINE_EXCEEDED, "No Hello came."))
    except DecodeError:
        first = None
    hello = first_item(first, HELLO)
    if hello is None:
        await abort(context, InvalidArgument(Reason.PROTOCOL_ERROR, "A link begins with Hello."))
    try:
        answer = welcome(hello.body, peer)
    except (MeshError, DecodeError) as error:
        refusal = (
            error if isinstance(error, MeshError) else InvalidArgument(Reason.PROTOCOL_ERROR, "Hello is malformed.")
        )
        await abort(context, refusal)

    write = context.write  # bytes: gpumesh_runtime.rpc.server passes them on as they are

    await write(single(WELCOME, answer))
    link = Link(peer, receiver, options, write)
    reader: asyncio.Task[None] | None = None
    try:
        link.start(hello.body)
        if len(first.items) > 1:
            link.deliver(Batch(items=first.items[1:]))
        reader = asyncio.get_running_loop().create_task(read_until_end(link, read), name="link-reader")
        await link.ended
        if link.end is LinkEnd.PROTOCOL_ERROR:
            await link.last_words(_LAST_WORDS_S)
    finally:
        # Also on cancellation, which is how grpc.aio tells that the client is gone or the server stops.
        link.lost()
        if reader is not None:
            await stop_task(reader)


class LinkServer:
    """The serving side's live links, for a servicer that keeps them: serve() in the streaming method, goodbye() and close() at shutdown.

    After either no new link is taken: its client hears DRAINING and connects elsewhere, or again later.
    """

    def __init__(self, receiver: Receiver, welcome: Welcome, options: LinkOptions = SERVICE_LINK) -> None:
        self.links: set[Link] = set()
        self.draining = False
        self._receiver = receiver
        self._welcome = welcome
        self._options = options

    async def serve(self, request_iterator: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """As serve_link. Raises Unavailable (DRAINING) after goodbye() or close()."""
        self.check_open()
        receiver = _Noting(self._receiver, self)
        await serve_link(request_iterator, context, receiver=receiver, welcome=self._welcome, options=self._options)

    def check_open(self) -> None:
        """Raises Unavailable (DRAINING) after goodbye() or close()."""
        if self.draining:
            raise Unavailable(Reason.DRAINING, retryable=True)

    def goodbye(self, reason: int = GoodbyeReason.GOODBYE_REASON_DRAIN, drain_ms: int = 0) -> None:
        """Says Goodbye on every link."""
        self.draining = True
        for link in tuple(self.links):
            link.goodbye(reason, drain_ms)

    async def close(self) -> None:
        """Closes every link in order."""
        self.draining = True
        await asyncio.gather(*(link.close() for link in tuple(self.links)))


class _Noting:
    """Passes everything on to the real receiver and keeps the set of live links."""

    def __init__(self, receiver: Receiver, server: LinkServer) -> None:
        self._receiver = receiver
        self._server = server
        self.on_item = receiver.on_item  # bound: no layer on the hot path
        self.on_goodbye = receiver.on_goodbye
        for name in ("on_overflow", "on_suspect"):
            if hasattr(receiver, name):
                setattr(self, name, getattr(receiver, name))

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        self._server.check_open()  # the drain may have begun during the handshake
        self._server.links.add(link)
        self._receiver.on_up(link, hello_or_welcome)

    def on_down(self, link: Link, end: LinkEnd) -> None:
        if link in self._server.links:
            self._server.links.discard(link)
            self._receiver.on_down(link, end)
