"""Metrics of the edge, and its one log line per request."""

import asyncio
from typing import Final

from gpumesh_edge_http.exchange import Exchange
from gpumesh_edge_http.lines import RequestLines
from gpumesh_edge_http.sinks import ChatSink
from gpumesh_runtime.metrics import counter, gauge, histogram

REQUESTS: Final = counter("gpumesh_edge_requests_total", "Requests by route and HTTP status", ("route", "status"))
REFUSED: Final = counter("gpumesh_edge_refused_total", "Requests that failed, by reason", ("reason",))
DURATION: Final = histogram(
    "gpumesh_edge_request_duration_seconds", "From a request's head to the end of its answer"
).cell
FIRST: Final = histogram(
    "gpumesh_edge_time_to_first_token_seconds", "From a streamed request's head to its first token"
).cell
BYTES_OUT: Final = counter("gpumesh_edge_sent_bytes_total", "Bytes of answers").cell
CONNECTIONS: Final = gauge("gpumesh_edge_connections", "Clients connected").cell
HEAD_TIMEOUTS: Final = gauge(
    "gpumesh_edge_head_timeouts", "Connections closed because no complete head came in time"
).cell
WRITE_STALLS: Final = gauge("gpumesh_edge_write_stalls", "Connections closed because the client stopped reading").cell
THROTTLED: Final = counter(
    "gpumesh_edge_throttled_total", "Requests refused because their address failed to authenticate too often"
).cell

_lines: dict[asyncio.AbstractEventLoop, RequestLines] = {}
# Bound label cells of what occurs all the time.
_cells: Final = {
    (route, status): REQUESTS.labels(route, str(status))
    for route in ("chat",)
    for status in (200, 400, 401, 429, 499, 503)
}


def count(
    exchange: Exchange, route: str, request_id: str, began: float, now: float, sink: ChatSink | None, reason: str
) -> None:
    """Counts one request and writes its line. Nothing that a client wrote gets in: routes, reasons and ids are ours."""
    status = exchange.status or 499
    cell = _cells.get((route, status))
    if cell is None:
        cell = REQUESTS.labels(route, str(status))
    cell.value += 1
    BYTES_OUT.value += exchange.bytes_out
    elapsed = now - began
    if reason:
        REFUSED.labels(reason).value += 1
    if sink is None:
        if route != "probe":
            fields: dict[str, str | int | float | bool] = {
                "request_id": request_id,
                "kind": route,
                "status": status,
                "elapsed_ms": round(elapsed * 1000, 2),
            }
            if reason:
                fields["reason"] = reason
            _write(fields)
        return
    DURATION.observe(elapsed)
    if sink.first_at and sink.chat.stream:
        FIRST.observe(sink.first_at - began)
    _chat_line(exchange, request_id, status, elapsed, began, sink, reason)


def _chat_line(
    exchange: Exchange, request_id: str, status: int, elapsed: float, began: float, sink: ChatSink, reason: str
) -> None:
    admission, completed, running = sink.admission, sink.completed, sink.running
    # What says nothing is left out.
    fields: dict[str, str | int | float | bool] = {
        "request_id": request_id,
        "kind": "chat",
        "status": status,
        "stream": sink.chat.stream,
        "elapsed_ms": round(elapsed * 1000, 2),
    }
    if admission is not None:
        fields["model_id"] = admission.model_id
        fields["account_id"] = admission.account_id
    if completed is not None:
        fields["prompt_tokens"] = completed.usage.prompt_tokens
        fields["completion_tokens"] = completed.usage.completion_tokens
        fields["amount_nano_usd"] = completed.charge_nano_usd
    elif running is not None:
        fields["completion_tokens"] = running.job.tokens
    if reason:
        fields["reason"] = reason
    if not request_id.startswith("req_"):  # else the job's id is in it
        fields["job_id"] = sink.job_id
    if sink.first_at and sink.chat.stream:
        fields["first_token_ms"] = round((sink.first_at - began) * 1000, 2)
    if running is not None:
        if running.job.attempt > 1:
            fields["attempts"] = running.job.attempt
        if running.request.traceparent:
            fields["traceparent"] = running.request.traceparent
    _write(fields)


def _write(fields: dict[str, str | int | float | bool]) -> None:
    """The line. Its writer is made with the first one: logging is set up after this module is imported."""
    lines = _lines.get(loop := asyncio.get_running_loop())
    if lines is None:
        _lines.clear()  # of an earlier loop: tests run several, one after the other
        lines = _lines[loop] = RequestLines(loop)
    lines.write(fields)
