"""Logs: nothing that is not on the list gets out."""

import json
import logging
from dataclasses import dataclass

import pytest

from gpumesh_runtime.log_fields import FIELDS
from gpumesh_runtime.logs import dropped_fields, get_logger, setup
from gpumesh_runtime.secret import Secret

MARKER = "the-prompt-that-must-not-leak"


@dataclass
class LogSettings:
    """What setup reads."""

    log_level: str = "debug"
    log_format: str = "json"
    development: bool = False


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> "Lines":
    setup(LogSettings(), "shop")
    return Lines(capsys)


class Lines:
    """Log lines written so far, parsed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._capsys.readouterr().err.splitlines()]


def test_a_line_has_time_level_service_and_its_allowed_fields(lines: Lines) -> None:
    get_logger("here").info("job queued", job_id="ab", attempt=2)
    (line,) = lines()
    assert (
        line.items()
        >= {"event": "job queued", "level": "info", "service": "shop", "job_id": "ab", "attempt": 2}.items()
    )
    assert str(line["timestamp"]).endswith("Z")


def test_a_field_that_is_not_on_the_list_is_dropped_and_counted(lines: Lines) -> None:
    before = dropped_fields().get("messages", 0)
    get_logger().warning("odd", messages=MARKER, prompt=MARKER, body=MARKER.encode())
    assert MARKER not in json.dumps(lines())
    assert dropped_fields()["messages"] == before + 1
    assert not {"prompt", "messages", "content", "body", "payload", "text"} & FIELDS


def test_keys_secrets_bytes_and_exception_texts_are_redacted_in_allowed_fields(lines: Lines) -> None:
    get_logger().info(
        "x",
        reason=f"bad key gm_live_abc_{'Z' * 43}_0aB9zz",
        path="Bearer abcdefghijklmnop",
        cause=Secret(MARKER),
        error=ValueError(MARKER),
        result=[MARKER.encode(), {"name": Secret(MARKER)}],
    )
    text = json.dumps(lines())
    assert MARKER not in text
    assert "ZZZ" not in text
    assert "abcdefghijklmnop" not in text


def test_a_traceback_does_not_quote_what_was_handled(lines: Lines) -> None:
    try:
        json.loads('{"a": "' + MARKER)
    except ValueError as err:
        get_logger().error("could not read", exc_info=err)
    (line,) = lines()
    assert line["error_type"] == "JSONDecodeError"
    assert "test_logs.py" in str(line["traceback"])
    assert MARKER not in json.dumps(line)


def test_long_values_are_cut(lines: Lines) -> None:
    get_logger().info("x", reason="a" * 100_000, items=list(range(1000)))
    assert len(json.dumps(lines())) < 5_000


def test_libraries_that_may_hold_prompts_log_their_constant_text_only(lines: Lines) -> None:
    logging.getLogger("aiohttp.server").error("Error handling request %s", MARKER)
    logging.getLogger("asyncpg").warning("connection lost to %s", "host")
    logging.getLogger("aiohttp.access").info("quiet")
    one, two = lines()
    assert one["warning"] == "Error handling request %s"
    assert two["warning"] == "connection lost to host"


def test_a_traceparent_becomes_trace_and_span_id(lines: Lines) -> None:
    get_logger().info("x", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    (line,) = lines()
    assert (line["trace_id"], line["span_id"]) == ("a" * 32, "b" * 16)


def test_levels_below_the_setting_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    setup(LogSettings(log_level="warning"), "shop")
    get_logger().info("no")
    get_logger().warning("yes")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["yes"]


def test_the_console_format_is_readable_and_just_as_closed(capsys: pytest.CaptureFixture[str]) -> None:
    setup(LogSettings(log_format="console"), "shop")
    get_logger().info("hello", job_id="ab", prompt=MARKER)
    text = capsys.readouterr().err
    assert "hello" in text
    assert "job_id=ab" in text
    assert MARKER not in text


def test_a_secret_shows_itself_only_when_asked() -> None:
    secret = Secret(b"abc")
    assert f"{secret} {secret!r} {secret!s} {secret:>20}".count("abc") == 0
    assert secret.reveal() == b"abc"
    assert secret == Secret(b"abc") != Secret(b"abd")
    with pytest.raises(TypeError):
        hash(secret)
