"""Clients of the edge: chats through aiohttp, and a raw socket where bytes and their timing matter."""

import asyncio
import json
import socket
from typing import Any

import aiohttp

from tests.support.edge_peers import EdgeMesh

CHAT = "/v1/chat/completions"


def chat_body(**fields: Any) -> dict[str, Any]:
    """A small chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


async def post(
    http: aiohttp.ClientSession, mesh: EdgeMesh, headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, Any]:
    """One chat: (status, JSON body)."""
    sent = mesh.headers if headers is None else headers
    async with http.post(mesh.base + CHAT, json=chat_body(**fields), headers=sent) as answer:
        return answer.status, await answer.json()


async def stream(http: aiohttp.ClientSession, mesh: EdgeMesh, **fields: Any) -> tuple[int, list[Any]]:
    """One streamed chat: (status, events); comments as text beginning with ":"."""
    async with http.post(mesh.base + CHAT, json=chat_body(stream=True, **fields), headers=mesh.headers) as answer:
        return answer.status, events_of(await answer.text())


def events_of(text: str) -> list[Any]:
    """Events of a stream: chunks as JSON, "[DONE]" and comments as text."""
    events: list[Any] = []
    for event in text.split("\n\n"):
        if event.startswith("data: {"):
            events.append(json.loads(event[6:]))
        elif event:
            events.append(event.removeprefix("data: "))
    return events


def text_of(events: list[Any]) -> str:
    """The text of a stream."""
    chunks = [event for event in events if isinstance(event, dict) and "choices" in event]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def raw_request(
    mesh: EdgeMesh, body: bytes | None = None, *, extra: str = "", length: int | None = None, **fields: Any
) -> bytes:
    """A chat request as bytes."""
    content = json.dumps(chat_body(**fields)).encode() if body is None else body
    size = len(content) if length is None else length
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer {mesh.key}\r\nContent-Type: application/json\r\n"
        f"{extra}Content-Length: {size}\r\n\r\n"
    )
    return head.encode() + content


class RawClient:
    """A connection whose bytes a test writes and reads itself. Async context manager."""

    def __init__(self, mesh: EdgeMesh, *, receive_buffer: int | None = None) -> None:
        self._port = mesh.edge.server.port
        self._receive_buffer = receive_buffer
        self._socket = socket.socket()
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> "RawClient":
        if self._receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        self._socket.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self._socket, ("127.0.0.1", self._port))
        # A limit this small makes the reader stop taking bytes from the kernel when a test does not read.
        self.reader, self.writer = await asyncio.open_connection(sock=self._socket, limit=1024)
        return self

    async def __aexit__(self, *args: object) -> None:
        self.writer.transport.abort()

    def send(self, data: bytes) -> None:
        """Writes."""
        self.writer.write(data)

    async def head(self, within_s: float = 5.0) -> tuple[int, dict[str, str]]:
        """Status and headers (names in lower case) of the next answer."""
        async with asyncio.timeout(within_s):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self, within_s: float = 5.0) -> tuple[int, bytes]:
        """Status and body of an answer with a Content-Length."""
        status, headers = await self.head(within_s)
        async with asyncio.timeout(within_s):
            return status, await self.reader.readexactly(int(headers["content-length"]))

    async def rest(self, within_s: float = 5.0) -> bytes:
        """All until the edge closes."""
        async with asyncio.timeout(within_s):
            return await self.reader.read()
