"""Between wire messages and domain values. Total and pure; payload and answer bytes pass untouched.

What comes from nodes is checked against named bounds: they are strangers. NodeBreachError says that their session must end.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

from gpumesh.common.v1.job_pb2 import Feature, ModelBuild
from gpumesh.common.v1.job_pb2 import Segment as SegmentMessage
from gpumesh.common.v1.job_pb2 import Usage as UsageMessage
from gpumesh.metering.v1.settlement_service_pb2 import EvidenceSource, PaidSegment, Settle, Settled
from gpumesh.node.v1.session_pb2 import ModelState, Offer, ReceiptAck, Status
from gpumesh.scheduler.v1.capacity_service_pb2 import ModelCapacity
from gpumesh.scheduler.v1.dispatch_service_pb2 import Delivered as DeliveredMessage
from gpumesh.scheduler.v1.dispatch_service_pb2 import DeliveredAck, Submit
from gpumesh.scheduler.v1.operator_service_pb2 import NodeSummary
from gpumesh_runtime.error_types import InvalidArgument, PayloadTooLarge
from gpumesh_runtime.link.items import varint
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.evidence import Bill, Delivered, Segment
from gpumesh_scheduler.domain.job import Job
from gpumesh_scheduler.domain.nouns import (
    Build,
    Limits,
    ModelKey,
    NodeBreachError,
    NodeStatus,
    Outcome,
    Party,
    ServedModel,
    Terms,
    Usage,
)
from gpumesh_scheduler.domain.pools import Capacity
from gpumesh_scheduler.domain.reconcile import AckCaller, AckNode
from gpumesh_scheduler.domain.session import Session
from gpumesh_scheduler.domain.tickets import Ticket

ID_BYTES: Final = 16
# Bounds on what a node reports. A machine with 8 GPUs serves a handful of models with at most some hundred slots each.
MOST_MODELS: Final = 64
MOST_SLOTS: Final = 1024
MOST_RUNNING: Final = 4096
MOST_NAME: Final = 200
# Tokens of one job; far above any context window, far below what overflows int64 money.
MOST_TOKENS: Final = 100_000_000
# Payload inside Submit (one-request.md says 48 KiB), pieces of it (64 KiB), tokens to go on from: all must fit a node's link.
MOST_INLINE_BYTES: Final = 64 * 1024
MOST_PIECE_BYTES: Final = 256 * 1024
MOST_PREFIX: Final = 131_072
# Segments of one job: one per attempt that delivered something.
MOST_SEGMENTS: Final = 16
_NO_FEATURES: Final[frozenset[int]] = frozenset()
_NO_NODES: Final[frozenset[str]] = frozenset()
_TRACEPARENT: Final = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_OUTCOMES: Final = {int(outcome): outcome for outcome in Outcome}


def terms_from_wire(job_id: bytes, submit: Submit, ticket: Ticket, limits: Limits, now: float) -> Terms:
    """An admitted job: what the ticket promises and what Submit adds. Raises PayloadTooLarge."""
    prefix, excluded = submit.prefix_token_ids, submit.excluded_node_ids
    if len(submit.payload) > MOST_INLINE_BYTES or len(prefix) > MOST_PREFIX:
        raise PayloadTooLarge(
            Reason.PAYLOAD_TOO_LARGE, "Submit is too large.", metadata={"limit": str(MOST_INLINE_BYTES)}
        )
    deadline_s = submit.deadline_ms / 1000 or limits.max_deadline_s
    window = submit.window_bytes
    traceparent = submit.traceparent
    # By place: 16 names cost a microsecond.
    return Terms(
        job_id,
        ticket.attempt,
        ticket.model,
        ticket.modality,
        ticket.features,
        ticket.max_output_tokens,
        ticket.input_tokens_estimate,
        submit.streaming,
        now + min(deadline_s, limits.max_deadline_s),
        min(window, limits.max_window_bytes) if window else limits.default_window_bytes,
        submit.tries_used,
        frozenset(excluded) if excluded else _NO_NODES,
        _traceparent(traceparent) if traceparent else "",
        submit.ticket,
        ticket.settle_by_ns,
        tuple(prefix) if prefix else (),
    )


def _traceparent(text: str) -> str:
    """W3C trace context, version 00; anything else means not sampled."""
    return text if text and _TRACEPARENT.fullmatch(text) else ""


def offer_to_wire(job: Job, receipt_token: bytes, traceparent: str, now: float) -> bytes:
    """Body of Offer for the job's current try."""
    terms, payload = job.terms, job.payload
    offer = Offer(
        model_id=terms.model[0],
        modality=terms.modality,  # type: ignore[arg-type]  # an open enum: the number passes as it came
        max_output_tokens=terms.max_output_tokens,
        deadline_ms=max(1, int((terms.deadline_at - now) * 1000)),
        streaming=terms.streaming,
        traceparent=traceparent,
        receipt_token=receipt_token,
        payload_bytes=payload.expected_bytes,
        payload=payload.inline,
        window_bytes=job.limit_bytes,
    )
    if terms.prefix_token_ids:
        offer.prefix_token_ids.extend(terms.prefix_token_ids)
    return offer.SerializeToString()


def status_from_wire(status: Status) -> NodeStatus:
    """A node's report. Raises NodeBreachError beyond the bounds above."""
    if len(status.models) > MOST_MODELS or len(status.running) > MOST_RUNNING:
        raise NodeBreachError("status lists too much")
    models: dict[ModelKey, ServedModel] = {}
    for model in status.models:
        build = build_from_wire(model.build)
        if not build.model_id or model.slots > MOST_SLOTS or not 0 <= model.context_tokens <= MOST_TOKENS:
            raise NodeBreachError("a served model is out of bounds")
        models[build.key] = ServedModel(
            build=build,
            slots=model.slots,
            context_tokens=model.context_tokens,
            features=frozenset(map(int, model.features)) if model.features else _NO_FEATURES,
            modalities=frozenset(map(int, model.modalities)) if model.modalities else _NO_FEATURES,
            ready=model.state == ModelState.MODEL_STATE_READY,
        )
    if any(len(job.job_id) != ID_BYTES for job in status.running):
        raise NodeBreachError("a running job has no id")
    running = frozenset((job.job_id, job.fence) for job in status.running)
    return NodeStatus(tuple(models.values()), running, status.draining)


def build_from_wire(build: ModelBuild) -> Build:
    """A build as a node tells it. Raises NodeBreachError for absurdly long names."""
    told = Build(build.model_id, build.revision, build.quantisation, build.engine_name, build.engine_version)
    if any(len(name) > MOST_NAME for name in told):
        raise NodeBreachError("a name is too long")
    return told


def fill_build(message: ModelBuild, build: Build) -> None:
    """As it came."""
    message.model_id = build.model_id
    message.revision = build.revision
    message.quantisation = build.quantisation
    message.engine_name = build.engine_name
    message.engine_version = build.engine_version


def usage_from_node(usage: UsageMessage) -> Usage:
    """What a node counted. Raises NodeBreachError for counts that no job can have."""
    told = usage_from_wire(usage)
    if min(told) < 0 or max(told) > MOST_TOKENS:
        raise NodeBreachError("usage is out of bounds")
    return told


def usage_from_wire(usage: UsageMessage) -> Usage:
    """Counts as they are."""
    return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens, usage.reasoning_tokens)


def fill_usage(message: UsageMessage, usage: Usage) -> None:
    """Counts as they are."""
    message.prompt_tokens = usage.prompt_tokens
    message.completion_tokens = usage.completion_tokens
    message.cached_prompt_tokens = usage.cached_prompt_tokens
    message.reasoning_tokens = usage.reasoning_tokens


def delivered_from_wire(record: DeliveredMessage) -> Delivered:
    """A caller's record. Raises InvalidArgument when it is not one."""
    outcome = _OUTCOMES.get(record.outcome)
    if outcome is None:
        raise InvalidArgument(Reason.PROTOCOL_ERROR, "The delivered record has no outcome.")
    ticket, runs = record.ticket, record.segments
    if len(runs) > MOST_SEGMENTS or not ticket:
        raise InvalidArgument(Reason.PROTOCOL_ERROR, "The delivered record is out of bounds.")
    segments = tuple([Segment(run.fence, run.start_token, run.end_token) for run in runs])
    return Delivered(ticket, outcome, segments, usage_from_wire(record.usage), record.reason)


def settle_to_wire(bill: Bill) -> bytes:
    """Body of Settle. Filled in place: a message given to a constructor is copied by way of its encoding, three times as dear."""
    settle = Settle(
        ticket=bill.ticket,
        reason=bill.reason,
        receipt_only=bill.receipt_only,
        source=EvidenceSource.EVIDENCE_SOURCE_CALLER if bill.from_caller else EvidenceSource.EVIDENCE_SOURCE_RELAY,
    )
    if bill.outcome is not None:
        settle.outcome = bill.outcome.value  # type: ignore[assignment]  # the numbers are the same; a test compares them
    fill_usage(settle.usage, bill.usage)
    for fence, usage in bill.counts.items():
        fill_usage(settle.node_counts.add(fence=fence).usage, usage)
    encoded = settle.SerializeToString()
    for fence, start, end, party in bill.segments:
        run = SegmentMessage(fence=fence, start_token=start, end_token=end).SerializeToString()
        # At most 33 bytes: one byte of length.
        paid = b"\x0a%c%b" % (len(run), run) + (_party_to_wire(party) if party is not None else b"")
        encoded += (
            b"\x1a" + varint(len(paid)) + paid
        )  # encodings of parts, one after the other, are the encoding of the whole
    return encoded


@lru_cache(maxsize=40_000)
def _party_to_wire(party: Party) -> bytes:
    """The part of PaidSegment that all segments of a party share."""
    paid = PaidSegment(provider_id=party.provider_id, node_id=party.node_id)
    fill_build(paid.build, party.build)
    return paid.SerializeToString()


def settled_from_wire(settled: Settled) -> tuple[int, dict[int, int], str]:
    """(charge, pay by fence, reason), nano-USD."""
    return settled.charge.amount_nano_usd, {pay.fence: pay.pay_nano_usd for pay in settled.pays}, settled.reason


def many_from_wire(settled: Settled) -> Iterator[tuple[bytes, int, int, int]]:
    """(job id, charge, fence, pay) of each job, nano-USD. Raises ValueError when the lists differ in length."""
    joined = settled.job_ids
    ids = [joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES)]
    return zip(ids, settled.charges_nano_usd, settled.fences, settled.pays_nano_usd, strict=True)


def delivered_ack_to_wire(acks: Sequence[AckCaller]) -> bytes:
    """DeliveredAck of many jobs that were settled."""
    ack = DeliveredAck(job_ids=b"".join([ack.job_id for ack in acks]))
    ack.charges_nano_usd.extend([ack.charge_nano_usd for ack in acks])
    return ack.SerializeToString()


def receipt_ack_to_wire(acks: Sequence[AckNode]) -> bytes:
    """ReceiptAck of many jobs that were settled."""
    ack = ReceiptAck(job_ids=b"".join([ack.job_id for ack in acks]))
    ack.fences.extend([ack.fence for ack in acks])
    ack.earnings_nano_usd.extend([ack.earned_nano_usd for ack in acks])
    return ack.SerializeToString()


def capacity_to_wire(key: ModelKey, capacity: Capacity, queued: int, queued_tokens: int) -> ModelCapacity:
    """One model's line in a Capacity update."""
    return ModelCapacity(
        model_id=key[0],
        model_revision=key[1],
        nodes=capacity.nodes,
        slots=capacity.slots,
        free_slots=capacity.free_slots,
        queued_jobs=queued,
        outstanding_tokens=capacity.outstanding_tokens + queued_tokens,
        features=[Feature.ValueType(feature) for feature in sorted(capacity.features)],
    )


def reason_from_wire(text: str, fallback: Reason) -> Reason:
    """A reason of the closed list; `fallback` for what a newer version or a stranger sent."""
    try:
        return Reason(text)
    except ValueError:
        return fallback


def summary_to_wire(session: Session, status: Status, now: float) -> NodeSummary:
    """One session for operators."""
    return NodeSummary(
        node_id=session.node_id,
        provider_id=session.provider_id,
        state=session.state.name.lower(),
        status=status,
        running_jobs=len(session.tries),
        silent_ms=max(0, round((now - session.heard_at) * 1000)),
        session_ms=max(0, round((now - session.opened_at) * 1000)),
        software_version=session.version,
    )
