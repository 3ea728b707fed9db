"""The OpenTelemetry SDK and its OTLP exporter. Imported only by processes that have an endpoint (tracing.setup)."""

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON


class Ids(RandomIdGenerator):
    """Random ids, except that a root span takes those of the traceparent that the edge has already made."""

    next_ids: tuple[int, int] | None = None

    def generate_trace_id(self) -> int:
        """The trace id that is due, else a random one."""
        return self.next_ids[0] if self.next_ids else super().generate_trace_id()

    def generate_span_id(self) -> int:
        """The span id that is due, once, else a random one. The SDK asks for the trace id first or not at all."""
        due, self.next_ids = self.next_ids, None
        return due[1] if due else super().generate_span_id()


def provider(exporter: SpanExporter, service: str, instance: str = "") -> TracerProvider:
    """A provider that exports in batches. Whether a span exists at all was decided before: the SDK samples
    everything it is given.
    """
    resource = Resource(
        {"service.namespace": "gpumesh", "service.name": service, "service.instance.id": instance or service}
    )
    made = TracerProvider(sampler=ALWAYS_ON, resource=resource, id_generator=Ids(), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=4096, schedule_delay_millis=2000))
    return made


def otlp_provider(endpoint: str, service: str, instance: str) -> TracerProvider:
    """A provider that sends to an OTLP gRPC endpoint. A plain http:// endpoint must be a collector on this machine
    or in this pod.
    """
    return provider(
        OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5), service, instance
    )
