"""Structured logs. JSON lines in production, readable on a terminal; only field names from a list get out, so
prompts cannot.

A log call is `log.info("constant event text", job_id=..., reason=...)`. The event is a constant, never built from data. A field
whose name is not in FIELDS is dropped and counted (`dropped_fields()`); a text that looks like an API key or token is redacted
wherever it stands.
"""

import logging
import re
import sys
from collections import Counter
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import msgspec

# structlog loads rich (5 MB) where it happens to be installed, for tracebacks that we do not print. It must look absent.
_ABSENT: Final = {name: sys.modules.setdefault(name, None) for name in ("rich",)}  # type: ignore[arg-type]  # None means: not importable
import structlog  # noqa: E402 -- see above

if _ABSENT["rich"] is None:
    del sys.modules["rich"]

from gpumesh_runtime.errors import safe_traceback  # noqa: E402 -- see above
from gpumesh_runtime.log_fields import FIELDS  # noqa: E402 -- see above
from gpumesh_runtime.secret import REDACTED, Secret  # noqa: E402 -- see above

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
    kind = type(value)
    if kind is str:
        return _text(value, limit)
    if kind is int or kind is float or kind is bool or value is None:
        return value
    if isinstance(value, Secret | bytes | bytearray | memoryview):
        return REDACTED
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(item, 200) for item in list(value)[:50]]
    if isinstance(value, dict):
        return {str(_clean(str(key), 100)): _clean(item, 200) for key, item in list(value.items())[:50]}
    return _text(str(value), limit)


def _text(value: str, limit: int) -> str:
    """A text, cut, without anything that looks like a key. The plain searches first: the pattern costs 1 us a field."""
    if len(value) > limit:
        value = value[:limit]
    if "gm_" in value or "eyJ" in value or "earer" in value or "EARER" in value:
        return _KEYS.sub(REDACTED, value)
    return value


def allow_listed(_logger: Any, method: str, event: Event) -> Event:
    """structlog processor: adds time, level and trace ids, keeps allowed fields only, cut and redacted; an exception
    becomes a safe traceback.
    """
    out: Event = {
        "timestamp": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "level": method,
    }
    traceparent = event.pop("traceparent", "")
    if traceparent and isinstance(traceparent, str) and len(traceparent) >= 55:  # 00-<32 hex>-<16 hex>-<2 hex>
        out["trace_id"], out["span_id"] = traceparent[3:35], traceparent[36:52]
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


def _json_line(_logger: Any, _method: str, event: Event) -> str:
    """structlog processor: the line. What allow_listed leaves is always JSON."""
    return msgspec.json.encode(event).decode()


class _Lines:
    """Writes a line to whatever stderr is now, in one write, so that lines of several threads do not mix."""

    def msg(self, line: str) -> None:
        """Writes and flushes."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    log = debug = info = warning = error = critical = exception = msg


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
    colours = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer(colors=colours) if console else _json_line

    def add_service(_logger: Any, _method: str, event: Event) -> Event:
        event["service"] = service
        return event

    structlog.configure(
        processors=[add_service, allow_listed, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.log_level]),
        logger_factory=lambda *_args: _Lines(),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Foreign()]
    root.setLevel(logging.WARNING)


def get_logger(name: str = "") -> Logger:
    """A logger; `name` becomes a field."""
    logger: Logger = structlog.get_logger(name=name) if name else structlog.get_logger()
    return logger
