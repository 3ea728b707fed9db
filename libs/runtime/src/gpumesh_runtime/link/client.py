"""The connecting side: keeps one link to one address up for ever."""

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gpumesh.common.v1.link_pb2 import Batch, GoodbyeReason
from gpumesh_runtime.errors import DeadlineExceeded, MeshError, Reason, Unavailable, from_grpc
from gpumesh_runtime.identity import Identity, Role, service_uri
from gpumesh_runtime.link.backoff import Backoff
from gpumesh_runtime.link.items import HELLO, WELCOME
from gpumesh_runtime.link.link import Link
from gpumesh_runtime.link.options import SERVICE_LINK, LinkOptions
from gpumesh_runtime.link.receiver import LinkEnd, Receiver
from gpumesh_runtime.link.stream import BROKEN, first_item, read_until_end, single, stop_task
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.rpc.options import client_options
from gpumesh_runtime.tls import TlsIdentity

# How long the other side may take to answer the end of our half of the stream.
_FAREWELL_S: Final = 1.0


def peer_of_method(method: str) -> Identity:
    """Who serves a link's method, by its package: "/gpumesh.router.v1.AdmissionService/Connect" is served by the router.

    Which certificate a server shows is checked by TLS (CA and host name); gRPC does not hand it to Python clients.
    """
    service = method.lstrip("/").split(".")[1]
    name = {"node": "scheduler"}.get(service, service)  # node sessions are served by schedulers
    return Identity(Role[name.upper()], name, service_uri(name))


class LinkClient:
    """Keeps one link up: connect, Hello and Welcome, heartbeats, reconnect with full jitter. Run run() in a TaskGroup.

    last_error: why the last attempt or link failed, None after success.
    Each attempt makes a channel of its own, so that renewed certificates and new addresses are used.
    """

    def __init__(
        self,
        address: str,
        method: str,
        *,
        credentials: TlsIdentity | None,
        hello: Callable[[], bytes],
        receiver: Receiver,
        options: LinkOptions = SERVICE_LINK,
        peer: Identity | None = None,
        server_name: str = "",
        channel_options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        """hello() gives the body of each Hello. server_name: expected in the server's certificate where it differs from the host.

        credentials None connects in clear: for tests on loopback. peer: who serves, where the method's package does not say.
        """
        self.address = address
        self.method = method
        self.last_error: MeshError | None = None
        self._credentials = credentials
        self._hello = hello
        self._receiver = receiver
        self._options = options
        self._peer = peer or peer_of_method(method)
        self._server_name = server_name
        self._channel_options = channel_options
        self._backoff = Backoff(options)
        self._up = asyncio.Event()
        self._link: Link | None = None
        self._stopping = asyncio.Event()
        self._done = asyncio.Event()
        self._attempt: asyncio.Task[None] | None = None

    @property
    def link(self) -> Link | None:
        """The live link, None while down."""
        link = self._link
        return link if link is not None and link.end is None else None

    async def run(self) -> None:
        """Until stop() or cancellation. Cancelling cuts the link without Goodbye; stop() ends it in order."""
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping.is_set():
                self._attempt = loop.create_task(self._one_link(), name=f"link-{self._peer.name}")
                try:
                    await asyncio.wait([self._attempt])
                finally:
                    await stop_task(self._attempt)
                if not self._stopping.is_set():
                    await self._pause(self._backoff.next_wait(random.random()))  # noqa: S311 -- jitter, not a secret
        finally:
            self._attempt = None
            self._done.set()

    async def up(self, timeout_s: float) -> Link:
        """The live link, waiting for it if need be. Raises Unavailable with what went wrong last."""
        try:
            async with asyncio.timeout(timeout_s):
                while (link := self.link) is None:
                    self._up.clear()
                    await self._up.wait()
                return link
        except TimeoutError:
            why = f" ({self.last_error.reason.value})" if self.last_error else ""
            raise Unavailable(
                Reason.UNAVAILABLE, f"{self._peer.name} cannot be reached{why}.", retryable=True
            ) from self.last_error

    async def stop(self, goodbye_reason: int = GoodbyeReason.GOODBYE_REASON_DRAIN) -> None:
        """Goodbye, close, and the end of run()."""
        self._stopping.set()
        link = self.link
        if link is not None:
            link.goodbye(goodbye_reason)
            await link.close()
        elif self._attempt is not None and self._link is None:
            self._attempt.cancel()  # still connecting
        if self._attempt is not None:
            await self._done.wait()

    def reconnect_within(self, seconds: float) -> None:
        """The next reconnect, only it, waits U(0, seconds): a node with live jobs comes back at once."""
        self._backoff.within(seconds)

    def spread_reconnects(self, min_s: float, max_s: float) -> None:
        """Takes the other side's advice (in Welcome) on how far to spread reconnects."""
        self._backoff.spread(min_s, max_s)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    def _channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, options=[*self._channel_options, *client_options()])
        return channel(self.address, self._credentials, server_name=self._server_name, options=self._channel_options)

    async def _one_link(self) -> None:
        """One connection: from the first byte to the end of its link. Failures are noted in last_error, not raised."""
        try:
            connection = self._channel()
        except OSError as error:  # certificate files being replaced
            self.last_error = Unavailable(Reason.UNAVAILABLE, f"certificate: {error.strerror}")
            return
        try:
            open_stream: grpc.aio.StreamStreamMultiCallable[bytes, Batch] = connection.stream_stream(
                self.method, request_serializer=None, response_deserializer=Batch.FromString
            )
            call = open_stream()
            try:
                await self._handshake_and_serve(call)
            finally:
                call.cancel()
        except TimeoutError:
            self.last_error = DeadlineExceeded(Reason.DEADLINE_EXCEEDED, f"{self._peer.name} did not answer Hello.")
        except grpc.aio.AioRpcError as error:
            self.last_error = from_grpc(error)
        except (DecodeError, *BROKEN):
            self.last_error = Unavailable(Reason.UNAVAILABLE, f"{self._peer.name} broke the handshake.")
        finally:
            await connection.close()

    async def _handshake_and_serve(self, call: "grpc.aio.StreamStreamCall[bytes, Batch]") -> None:
        read: Any = call.read
        async with asyncio.timeout(self._options.handshake_s):
            await call.write(single(HELLO, self._hello()))
            first = await read()
        welcome = first_item(first, WELCOME)
        if welcome is None:
            self.last_error = Unavailable(
                Reason.PROTOCOL_ERROR, f"{self._peer.name} did not answer Hello with Welcome."
            )
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        link = self._link = Link(self._peer, self._receiver, self._options, call.write)
        self.last_error = None
        reader: asyncio.Task[None] | None = None
        try:
            link.start(welcome.body)
            self._up.set()
            if len(first.items) > 1:
                link.deliver(Batch(items=first.items[1:]))
            reader = loop.create_task(read_until_end(link, read), name="link-reader")
            await link.ended
            await _farewell(call, link, reader)
        finally:
            link.lost()
            self._link = None
            if reader is not None:
                await stop_task(reader)
        # A side that accepts and hangs up at once must not be hammered: only a link that lasted resets the back-off.
        if loop.time() - began >= self._options.reconnect_max_s:
            self._backoff.succeeded()
        if link.end is not LinkEnd.CLOSED_BY_US:
            self.last_error = Unavailable(
                Reason.LINK_DOWN, f"The link to {self._peer.name} ended ({link.end}).", retryable=True
            )


async def _farewell(call: "grpc.aio.StreamStreamCall[bytes, Batch]", link: Link, reader: "asyncio.Task[None]") -> None:
    """After our Goodbye: end our half of the stream and let the other side end its own; a reset could overtake the Goodbye."""
    if link.end is LinkEnd.PROTOCOL_ERROR:
        await link.last_words(_FAREWELL_S)
    await link.joined()
    # A message cut in mid-write has reset the call already.
    if call.done() or link.end not in (LinkEnd.CLOSED_BY_US, LinkEnd.PROTOCOL_ERROR):
        return
    try:
        async with asyncio.timeout(_FAREWELL_S):
            await call.done_writing()
            await asyncio.wait([reader])
    except (TimeoutError, *BROKEN):
        pass  # it does not answer: the reset in _one_link ends it
