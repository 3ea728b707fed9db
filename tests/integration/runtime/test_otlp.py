"""Spans leave the process over OTLP, and only a process with an endpoint loads OpenTelemetry's SDK."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from gpumesh_runtime import tracing


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            self.services |= {
                pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass
class TraceSettings:
    """What tracing.setup reads."""

    otlp_endpoint: str = ""
    trace_ratio: float = 1.0


@dataclass
class Running:
    """A collector and where it listens."""

    endpoint: str
    collector: Collector = field(default_factory=Collector)


@pytest.fixture
def running() -> Iterator[Running]:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    made = Running(f"http://127.0.0.1:{port}")
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made.collector, server)  # type: ignore[no-untyped-call]  # generated without types
    server.start()
    yield made
    tracing.shutdown()
    tracing.use_provider(None)
    tracing.setup(TraceSettings(trace_ratio=0.01), "shop")
    server.stop(0).wait()


def test_sampled_spans_reach_the_collector_and_unsampled_ones_do_not_exist(running: Running) -> None:
    tracing.setup(TraceSettings(running.endpoint), "shop")
    traceparent = tracing.sample()
    with tracing.span("chat", traceparent, {"gen_ai.request.model": "tiny"}, root=True):
        pass
    with tracing.span("silent", ""):
        pass
    tracing.shutdown()
    (span,) = running.collector.spans
    assert (span.name, span.trace_id.hex(), span.span_id.hex()) == ("chat", traceparent[3:35], traceparent[36:52])
    assert running.collector.services == {"shop"}


def test_a_process_without_an_endpoint_does_not_load_the_sdk() -> None:
    code = (
        "import sys, gpumesh_runtime.lifecycle, gpumesh_runtime.rpc.server\n"
        "sys.exit(', '.join(m for m in sys.modules if m.partition('.')[0] in {'opentelemetry', 'rich', 'cryptography', 'asyncpg'}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
