"""Traces: one decision at the edge, nothing at all for the unsampled, one tree for the sampled."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpumesh_runtime import otlp, tracing
from gpumesh_runtime.error_types import Unavailable
from gpumesh_runtime.reasons import Reason


class Recorder:
    """A provider that keeps spans in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        exporter: SpanExporter = self.exporter
        self.provider = otlp.provider(exporter, "shop")

    def spans(self) -> list[tuple[str, str, str, str]]:
        """(name, trace id, span id, parent id), in the order of their ends."""
        self.provider.force_flush()
        found = []
        for span in self.exporter.get_finished_spans():
            assert span.context is not None
            parent = f"{span.parent.span_id:016x}" if span.parent else ""
            found.append((span.name, f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}", parent))
        return found


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    made = Recorder()
    tracing.use_provider(made.provider)
    yield made
    tracing.use_provider(None)
    made.provider.shutdown()


def test_sampling_gives_well_formed_traceparents_at_the_asked_ratio() -> None:
    assert tracing.sample(0.0) == ""
    made = tracing.sample(1.0)
    version, trace_id, span_id, flags = made.split("-")
    assert (version, len(trace_id), len(span_id), flags) == ("00", 32, 16, "01")
    share = sum(bool(tracing.sample(0.1)) for _ in range(5000)) / 5000
    assert 0.07 < share < 0.13


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        ("", False),
        ("00-" + "1" * 32 + "-" + "2" * 16 + "-01", True),
        ("00-" + "1" * 32 + "-" + "2" * 16 + "-03", True),
        ("00-" + "1" * 32 + "-" + "2" * 16 + "-02", False),
        ("00-" + "1" * 32 + "-" + "2" * 16 + "-00", False),
        ("00-" + "1" * 32 + "-" + "2" * 16 + "-zz", False),
        ("junk", False),
    ],
)
def test_only_bit_0_of_the_flags_asks_for_spans(traceparent: str, expected: bool) -> None:
    assert tracing.sampled(traceparent) is expected


def test_an_unsampled_job_gets_the_one_span_that_does_nothing(recorder: Recorder) -> None:
    first, second = tracing.span("a", ""), tracing.span("b", "")
    assert first is second
    with first as span:
        span.set("x", 1)
        span.event("y")
        span.fail("INTERNAL")
    assert recorder.spans() == []


def test_the_context_travels_on_through_a_process_that_records_nothing() -> None:
    traceparent = tracing.sample(1.0)
    assert tracing.span("a", traceparent).traceparent == traceparent


def test_spans_of_several_processes_make_one_tree_below_the_edges_root(recorder: Recorder) -> None:
    traceparent = tracing.sample(1.0)
    with tracing.span("edge", traceparent, {"gen_ai.request.model": "m"}, root=True) as edge:
        assert edge.traceparent == traceparent
        with tracing.span("scheduler", edge.traceparent) as scheduler:
            tracing.span("node", scheduler.traceparent).end()
    (node, sched, root) = recorder.spans()
    assert (root[0], root[3]) == ("edge", "")
    assert f"00-{root[1]}-{root[2]}-01" == traceparent
    assert (sched[0], sched[3]) == ("scheduler", root[2])
    assert (node[0], node[3]) == ("node", sched[2])
    assert node[1] == sched[1] == root[1]


def failing() -> None:
    with tracing.span("a", tracing.sample(1.0), root=True):
        raise Unavailable(Reason.NO_CAPACITY, "Nobody.")


def test_a_span_that_ends_in_an_error_says_its_reason(recorder: Recorder) -> None:
    with pytest.raises(Unavailable):
        failing()
    recorder.provider.force_flush()
    (span,) = recorder.exporter.get_finished_spans()
    assert not span.status.is_ok
    assert dict(span.attributes or {})["error.type"] == "NO_CAPACITY"
    assert not span.events  # no exception text: it could quote a prompt
