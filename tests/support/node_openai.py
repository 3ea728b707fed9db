"""A programmable OpenAI-compatible server: what it answers, in which pieces, how it misbehaves. Plain TCP: every byte is ours."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[["Request", "Answerer"], Awaitable[None]]


@dataclass
class Request:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int


@dataclass
class Answerer:
    """Writes an answer, byte by byte if wanted."""

    writer: asyncio.StreamWriter
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def head(self, status: int = 200, kind: str = "text/event-stream", length: int | None = None) -> None:
        """Status and headers; chunked unless a length is given."""
        size = f"Content-Length: {length}" if length is not None else "Transfer-Encoding: chunked"
        self.writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{size}\r\n\r\n".encode())
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        """One chunk of a chunked body."""
        self.writer.write(b"%x\r\n" % len(data) + data + b"\r\n")
        await self.writer.drain()

    async def end(self) -> None:
        """The end of a chunked body."""
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def json(self, body: object, status: int = 200) -> None:
        """A whole JSON answer."""
        data = json.dumps(body).encode()
        await self.head(status, "application/json", len(data))
        self.writer.write(data)
        await self.writer.drain()

    async def events(self, *events: object) -> None:
        """Server-sent events in one chunk; strings go as they are, anything else as JSON."""
        await self.chunk(b"".join(sse(event) for event in events))

    def cut(self) -> None:
        """Resets the connection."""
        self.writer.transport.abort()


def sse(event: object) -> bytes:
    """One event."""
    return f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()


def delta(text: str, index: int = 0, **fields: Any) -> dict[str, Any]:
    """A chunk with text."""
    return {"choices": [{"index": index, "delta": {"content": text}, "finish_reason": None, **fields}]}


def finish(reason: str = "stop", index: int = 0) -> dict[str, Any]:
    """A choice's last chunk."""
    return {"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk that stream_options.include_usage asks for."""
    return {
        "choices": [],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def whole(text: str, prompt: int = 3, completion: int = 2) -> dict[str, Any]:
    """A whole answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice], "usage": usage(prompt, completion)["usage"]}


async def speak(words: Sequence[str], request: Request, answer: Answerer) -> None:
    """The well-behaved engine: words as a stream or whole, as asked."""
    if not request.body.get("stream"):
        await answer.json(whole("".join(words), completion=len(words)))
        return
    await answer.head()
    await answer.events({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
    for word in words:
        await answer.events(delta(word))
    await answer.events(finish(), usage(3, len(words)), "[DONE]")
    await answer.end()


class FakeOpenAi:
    """The server. `serve` answers chat completions; /v1/models lists `models`. Async context manager."""

    def __init__(self, serve: Handler | None = None, models: Sequence[str] = ("engine-model",)) -> None:
        self.serve: Handler = serve or (lambda request, answer: speak(["Hello", " world"], request, answer))
        self.models: list[str] = list(models)
        self.requests: list[Request] = []
        self.disconnects = 0
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "FakeOpenAi":
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *args: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def base_url(self) -> str:
        """Up to and with /v1."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    async def until(self, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        """Waits until the condition holds. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        number = self.connections
        try:
            while await self._one(reader, writer, number):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went
        finally:
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path = head[0].split(" ")[1]
        answer = Answerer(writer)
        if path == "/v1/models":
            await answer.json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
            return True
        request = Request(path, headers, json.loads(body), number)
        self.requests.append(request)
        self._changed.set()
        return await self._serve_while_connected(reader, request, answer)

    async def _serve_while_connected(self, reader: asyncio.StreamReader, request: Request, answer: Answerer) -> bool:
        """Serves until it is done or the client goes, as an engine does that watches its socket."""
        serving = asyncio.ensure_future(self.serve(request, answer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({serving, gone}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
                return not answer.writer.transport.is_closing() and not gone.done()
            self.disconnects += 1
            answer.closed.set()
            self._changed.set()
            return False
        finally:
            serving.cancel()
            gone.cancel()
            await asyncio.gather(serving, gone, return_exceptions=True)
