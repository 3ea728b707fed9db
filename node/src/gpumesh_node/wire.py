"""The node's values as wire messages and back: total, pure."""

from collections.abc import Iterable, Sequence
from typing import Final

from gpumesh.common.v1 import job_pb2
from gpumesh.node.v1 import session_pb2
from gpumesh_node.domain.deltas import Delta, TokenLogprob, Usage
from gpumesh_node.domain.job import Job, Offer, Receipt
from gpumesh_node.domain.merge import halve
from gpumesh_node.domain.models import ServedModel

# A message on a node session is at most 64 KiB; a frame of three quarters of it leaves room for what else is ready.
MAX_FRAME_BYTES: Final = 48 * 1024
# One frame renders as that many events at most, so that a burst of the engine cannot hide behind one frame's 256 bytes in windows.
MAX_FRAME_DELTAS: Final = 64


def offer_from_wire(job_id: bytes, fence: int, body: bytes) -> Offer:
    """An Offer item. Raises DecodeError for garbage."""
    message = session_pb2.Offer.FromString(body)
    return Offer(
        job_id=job_id,
        fence=fence,
        model_id=message.model_id,
        modality=message.modality,
        max_output_tokens=message.max_output_tokens,
        deadline_s=message.deadline_ms / 1000,
        streaming=message.streaming,
        traceparent=message.traceparent,
        receipt_token=message.receipt_token,
        payload_bytes=0 if message.payload else message.payload_bytes,
        payload=message.payload,
        window_bytes=message.window_bytes,
        resumes=bool(message.prefix_token_ids),
    )


def usage_to_wire(usage: Usage) -> job_pb2.Usage:
    """Token counts."""
    return job_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def build_to_wire(model: ServedModel) -> job_pb2.ModelBuild:
    """How a model is computed."""
    return job_pb2.ModelBuild(
        model_id=model.model_id,
        revision=model.revision,
        quantisation=model.quantisation,
        engine_name=model.engine_name,
        engine_version=model.engine_version,
    )


def served_to_wire(model: ServedModel) -> session_pb2.ServedModel:
    """One model of Status."""
    return session_pb2.ServedModel(
        build=build_to_wire(model),
        slots=model.slots,
        context_tokens=model.context_tokens,
        features=[job_pb2.Feature.ValueType(feature.value) for feature in model.features],
        modalities=[job_pb2.Modality.ValueType(modality.value) for modality in model.modalities],
        state=session_pb2.ModelState.ValueType(model.state.value),
        kv_tokens=model.kv_tokens,
    )


def status_to_wire(
    models: Iterable[ServedModel], running: Iterable[Job], *, draining: bool, unavailable_reason: str
) -> session_pb2.Status:
    """What the node serves and runs now."""
    return session_pb2.Status(
        models=[served_to_wire(model) for model in models],
        running=[
            session_pb2.RunningJob(job_id=job.offer.job_id, fence=job.offer.fence, sent_seq=job.seq) for job in running
        ],
        draining=draining,
        unavailable_reason=unavailable_reason,
    )


def receipt_to_wire(receipt: Receipt) -> session_pb2.Receipt:
    """A receipt as it is presented again."""
    return session_pb2.Receipt(
        receipt_token=receipt.token,
        usage=usage_to_wire(receipt.usage),
        outcome=job_pb2.JobOutcome.ValueType(receipt.outcome.value),
    )


def frames_of(deltas: Sequence[Delta]) -> list[tuple[bytes, Sequence[Delta]]]:
    """Deltas as bodies of Frame, each within MAX_FRAME_BYTES and MAX_FRAME_DELTAS, with the deltas that are in it."""
    body = frame_to_wire(deltas)
    if len(body) <= MAX_FRAME_BYTES and len(deltas) <= MAX_FRAME_DELTAS:
        return [(body, deltas)]
    if len(deltas) > 1:
        middle = len(deltas) // 2
        return frames_of(deltas[:middle]) + frames_of(deltas[middle:])
    halves = halve(deltas[0])
    if halves is None:
        return [(body, deltas)]  # one token cannot be cut; the link takes up to 1 MiB
    return frames_of((halves[0],)) + frames_of((halves[1],))


def only_frame(frames: Sequence[tuple[bytes, Sequence[Delta]]]) -> tuple[bytes, Sequence[Delta]] | None:
    """The frame of an answer that has just one, if Done has room for it."""
    return frames[0] if len(frames) == 1 and len(frames[0][0]) <= MAX_FRAME_BYTES else None


def frame_to_wire(deltas: Sequence[Delta]) -> bytes:
    """Deltas as one body of Frame."""
    frame = session_pb2.Frame()
    add = frame.deltas.add
    for delta in deltas:
        out = add()
        if delta.choice:
            out.choice = delta.choice
        if delta.text:
            out.text = delta.text
        if delta.reasoning:
            out.reasoning = delta.reasoning
        if delta.finish:
            out.finish_reason = delta.finish.value  # type: ignore[assignment]  # the numbers are the same; a test compares them
        if delta.tool_calls or delta.logprobs or delta.token_ids or delta.refusal:
            _rest_to_wire(delta, out)
    return frame.SerializeToString()


def _rest_to_wire(delta: Delta, out: session_pb2.Delta) -> None:
    """What few deltas have."""
    for call in delta.tool_calls:
        out.tool_calls.add(index=call.index, call_id=call.call_id, name=call.name, arguments=call.arguments)
    for logprob in delta.logprobs:
        _logprob_to_wire(logprob, out.logprobs.add())
    out.token_ids.extend(delta.token_ids)
    out.refusal = delta.refusal


def _logprob_to_wire(logprob: TokenLogprob, out: session_pb2.TokenLogprob) -> None:
    out.token = logprob.token
    out.logprob = logprob.logprob
    out.token_bytes = logprob.token_bytes
    for top in logprob.top:
        _logprob_to_wire(top, out.top.add())
