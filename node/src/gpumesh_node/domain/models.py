"""What a node serves, as plain values."""

from dataclasses import dataclass, field, replace
from enum import IntEnum


class ModelState(IntEnum):
    """Whether a model answers. The numbers are those of gpumesh.node.v1.ModelState (a test compares them)."""

    LOADING = 1
    READY = 2
    DRAINING = 3
    FAILED = 4


class Modality(IntEnum):
    """Kinds of work that engines of this node do. The numbers are those of gpumesh.common.v1.Modality."""

    CHAT = 1


class Feature(IntEnum):
    """What a model can do beyond plain generation. The numbers are those of gpumesh.common.v1.Feature."""

    TOOLS = 1
    STRUCTURED = 2
    LOGPROBS = 3
    VISION = 4
    MULTIPLE_CHOICES = 5


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model on this node.

    model_id, revision: as in the catalogue. quantisation, engine_name, engine_version: how it is computed, empty where unknown.
    slots: jobs at once. context_tokens: per slot, 0 unknown.
    """

    model_id: str
    slots: int
    revision: str = ""
    quantisation: str = ""
    engine_name: str = ""
    engine_version: str = ""
    context_tokens: int = 0
    features: tuple[Feature, ...] = ()
    modalities: tuple[Modality, ...] = (Modality.CHAT,)
    state: ModelState = ModelState.LOADING
    kv_tokens: int = field(default=0)

    def with_state(self, state: ModelState) -> "ServedModel":
        """The same model in another state."""
        return self if state is self.state else replace(self, state=state)
