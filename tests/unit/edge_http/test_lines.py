"""The short way of writing the edge's log line says what the general way says."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from gpumesh_edge_http import measures
from gpumesh_edge_http.lines import RequestLines
from gpumesh_runtime import logs
from gpumesh_runtime.log_fields import FIELDS as FIELDS_ALLOWED

FIELDS: dict[str, str | int | float | bool] = {
    "request_id": "req_1",
    "kind": "chat",
    "status": 200,
    "stream": True,
    "elapsed_ms": 1.25,
    "model_id": "tiny",
    "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
}


@dataclass(frozen=True)
class _Settings:
    log_level: str = "info"
    log_format: str = "json"
    development: bool = False


@pytest.fixture
def _restored() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("_restored")
def test_both_ways_write_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(_Settings(), "edge-http")
    lines = RequestLines()
    assert lines.direct
    lines.write(dict(FIELDS))
    lines.direct = False
    lines.write(dict(FIELDS))
    short, general = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", short["timestamp"])
    assert short.pop("timestamp")[:16] == general.pop("timestamp")[:16]
    assert short == general


@pytest.mark.usefixtures("_restored")
def test_nothing_is_written_below_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(_Settings(log_level="warning"), "edge-http")
    RequestLines().write(dict(FIELDS))
    assert capsys.readouterr().err == ""


def test_every_field_is_on_the_allow_list() -> None:
    source = Path(measures.__file__).read_text()
    named = set(re.findall(r'fields\["(\w+)"\]', source)) | set(re.findall(r'^\s+"(\w+)":', source, re.MULTILINE))
    assert len(named) > 10
    assert named - {"traceparent"} <= FIELDS_ALLOWED
