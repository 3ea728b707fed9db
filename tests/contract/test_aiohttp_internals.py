"""What gpumesh_edge_http.transport uses of aiohttp beyond its public surface. A new aiohttp that changes any of it fails here first."""

import asyncio
import inspect
import re
import sys
from importlib.metadata import version

import pytest
from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler


def test_the_c_parser_is_in_use() -> None:
    assert HttpRequestParser.__module__ == "aiohttp._http_parser"


def test_the_version_is_one_that_was_checked() -> None:
    major, minor = (int(part) for part in version("aiohttp").split(".")[:2])
    assert (major, minor) == (3, 14), "check transport.py against this version, then widen the test"


def test_the_protocol_has_what_is_overridden_and_read() -> None:
    for name in (
        "connection_made",
        "connection_lost",
        "data_received",
        "resume_writing",
        "resume_reading",
        "handle_error",
    ):
        assert callable(getattr(RequestHandler, name))
    assert list(inspect.signature(RequestHandler.handle_error).parameters) == [
        "self",
        "request",
        "status",
        "exc",
        "message",
    ]
    slots = {slot for cls in RequestHandler.__mro__ for slot in getattr(cls, "__slots__", ())}
    assert {"_request_count", "_messages", "_reading_paused", "_buffer_paused", "transport", "_loop"} <= slots
    assert isinstance(inspect.getattr_static(BaseProtocol, "writing_paused"), property)
    assert inspect.iscoroutinefunction(BaseProtocol._drain_helper)
    assert callable(RequestHandler.close)
    assert callable(RequestHandler.force_close)


def test_the_server_makes_requests_with_our_factory_and_five_arguments() -> None:
    parameters = inspect.signature(web.Server._make_request).parameters
    assert list(parameters) == ["self", "message", "payload", "protocol", "writer", "task"]
    source = inspect.getsource(RequestHandler.start)
    assert "self._request_factory(" in source
    # All that aiohttp touches of a request object: Exchange has just these.
    assert "request._task = None" in source
    assert "request._finish()" in inspect.getsource(RequestHandler.finish_response)
    assert "._cancel(" in inspect.getsource(RequestHandler.connection_lost)


def test_answers_need_prepare_write_eof_and_keep_alive() -> None:
    assert "resp.prepare" in inspect.getsource(RequestHandler.finish_response)
    assert "resp.write_eof()" in inspect.getsource(RequestHandler.finish_response)
    assert "resp.keep_alive" in inspect.getsource(RequestHandler.start)


async def test_the_body_reader_gives_a_complete_body_at_once() -> None:
    loop = asyncio.get_running_loop()
    reader = StreamReader(BaseProtocol(loop), 2**16, loop=loop)
    reader.feed_data(b"abc", 3)
    reader.feed_data(b"def", 3)
    assert not reader.is_eof()
    reader.feed_eof()
    assert reader.is_eof()
    assert reader.read_nowait() == b"abcdef"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="aiohttp starts its tasks eagerly from 3.12 on")
def test_the_connection_makes_one_task_for_itself_and_one_per_request() -> None:
    assert "loop.create_task(self.start())" in inspect.getsource(RequestHandler.connection_made)
    source = inspect.getsource(RequestHandler.start)
    assert source.count("create_task(coro)") == 1
    assert "resp, reset = await task" in source
    used = set(
        re.findall(
            r"\b(?:self\._loop|loop)\.(\w+)", inspect.getsource(RequestHandler) + inspect.getsource(BaseProtocol)
        )
    )
    assert used <= {"create_task", "create_future", "call_at", "time"}
