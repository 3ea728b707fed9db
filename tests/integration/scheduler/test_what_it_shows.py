"""Traces, metrics and logs of the scheduler: what can be seen, and what never is."""

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gpumesh_runtime import tracing
from gpumesh_runtime.metrics import REGISTRY
from gpumesh_runtime.otlp import Ids
from tests.support.scheduler_mesh import Mesh
from tests.support.scheduler_peers import COMPLETED, DELIVERED_ACK, DONE, OFFER

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(id_generator=Ids(), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use_provider(provider)
    yield exporter
    tracing.use_provider(None)


async def test_each_try_of_a_sampled_job_is_a_span_that_its_node_continues(
    mesh: Mesh, spans: InMemorySpanExporter
) -> None:
    node, caller = await mesh.node("n1"), await mesh.caller()
    job_id = caller.submit(traceparent=PARENT)
    offer = await node.item(OFFER, job_id)
    other = await mesh.node("n2", serve=1)
    node.error(offer, "ENGINE_ERROR")
    await caller.item(DONE, job_id)
    await mesh.until(lambda: len(spans.get_finished_spans()) == 2)
    failed, done = spans.get_finished_spans()
    assert [span.name for span in (failed, done)] == ["scheduler.try"] * 2
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "ENGINE_ERROR"
    assert done.attributes is not None
    assert "error.type" not in done.attributes
    for span, told in ((failed, node), (done, other)):
        context = span.get_span_context()
        assert context is not None
        assert f"{context.trace_id:032x}" == TRACE
        assert [offer.traceparent for offer in told.offers.values()] == [f"00-{TRACE}-{context.span_id:016x}-01"]


@pytest.mark.parametrize("traceparent", ["", "garbage", PARENT.replace("0af", "xyz")])
async def test_an_unsampled_job_or_a_malformed_context_makes_no_span(
    mesh: Mesh, spans: InMemorySpanExporter, traceparent: str
) -> None:
    node, caller = await mesh.node(serve=1), await mesh.caller()
    job_id = caller.submit(traceparent=traceparent)
    await caller.item(DONE, job_id)
    assert [offer.traceparent for offer in node.offers.values()] == [""]
    assert not spans.get_finished_spans()


async def test_the_metrics_tell_of_sessions_jobs_and_settlements(mesh: Mesh) -> None:
    await mesh.node(serve=1)
    caller = await mesh.caller()
    job_id = caller.submit()
    await caller.item(DONE, job_id)
    caller.delivered(job_id, COMPLETED, 1)
    await caller.item(DELIVERED_ACK, job_id)
    shown = REGISTRY.exposition()
    assert 'gpumesh_scheduler_sessions{state="ready"} 1' in shown
    assert 'gpumesh_scheduler_jobs_total{outcome="COMPLETED",reason=""}' in shown
    assert "gpumesh_scheduler_unsettled_jobs 0" in shown
    assert "gpumesh_scheduler_payload_bytes 0" in shown


async def test_no_log_line_holds_what_a_client_or_a_node_wrote(mesh: Mesh, capfd: pytest.CaptureFixture[str]) -> None:
    marker = "PURPLE-ELEPHANT-7351"
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit(payload=marker.encode())
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    node.frame(offer, 1, body=marker.encode())
    node.frame(offer, 9, body=marker.encode())  # a gap: the session ends, and is logged
    await caller.failure(job_id)
    await mesh.until(lambda: not mesh.service.desk.roster.sessions)
    shown = capfd.readouterr()
    assert marker not in shown.out + shown.err
    assert "node broke the protocol" in shown.out + shown.err
