"""What schedulers can take, as they say themselves, and which of them gets a job.

A job goes to the replica with the least outstanding tokens per slot; what this router sent since the replica's last
word is counted in, so that routers do not herd between two updates.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from gpumesh_runtime.error_types import Unavailable
from gpumesh_runtime.reasons import Reason

QUIET_S: Final = 3.0
"""A scheduler silent for this long counts as this many times as loaded: mechanisms.md 3."""
GONE_S: Final = 6.0
"""Silent for this long: not chosen."""
RECENT_S: Final = 30.0
"""A model whose last node left less than this ago is still queued for: nodes restart."""
_QUIET_PENALTY: Final = 4.0


@dataclass(frozen=True, slots=True)
class ModelCapacity:
    """What one scheduler can take of one model."""

    model_id: str
    nodes: int
    slots: int
    free_slots: int
    queued_jobs: int
    outstanding_tokens: int
    features: frozenset[int] = frozenset()  # of its nodes, the union


@dataclass(slots=True)
class Scheduler:
    """One replica. Times: monotonic seconds."""

    scheduler_id: str
    boot_id: str
    address: str
    heard: float
    draining: bool = False
    models: dict[str, ModelCapacity] = field(default_factory=dict)
    sent_tokens: dict[str, int] = field(default_factory=dict)  # since its last word
    served: dict[str, float] = field(default_factory=dict)  # when it last had nodes

    def load(self, model_id: str, now: float) -> float:
        """Outstanding tokens per slot; lower is better."""
        capacity = self.models.get(model_id)
        outstanding = (capacity.outstanding_tokens if capacity else 0) + self.sent_tokens.get(model_id, 0)
        load = outstanding / max(capacity.slots if capacity else 1, 1)
        return load * _QUIET_PENALTY + 1 if now - self.heard > QUIET_S else load


@dataclass(slots=True)
class CapacityTable:
    """All replicas that this router watches, by id."""

    schedulers: dict[str, Scheduler] = field(default_factory=dict)

    def up(self, scheduler_id: str, boot_id: str, address: str, now: float) -> None:
        """A replica answered: what an earlier boot of it said is void, but which models it served stays known."""
        earlier = self.schedulers.get(scheduler_id)
        served = earlier.served if earlier else {}
        self.schedulers[scheduler_id] = Scheduler(scheduler_id, boot_id, address, now, served=served)

    def down(self, scheduler_id: str) -> None:
        """The link to it broke."""
        scheduler = self.schedulers.get(scheduler_id)
        if scheduler is not None:
            scheduler.heard = float("-inf")

    def update(
        self, scheduler_id: str, capacities: Iterable[ModelCapacity], *, whole: bool, draining: bool, now: float
    ) -> None:
        """Takes its word."""
        scheduler = self.schedulers.get(scheduler_id)
        if scheduler is None:
            return
        fresh = {capacity.model_id: capacity for capacity in capacities}
        scheduler.models = fresh if whole else {**scheduler.models, **fresh}
        for model_id, capacity in fresh.items():
            scheduler.sent_tokens.pop(model_id, None)
            if capacity.nodes:
                scheduler.served[model_id] = now
        scheduler.draining = draining
        scheduler.heard = now

    def choose(
        self, model_id: str, tokens: int, excluded: Collection[str], now: float, features: frozenset[int] = frozenset()
    ) -> Scheduler:
        """The replica for a job of `tokens` (prompt + expected output); replicas in `excluded` only when there is no other.

        Raises Unavailable: SCHEDULER_UNAVAILABLE (none is connected), NO_CAPACITY (no node serves the model).
        """
        live = [s for s in self.schedulers.values() if not s.draining and now - s.heard < GONE_S]
        if not live:
            raise Unavailable(
                Reason.SCHEDULER_UNAVAILABLE,
                "No scheduler is reachable at the moment. Try again in a second.",
                retry_after_s=1.0,
                retryable=True,
            )
        serving = [s for s in live if (capacity := s.models.get(model_id)) is not None and capacity.nodes]
        if not serving:  # its nodes may be on their way back, perhaps to another replica than before
            recent = any(now - s.served.get(model_id, float("-inf")) < RECENT_S for s in self.schedulers.values())
            serving = live if recent else []
        if not serving:
            raise Unavailable(
                Reason.NO_CAPACITY,
                f"No node serves the model {model_id!r} at the moment. Try again later, or another model.",
                retry_after_s=10.0,
            )
        if features:
            able = [s for s in serving if (capacity := s.models.get(model_id)) is None or features <= capacity.features]
            if not able:
                raise Unavailable(
                    Reason.NO_CAPACITY,
                    f"No node that serves the model {model_id!r} at the moment can do everything that this request asks for.",
                    retry_after_s=10.0,
                )
            serving = able
        candidates = [s for s in serving if s.scheduler_id not in excluded] or serving
        chosen = candidates[0] if len(candidates) == 1 else min(candidates, key=lambda s: s.load(model_id, now))
        chosen.sent_tokens[model_id] = chosen.sent_tokens.get(model_id, 0) + tokens
        return chosen
