"""Structured logs. JSON lines in production, readable on a terminal; only field names from a list get out, so
prompts cannot.

A log call is `log.info("constant event text", job_id=..., reason=...)`. The event is a constant, never built from
data. A field whose name is
not in FIELDS is dropped and counted (`dropped_fields()`); a text that looks like an API key or token is redacted
wherever it stands.
"""

import logging
import re
import sys
from collections import Counter
from collections.abc import MutableMapping
from typing import Any, Final, Protocol

# structlog loads rich (5 MB) where it happens to be installed, for tracebacks that we do not print. It must look absent.
_ABSENT: Final = {name: sys.modules.setdefault(name, None) for name in ("rich",)}  # type: ignore[arg-type]  # None means: not importable
import structlog  # noqa: E402 -- see above

if _ABSENT["rich"] is None:
    del sys.modules["rich"]

from gpumesh_runtime.errors import safe_traceback  # noqa: E402 -- see above
from gpumesh_runtime.secret import REDACTED, Secret  # noqa: E402 -- see above

# Every name that may appear in a log line. Adding one is a decision: can its value ever hold what a client wrote?
FIELDS: Final = frozenset(
    [
        "account_id",
        "action",
        "added",
        "address",
        "after_s",
        "ago_s",
        "amount_nano_usd",
        "applied",
        "attempt",
        "attempts",
        "backoff_s",
        "batch",
        "boot_id",
        "build",
        "bytes",
        "bytes_in",
        "bytes_out",
        "cached",
        "callers",
        "cause",
        "certificate_end",
        "change",
        "chunks",
        "client_version",
        "code",
        "committed",
        "completion_tokens",
        "connections",
        "count",
        "cpu_percent",
        "database",
        "deadline_s",
        "delay_s",
        "delivered_tokens",
        "dropped",
        "duration_ms",
        "elapsed_ms",
        "end",
        "engine",
        "engine_version",
        "entries",
        "error",
        "error_hash",
        "error_type",
        "errors",
        "event",
        "exit_code",
        "expected",
        "failed",
        "features",
        "fence",
        "field",
        "fields",
        "file",
        "first_token_ms",
        "folder",
        "frames",
        "got",
        "hold_nano_usd",
        "id",
        "identity",
        "in_flight",
        "instance",
        "interval_s",
        "items",
        "jobs",
        "key_id",
        "kind",
        "lag_ms",
        "latency_ms",
        "level",
        "lifetime_s",
        "limit",
        "link",
        "loaded",
        "lost",
        "max",
        "method",
        "migration",
        "missing",
        "mode",
        "model",
        "model_id",
        "model_revision",
        "name",
        "near",
        "new",
        "next_s",
        "node",
        "node_id",
        "nodes",
        "old",
        "operator",
        "outcome",
        "path",
        "peer",
        "pending",
        "pid",
        "port",
        "pool",
        "price_version",
        "prompt_tokens",
        "provider_id",
        "queue_bytes",
        "queued",
        "quantisation",
        "ratio",
        "reason",
        "refused",
        "removed",
        "request_id",
        "reserved",
        "result",
        "resumed",
        "retry_after_s",
        "role",
        "rss_bytes",
        "running",
        "scheduler_id",
        "schema",
        "seconds",
        "seq",
        "service",
        "services",
        "session",
        "session_counter",
        "settled",
        "shares",
        "signal",
        "size",
        "slots",
        "slow_ms",
        "sql_state",
        "state",
        "status",
        "stream",
        "streams",
        "task",
        "timestamp",
        "timeout_s",
        "token_count",
        "total",
        "trace_id",
        "span_id",
        "traceback",
        "tries",
        "try_number",
        "uri",
        "used",
        "user_agent_family",
        "version",
        "waited_ms",
        "warning",
    ]
)
_KEYS: Final = re.compile(
    r"gm_(?:live|test|node)_[A-Za-z0-9_]+|(?i:bearer)\s+[A-Za-z0-9._~+/=-]{8,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9._-]+"
)
_MAX_TEXT: Final = 2000  # a longer value is cut; tracebacks are allowed four times as much
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_dropped: Counter[str] = Counter()
_DROPPED_NAMES: Final = 200  # distinct names that are counted apart; field names come from code, but bound it anyway


class Logger(Protocol):
    """What the rest of the code uses of a structlog logger."""

    def debug(self, event: str, **fields: Any) -> Any:
        """Detail for a developer."""

    def info(self, event: str, **fields: Any) -> Any:
        """Something normal that an operator may want to know."""

    def warning(self, event: str, **fields: Any) -> Any:
        """Something that went wrong and was dealt with."""

    def error(self, event: str, **fields: Any) -> Any:
        """Something that went wrong and needs a person."""

    def bind(self, **fields: Any) -> "Logger":
        """A logger that adds these fields to each line."""


class _Settings(Protocol):
    """The part of config.Settings that logs need."""

    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> str: ...
    @property
    def development(self) -> bool: ...


Event = MutableMapping[str, Any]


def dropped_fields() -> dict[str, int]:
    """Field names that were not allowed and how often: exported as a metric, so that a typo or a leak attempt is
    seen.
    """
    return dict(_dropped)


def _clean(value: Any, limit: int = _MAX_TEXT) -> Any:
    """A value as it may be logged: numbers as they are, texts cut and redacted, bytes and secrets never."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return _KEYS.sub(REDACTED, value[:limit])
    if isinstance(value, Secret | bytes | bytearray | memoryview):
        return REDACTED
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, 200) for item in list(value)[:50]]
    if isinstance(value, dict):
        return {str(_clean(str(key), 100)): _clean(item, 200) for key, item in list(value.items())[:50]}
    return _KEYS.sub(REDACTED, str(value)[:limit])


def allow_listed(_logger: Any, _method: str, event: Event) -> Event:
    """structlog processor: keeps allowed fields only, cut and redacted. Exceptions become safe tracebacks."""
    out: Event = {}
    exc = event.pop("exc_info", None)
    if exc:
        err = exc if isinstance(exc, BaseException) else sys.exc_info()[1]
        if err is not None:
            out["error_type"] = type(err).__name__
            out["traceback"] = _clean(safe_traceback(err), 4 * _MAX_TEXT)
    for name, value in event.items():
        if name in FIELDS:
            out[name] = _clean(value, 4 * _MAX_TEXT if name == "traceback" else _MAX_TEXT)
        elif name in _dropped or len(_dropped) < _DROPPED_NAMES:
            _dropped[name] += 1
    return out


def _trace_ids(_logger: Any, _method: str, event: Event) -> Event:
    """structlog processor: a traceparent given as field becomes trace_id and span_id."""
    traceparent = event.pop("traceparent", "")
    if isinstance(traceparent, str) and len(traceparent) >= 55:  # 00-<32 hex>-<16 hex>-<2 hex>
        event["trace_id"], event["span_id"] = traceparent[3:35], traceparent[36:52]
    return event


class _Foreign(logging.Handler):
    """Lines of libraries, through the same allow list: their name, level and the type of any exception, and their
    text only from WARNING on.

    A library's text may quote what it handled, so it is logged only for libraries that never see a prompt.
    """

    _QUOTED = ("asyncio", "asyncpg", "grpc", "opentelemetry")

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line; never raises, as logging demands."""
        try:
            package = record.name.partition(".")[0]
            text = record.msg if package not in self._QUOTED else record.getMessage()
            logger = structlog.get_logger(record.name)
            err = record.exc_info[1] if record.exc_info else None
            method = logger.error if record.levelno >= logging.ERROR else logger.warning
            method("library message", name=record.name, warning=str(text)[:300], exc_info=err)
        except Exception:
            self.handleError(record)


def setup(settings: _Settings, service: str) -> None:
    """Sets up logging for the process: format, level, allow list, and the standard library's loggers."""
    console = settings.log_format == "console" or (
        settings.log_format == "auto" and (settings.development or sys.stderr.isatty())
    )
    json = structlog.processors.JSONRenderer()
    renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()) if console else json

    def add_service(_logger: Any, _method: str, event: Event) -> Event:
        event["service"] = service
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            add_service,
            _trace_ids,
            allow_listed,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.log_level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(logging.WARNING)


def get_logger(name: str = "") -> Logger:
    """A logger; `name` becomes a field."""
    logger: Logger = structlog.get_logger(name=name) if name else structlog.get_logger()
    return logger
