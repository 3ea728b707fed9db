"""Whether this node takes an offer. Pure."""

from typing import Final

from gpumesh_node.domain.job import Offer
from gpumesh_node.domain.models import ModelState, ServedModel
from gpumesh_runtime.reasons import Reason

MAX_PAYLOAD_BYTES: Final = 8 * 1024 * 1024  # the edge's bound on a JSON body (mechanisms.md 10)
_ID_BYTES: Final = 16


def refusal(offer: Offer, model: ServedModel | None, taken: int, node_problem: str) -> tuple[Reason, str] | None:
    """Why an offer is refused, with a sentence; None: it is taken.

    model: what the node serves under that id. taken: its jobs, waiting ones included. node_problem: why the node takes nothing now.
    """
    if node_problem:
        return Reason.RESOURCE_EXHAUSTED, f"The node takes no jobs: {node_problem}."
    if model is None:
        return Reason.MODEL_UNAVAILABLE, "This node does not serve the model."
    if model.state is ModelState.DRAINING:
        return Reason.NODE_DRAINING, "The node is shutting down."
    if model.state is not ModelState.READY:
        return Reason.ENGINE_UNAVAILABLE, "The model's engine does not answer now."
    if offer.modality not in model.modalities:
        return Reason.FEATURE_UNSUPPORTED, "The model does not do this kind of work here."
    if offer.resumes:
        return Reason.FEATURE_UNSUPPORTED, "This node cannot go on from given tokens."
    if offer.max_output_tokens <= 0 or len(offer.job_id) != _ID_BYTES or not (offer.payload or offer.payload_bytes):
        return Reason.INVALID_ARGUMENT, "The offer is incomplete."
    if offer.payload_bytes > MAX_PAYLOAD_BYTES:
        return Reason.PAYLOAD_TOO_LARGE, f"The payload is larger than {MAX_PAYLOAD_BYTES} bytes."
    # One more per slot may wait here, so that a slot that becomes free is not idle for a round trip (mechanisms.md 2).
    if taken >= 2 * model.slots:
        return Reason.NO_CAPACITY, "All slots are taken."
    return None


def covers(cancelled: int, fence: int) -> bool:
    """Whether a Cancel's fence means this try: 0 means all of the job, one with try 0 the attempt, else exactly that try."""
    return cancelled in (0, fence) or (cancelled & 0xFFFF == 0 and cancelled >> 16 == fence >> 16)
