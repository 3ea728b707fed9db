"""An HTTP/1.1 client on a bare socket, for what proper clients never do: stop half-way, read slowly, leave at a chosen byte."""

import asyncio
import json
import socket
import struct
from types import TracebackType
from typing import Any

from tests.support.mesh import Mesh


class RawHttp:
    """One connection with one request. Close it yourself: with a FIN (close) or a RST (reset)."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self.received = bytearray()

    @classmethod
    async def connect(cls, mesh: Mesh, receive_buffer: int = 0) -> "RawHttp":
        """receive_buffer: SO_RCVBUF, bytes; the kernel doubles it. 0: its default."""
        connection = socket.socket()
        connection.setblocking(False)
        if receive_buffer:
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer
            )  # before connect: sets the window
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", mesh.port))
        return cls(connection)

    async def ask(self, mesh: Mesh, body: dict[str, Any], *, send_only: float = 1.0) -> None:
        """Sends a chat request; of its body only this share."""
        payload = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {mesh.client['api_key']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        await self._loop.sock_sendall(self._socket, head.encode() + payload[: int(len(payload) * send_only)])

    async def read(self, at_most: int = 65536) -> bytes:
        """What has come; b"" at the end of the connection. A reset raises ConnectionResetError."""
        data = await self._loop.sock_recv(self._socket, at_most)
        self.received += data
        return data

    async def read_events(self, count: int) -> None:
        """Reads until so many events have come."""
        while self.received.count(b"data: ") < count:
            assert await self.read(), bytes(self.received[-500:])

    async def read_whole(self) -> None:
        """Reads to the end of a chunked answer."""
        while not self.received.endswith(b"\r\n0\r\n\r\n"):
            assert await self.read(), bytes(self.received[-500:])

    async def read_to_the_end(self) -> None:
        """Reads until the connection is over, in whatever way."""
        try:
            while await self.read():
                pass
        except ConnectionResetError:
            return

    def events(self) -> list[str]:
        """Data of all complete events so far, in order."""
        _, _, chunks = bytes(self.received).partition(b"\r\n\r\n")
        body = bytearray()
        while chunks:
            size, _, rest = chunks.partition(b"\r\n")
            length = int(size or b"0", 16)
            body += rest[:length]
            chunks = rest[length + 2 :]
            if not length:
                break
        return [part[6:] for part in body.decode().split("\n\n")[:-1] if part.startswith("data: ")]

    @property
    def status(self) -> int:
        """Of the answer, 0 when none has come."""
        words = bytes(self.received[:64]).split(b" ")
        return int(words[1]) if len(words) > 1 else 0

    def close(self) -> None:
        """A FIN; a RST where something unread lies in the kernel, as for any program that ends."""
        self._socket.close()

    def reset(self) -> None:
        """A RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


class Clients:
    """Connections of one test; what it has not closed ends with the block."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._made: list[RawHttp] = []

    def __enter__(self) -> "Clients":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._made:
            client.close()

    async def ask(
        self, text: str, *, stream: bool = True, send_only: float = 1.0, receive_buffer: int = 0, **fields: Any
    ) -> RawHttp:
        """A client whose chat request is on its way."""
        client = await RawHttp.connect(self._mesh, receive_buffer)
        self._made.append(client)
        await client.ask(self._mesh, self._mesh.body(text, stream=stream, **fields), send_only=send_only)
        return client
