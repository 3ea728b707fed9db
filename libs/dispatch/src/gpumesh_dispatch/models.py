"""The model catalogue as a caller knows it: the router's last word, whole. Pure."""

import difflib
from collections.abc import Mapping
from typing import Final

from gpumesh.common.v1.job_pb2 import Model, Price
from gpumesh.router.v1.admission_service_pb2 import Catalogue

_NEAR: Final = 3


class Models:
    """Models by id and alias. `version` grows with each catalogue; `known` is False until the first."""

    def __init__(self) -> None:
        self.version = 0
        self.by_id: dict[str, Model] = {}
        self._by_name: dict[str, Model] = {}
        self._prices: dict[str, Price] = {}

    @property
    def known(self) -> bool:
        """Whether a router has said anything yet."""
        return self.version > 0

    @property
    def prices(self) -> Mapping[str, Price]:
        """By model id."""
        return self._prices

    def replace(self, catalogue: Catalogue) -> None:
        """Takes a catalogue."""
        self.by_id = {model.model_id: model for model in catalogue.models}
        aliases = {alias: model for model in catalogue.models for alias in model.aliases}
        self._by_name = {**aliases, **self.by_id}  # an id wins over another model's alias
        self._prices = dict(catalogue.prices)
        self.version += 1

    def find(self, name: str) -> Model | None:
        """By id or alias."""
        return self._by_name.get(name)

    def near(self, name: str) -> list[str]:
        """Names like it, the best first, at most three."""
        lowered = {known.lower(): known for known in self._by_name}
        return [lowered[match] for match in difflib.get_close_matches(name[:128].lower(), lowered, n=_NEAR, cutoff=0.5)]
