"""Traces, decided once and carried in jobs. The edge calls `sample()`; an unsampled job carries "" and nothing here
does anything for it.

    traceparent = sample()                                        # edge, once a request: "" for 99 of 100
    with span("chat", traceparent, {"gen_ai.request.model": m}) as s:
        ... s.traceparent travels on in the job ...

Spans are recorded only where an OTLP endpoint is configured; without one OpenTelemetry is not even imported.
"""

import random
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Protocol

from gpumesh_runtime.metrics import counter

_LENGTH: Final = 55  # 00-<32 hex>-<16 hex>-<2 hex>
_ratio = 0.01
_backend: "_Backend | None" = None
_SPANS: Final = counter("gpumesh_spans_total", "Spans recorded").cell
Value = str | int | float | bool


class _Settings(Protocol):
    """The part of config.Settings that traces need."""

    @property
    def otlp_endpoint(self) -> str: ...
    @property
    def trace_ratio(self) -> float: ...


def sample(ratio: float | None = None) -> str:
    """A new W3C traceparent for the share of calls that is traced, else "". ratio: instead of the configured one."""
    if random.random() >= (_ratio if ratio is None else ratio):  # noqa: S311 -- sampling, not a secret
        return ""
    return f"00-{random.getrandbits(128) or 1:032x}-{random.getrandbits(64) or 1:016x}-01"


def sampled(traceparent: str) -> bool:
    """Whether a traceparent asks for spans: well-formed, and bit 0 of its flags set (OpenTelemetry sets 0x02 as
    well).
    """
    if len(traceparent) != _LENGTH:
        return False
    try:
        return bool(int(traceparent[53:], 16) & 1)
    except ValueError:
        return False


class Span:
    """One step of a trace. Ends with its `with` block or by `end()`. Attributes never hold what a client wrote."""

    __slots__ = ("_ended", "_inner", "traceparent")

    def __init__(self, inner: Any, traceparent: str) -> None:
        self._inner = inner
        self._ended = False
        # What goes on to the next process, so that its spans become children of this one.
        self.traceparent = traceparent

    def set(self, name: str, value: Value) -> None:
        """Sets an attribute."""
        self._inner.set_attribute(name, value)

    def event(self, name: str) -> None:
        """Marks a moment, such as the first token."""
        self._inner.add_event(name)

    def fail(self, reason: str) -> None:
        """Marks the span as failed, with a reason of the closed list."""
        self._inner.set_attribute("error.type", reason)
        if _backend is not None:
            self._inner.set_status(_backend.error_status)

    def end(self, end_ns: int | None = None) -> None:
        """Ends the span; a second call does nothing."""
        if not self._ended:
            self._ended = True
            self._inner.end(end_time=end_ns)

    def __enter__(self) -> "Span":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if err is not None:
            self.fail(str(getattr(err, "reason", type(err).__name__)))
        self.end()


class _NoSpan(Span):
    """What an unsampled job gets: one object for all of them, which does nothing."""

    def __init__(self, traceparent: str = "") -> None:
        super().__init__(None, traceparent)

    def set(self, name: str, value: Value) -> None:
        """Nothing."""

    def event(self, name: str) -> None:
        """Nothing."""

    def fail(self, reason: str) -> None:
        """Nothing."""

    def end(self, end_ns: int | None = None) -> None:
        """Nothing."""


_NONE: Final = _NoSpan()


def span(
    name: str,
    traceparent: str,
    attributes: Mapping[str, Value] | None = None,
    *,
    root: bool = False,
    start_ns: int | None = None,
) -> Span:
    """Starts a span below `traceparent`; with `root` the span is that traceparent itself (the edge's, just sampled).

    start_ns: when it began, Unix nanoseconds, for work that is recorded afterwards.
    """
    if not traceparent:
        return _NONE
    if _backend is None or not sampled(traceparent):
        return _NoSpan(traceparent)  # nothing is recorded here, but the context still travels on
    _SPANS.value += 1
    return _backend.start(name, traceparent, attributes or {}, root, start_ns or time.time_ns())


def setup(settings: _Settings, service: str, instance: str = "") -> None:
    """Sets the sampling ratio and, with an OTLP endpoint, starts the exporter."""
    global _ratio  # noqa: PLW0603 -- one tracer per process, as in OpenTelemetry itself
    _ratio = settings.trace_ratio
    if settings.otlp_endpoint and _backend is None:
        # Imported here: the SDK and exporter cost 20 MB that a process without an endpoint must not pay.
        from gpumesh_runtime.otlp import otlp_provider  # noqa: PLC0415 -- see above

        use_provider(otlp_provider(settings.otlp_endpoint, service, instance))


def use_provider(provider: Any) -> None:
    """Records spans with an OpenTelemetry SDK TracerProvider whose id generator is `otlp.Ids` (tests give one that
    keeps them in memory).
    """
    global _backend  # noqa: PLW0603 -- see setup
    _backend = None if provider is None else _Backend(provider)


def shutdown() -> None:
    """Sends what is left, 5 s at most."""
    if _backend is not None:
        _backend.shutdown()


class _Backend:
    """The SDK behind the gate."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry import trace  # noqa: PLC0415 -- see setup

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("gpumesh")
        self.error_status = trace.Status(trace.StatusCode.ERROR)

    def start(self, name: str, traceparent: str, attributes: Mapping[str, Value], root: bool, start_ns: int) -> Span:
        trace = self._trace
        trace_id, span_id = int(traceparent[3:35], 16), int(traceparent[36:52], 16)
        if root:
            self._provider.id_generator.next_ids = (trace_id, span_id)
            context = trace.set_span_in_context(trace.INVALID_SPAN)
        else:
            parent = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=trace.TraceFlags(1))
            context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
        inner = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=start_ns)
        made = inner.get_span_context()
        return Span(inner, f"00-{made.trace_id:032x}-{made.span_id:016x}-01")

    def shutdown(self) -> None:
        self._provider.force_flush(5000)
        self._provider.shutdown()
