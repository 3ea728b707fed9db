"""Models and prices as this router knows them: copies of the registry's catalogue and metering's price list."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from gpumesh_runtime.error_types import NotFound, Unavailable
from gpumesh_runtime.reasons import Reason

_NEAR_NAMES: Final = 3


@dataclass(frozen=True, slots=True)
class Model:
    """A catalogue entry, as far as admission needs it. Tokens in tokens; modalities and features by wire number."""

    model_id: str
    revision: str
    context_tokens: int
    max_output_tokens: int  # 0: what the context leaves
    aliases: tuple[str, ...] = ()
    modalities: frozenset[int] = frozenset()
    features: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-USD per 1,000,000 tokens. cached_input None: as input."""

    version: int
    input_nano_usd_per_mtok: int
    output_nano_usd_per_mtok: int
    cached_input_nano_usd_per_mtok: int | None = None

    def hold_nano_usd(self, input_tokens: int, output_tokens: int) -> int:
        """What a job may cost at most, rounded up, nano-USD."""
        cost = input_tokens * self.input_nano_usd_per_mtok + output_tokens * self.output_nano_usd_per_mtok
        return -(-cost // 1_000_000)


@dataclass(slots=True)
class Catalogue:
    """Copies, replaced whole. `version` grows with each change, so that readers know when to send theirs on."""

    version: int = 0
    ready: bool = False
    _by_name: dict[str, Model] = field(default_factory=dict)
    _models: dict[str, Model] = field(default_factory=dict)
    _prices: dict[str, Price] = field(default_factory=dict)

    def replace_models(self, models: Iterable[Model]) -> None:
        """Takes a whole new catalogue."""
        self._models = {model.model_id: model for model in models}
        self._by_name = {alias: model for model in self._models.values() for alias in model.aliases} | self._models
        self.ready = True
        self.version += 1

    def update_prices(self, prices: Mapping[str, Price], *, whole: bool) -> None:
        """Takes prices: all there are, or those that changed."""
        self._prices = dict(prices) if whole else {**self._prices, **prices}
        self.version += 1

    def resolve(self, name: str) -> Model:
        """The model that a request names, by id or alias.

        Raises NotFound(UNKNOWN_MODEL) with near names, Unavailable(REGISTRY_UNAVAILABLE) before the first catalogue came.
        """
        model = self._by_name.get(name)
        if model is not None:
            return model
        if not self.ready:
            raise Unavailable(
                Reason.REGISTRY_UNAVAILABLE,
                "The model catalogue is not loaded yet. Try again.",
                retry_after_s=1.0,
                retryable=True,
            )
        near = difflib.get_close_matches(name, self._by_name, n=_NEAR_NAMES, cutoff=0.5)
        hint = (
            f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else " GET /v1/models lists what there is."
        )
        shown = name if len(name) <= 128 else name[:125] + "..."
        raise NotFound(
            Reason.UNKNOWN_MODEL,
            f"The model {shown!r} does not exist.{hint}",
            metadata={"param": "model", "near": ",".join(near)},
        )

    def price(self, model_id: str) -> Price:
        """The model's price now. Raises Unavailable(PRICE_UNKNOWN)."""
        price = self._prices.get(model_id)
        if price is None:
            raise Unavailable(
                Reason.PRICE_UNKNOWN,
                f"The model {model_id!r} has no published price yet. Try again, or ask the operator to set one.",
                retry_after_s=1.0,
                retryable=True,
            )
        return price

    @property
    def prices(self) -> Mapping[str, Price]:
        """All prices by model id."""
        return self._prices
