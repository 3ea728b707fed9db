"""The catalogue as HTTP shows it: OpenAI's model objects, made once per catalogue, and fingerprints."""

import hashlib
from typing import Final

import msgspec

from gpumesh.common.v1.job_pb2 import Model
from gpumesh_dispatch.models import Models
from gpumesh_runtime.errors import MeshError, NotFound, Reason

_encode: Final = msgspec.json.Encoder().encode


class ShownModels:
    """Bodies of /v1/models and /v1/models/{id}, and system_fingerprint by model."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._version = -1
        self._list = b""
        self._one: dict[str, bytes] = {}
        self._fingerprints: dict[str, str] = {}

    def list_body(self) -> bytes:
        """Every model, sorted by id."""
        self._refresh()
        return self._list

    def one_body(self, name: str) -> bytes:
        """One model, by id or alias. Raises NotFound (UNKNOWN_MODEL)."""
        self._refresh()
        model = self.models.find(name)
        if model is None:
            raise unknown_model(self.models, name)
        return self._one[model.model_id]

    def fingerprint(self, model_id: str) -> str:
        """ "fp_" and 10 hex digits that change with the model's revision; "" when unknown."""
        self._refresh()
        return self._fingerprints.get(model_id, "")

    def _refresh(self) -> None:
        if self._version == self.models.version:
            return
        self._version = self.models.version
        shown = {model_id: _shown(model) for model_id, model in sorted(self.models.by_id.items())}
        self._one = {model_id: _encode(body) for model_id, body in shown.items()}
        self._list = _encode({"object": "list", "data": list(shown.values())})
        self._fingerprints = {model_id: _fingerprint(model) for model_id, model in self.models.by_id.items()}


def _shown(model: Model) -> dict[str, object]:
    return {
        "id": model.model_id,
        "object": "model",
        "created": model.create_time.seconds,
        "owned_by": model.owner or "gpumesh",
    }


def _fingerprint(model: Model) -> str:
    return "fp_" + hashlib.sha256(f"{model.model_id}@{model.revision}".encode()).hexdigest()[:10]


def unknown_model(models: Models, name: str) -> MeshError:
    """UNKNOWN_MODEL, with names like it."""
    near = ", ".join(models.near(name))
    hint = f" Similar names: {near}." if near else " GET /v1/models lists what there is."
    return NotFound(
        Reason.UNKNOWN_MODEL,
        f"The model '{name[:128]}' does not exist.{hint}",
        metadata={"param": "model", "near": near},
    )
