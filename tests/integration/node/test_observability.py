"""What the node shows of itself: spans of sampled jobs, metrics, nothing for the unsampled."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpumesh_runtime import otlp, tracing
from gpumesh_runtime.metrics import REGISTRY
from tests.support.node_openai import FakeOpenAi
from tests.support.node_process import node_settings, running_node
from tests.support.node_scheduler import FakeScheduler, NodeCertificates, chat

TRACE = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Finished spans of this test."""
    exporter = InMemorySpanExporter()
    provider = otlp.provider(exporter, "node")
    tracing.use_provider(provider)
    yield exporter
    tracing.use_provider(None)
    provider.shutdown()


async def test_a_sampled_job_is_a_span_that_the_engine_continues(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeOpenAi() as server, FakeScheduler(certificates.scheduler) as scheduler:
        spec = {"kind": "openai", "base_url": server.base_url, "models": {"engine-model": "m"}, "engine_name": "vllm"}
        async with running_node(node_settings(tmp_path, certificates.node(), [scheduler.address], [spec])):
            await scheduler.ready()
            await scheduler.completed(scheduler.offer(chat("unsampled secret")))
            await scheduler.completed(scheduler.offer(chat("sampled secret"), traceparent=TRACE))
    tracing.shutdown()  # sends what the batch processor still holds
    (span,) = spans.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == ("1" * 32, "2" * 16)
    assert span.attributes is not None
    assert span.attributes["gen_ai.request.model"] == "m"
    assert "secret" not in str(dict(span.attributes))
    first, second = server.requests
    assert "traceparent" not in first.headers
    assert second.headers["traceparent"] == f"00-{'1' * 32}-{span.context.span_id:016x}-01"


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeScheduler(certificates.scheduler) as scheduler:
        spec = {"kind": "mock", "model_id": "metrics-model"}
        async with running_node(node_settings(tmp_path, certificates.node(), [scheduler.address], [spec])):
            await scheduler.ready("metrics-model")
            await scheduler.completed(scheduler.offer(chat("[[mock tokens=3]]"), model_id="metrics-model"))
            await scheduler.ended(scheduler.offer(chat("[[mock error=engine]]"), model_id="metrics-model"))
            text = REGISTRY.exposition()
    for line in (
        'gpumesh_node_jobs_total{model="metrics-model",outcome="completed"} 1',
        'gpumesh_node_jobs_total{model="metrics-model",outcome="failed"} 1',
        'gpumesh_node_output_tokens_total{model="metrics-model"} 3',
        'gpumesh_node_jobs_running{model="metrics-model"} 0',
        'gpumesh_node_first_output_seconds_count{model="metrics-model"} 1',
        'gpumesh_node_model_ready{model="metrics-model"} 1',
        "gpumesh_node_receipts_unacknowledged 1",
        "gpumesh_node_session_up 1",
    ):
        assert line in text, line
