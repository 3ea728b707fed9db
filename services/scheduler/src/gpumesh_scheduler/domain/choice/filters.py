"""Why a seat does not serve: exactly one named reason each.

What depends on the node alone (`gate`) is kept as state of the seat and computed again only when it changes; what depends on the job
(`refuses`) is asked per candidate.
"""

from enum import StrEnum

from gpumesh_scheduler.domain.nouns import ServedModel, Terms


class Block(StrEnum):
    """A closed list; goes into metrics and explanations."""

    SESSION_SUSPECT = "SESSION_SUSPECT"
    SESSION_DRAINING = "SESSION_DRAINING"
    NOT_IN_CATALOGUE = "NOT_IN_CATALOGUE"
    MODEL_NOT_READY = "MODEL_NOT_READY"
    NO_FREE_SLOT = "NO_FREE_SLOT"
    NODE_EXCLUDED = "NODE_EXCLUDED"
    MODALITY_UNSUPPORTED = "MODALITY_UNSUPPORTED"
    FEATURE_UNSUPPORTED = "FEATURE_UNSUPPORTED"
    CONTEXT_TOO_SMALL = "CONTEXT_TOO_SMALL"


class SeatView:
    """What filters and scores see of one model on one node."""

    __slots__ = ("block", "model", "outstanding_tokens", "used")

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.used = 0
        self.outstanding_tokens = 0
        self.block: Block | None = None


def gate(seat: SeatView, session: Block | None, listed: bool) -> Block | None:
    """The seat's own reason. session: its session's reason; listed: the catalogue has the model, or is not known yet."""
    if session is not None:
        return session
    if not listed:
        return Block.NOT_IN_CATALOGUE
    if not seat.model.ready:
        return Block.MODEL_NOT_READY
    if seat.used >= seat.model.slots:
        return Block.NO_FREE_SLOT
    return None


def refuses(seat: SeatView, node_id: str, terms: Terms, excluded: frozenset[str]) -> Block | None:
    """Why a free seat cannot serve this job. An empty list of modalities or a context of 0 means that the node did not say."""
    if node_id in excluded:
        return Block.NODE_EXCLUDED
    model = seat.model
    if model.modalities and terms.modality not in model.modalities:
        return Block.MODALITY_UNSUPPORTED
    if terms.features and not terms.features <= model.features:
        return Block.FEATURE_UNSUPPORTED
    # Prompt alone: output is capped by what the context leaves, and the estimate of the prompt is an upper bound already.
    if model.context_tokens and terms.input_tokens_estimate >= model.context_tokens:
        return Block.CONTEXT_TOO_SMALL
    return None
