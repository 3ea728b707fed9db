"""Heads of answers: status lines and header lines as bytes, the Date header made once a second."""

import time
from email.utils import formatdate
from typing import Final

from gpumesh_edge_http.exchange import Exchange
from gpumesh_edge_http.problems import STATUS_LINE, body_of, headers_of, problem_of
from gpumesh_runtime.errors import MeshError

OK: Final = STATUS_LINE[200]
_JSON: Final = b"Content-Type: application/json\r\nDate: %b\r\nX-Request-Id: %b\r\n"
_STREAM: Final = (
    b"Content-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
    b"Date: %b\r\nX-Request-Id: %b\r\n"
)
_TEXT: Final = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\nDate: %b\r\nX-Request-Id: %b\r\n"


class _Date:
    """The Date header, renewed when the second changes."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def text(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._text = formatdate(second, usegmt=True).encode()
        return self._text


_date: Final = _Date()


def json_answer(exchange: Exchange, request_id: str, body: bytes, status: int = 200, extra: bytes = b"") -> None:
    """A JSON answer."""
    exchange.answer(status, STATUS_LINE[status], _JSON % (_date.text(), request_id.encode()) + extra, body)


def text_answer(exchange: Exchange, request_id: str, body: bytes) -> None:
    """A plain text answer."""
    exchange.answer(200, OK, _TEXT % (_date.text(), request_id.encode()), body)


def problem_answer(exchange: Exchange, request_id: str, error: MeshError) -> None:
    """An error answer."""
    json_answer(exchange, request_id, body_of(error), problem_of(error.reason).status, headers_of(error))


def stream_headers(request_id: str) -> bytes:
    """Headers of a stream of events."""
    return _STREAM % (_date.text(), request_id.encode())
