"""A mock OpenAI-compatible engine that costs almost nothing: canned answers over a raw asyncio protocol.

    python -m benchmarks.tools.engine PORT

Non-streaming: one 0.4 KB answer. `"stream": true`: `max_tokens` content chunks, the first at once, then `seed`
microseconds apart (0: all at once), a finish chunk, a usage chunk when asked for, [DONE]. It is never the bottleneck and
never what is measured.
"""

import asyncio
import json
import sys
from typing import Any, Final, cast

import uvloop

MODEL: Final = "bench-model"
PROMPT_TOKENS: Final = 12
ANSWER_TOKENS: Final = 16
_HEAD: Final = (
    '{"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"' + MODEL + '","choices":'
)
_TEXT: Final = "The quick brown fox jumps over the lazy dog while the mesh counts tokens."


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(choices: list[dict[str, Any]], usage: str = "") -> bytes:
    return _http_chunk(f"data: {_HEAD}{json.dumps(choices, separators=(',', ':'))}{usage}}}\n\n".encode())


_FIRST: Final = _event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
_WORD: Final = _event([{"index": 0, "delta": {"content": " word"}, "finish_reason": None}])
_FINISH: Final = _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
_DONE: Final = _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_STREAM_HEADERS: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _usage(tokens: int) -> str:
    return f',"usage":{{"prompt_tokens":{PROMPT_TOKENS},"completion_tokens":{tokens},"total_tokens":{PROMPT_TOKENS + tokens}}}'


def _json(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


_ANSWER: Final = _json(
    (
        '{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"'
        + MODEL
        + '","choices":[{"index":0,'
        '"message":{"role":"assistant","content":"'
        + _TEXT
        + '"},"logprobs":null,"finish_reason":"stop"}]'
        + _usage(ANSWER_TOKENS)
        + "}"
    ).encode()
)
_MODELS: Final = _json(
    json.dumps(
        {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "bench"}]}
    ).encode()
)


class Engine(asyncio.Protocol):
    """One connection, keep-alive, one request at a time."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but class

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        if head.startswith(b"get "):
            transport.write(_MODELS)
            return
        request = json.loads(body)
        if not request.get("stream"):
            transport.write(_ANSWER)
            return
        tokens = int(request.get("max_tokens") or ANSWER_TOKENS)
        options = request.get("stream_options") or {}
        tail = _FINISH + (_event([], _usage(tokens)) if options.get("include_usage") else b"") + _DONE
        gap_s = int(request.get("seed") or 0) / 1e6
        if gap_s == 0 or tokens == 1:
            transport.write(_STREAM_HEADERS + _FIRST + _WORD * tokens + tail)
        else:  # the first token comes at once: what is measured as time to first token is the way, not the gap
            transport.write(_STREAM_HEADERS + _FIRST + _WORD)
            self._step(asyncio.get_running_loop().time() + gap_s, gap_s, tokens - 1, tail)

    def _step(self, due: float, gap_s: float, left: int, tail: bytes) -> None:
        self._timer = asyncio.get_running_loop().call_at(due, self._emit, due, gap_s, left, tail)

    def _emit(self, due: float, gap_s: float, left: int, tail: bytes) -> None:
        if self._transport is None:
            return
        if left == 1:
            self._transport.write(_WORD + tail)
        else:
            self._transport.write(_WORD)
            self._step(due + gap_s, gap_s, left - 1, tail)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
