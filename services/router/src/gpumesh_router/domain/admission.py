"""Whether a job may run, and where: one decision over the router's copies."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from gpumesh_router.domain.balances import Balances
from gpumesh_router.domain.capacity import CapacityTable, Scheduler
from gpumesh_router.domain.catalogue import Catalogue, Model, Price
from gpumesh_router.domain.identities import Identities
from gpumesh_runtime.error_types import InvalidArgument
from gpumesh_runtime.reasons import Reason

MAX_CHOICES: Final = 128
GRANT_S: Final = 2.0
"""A standing grant admits jobs this long: a revoked key, a new price or a fuller scheduler counts within it (the promise is 5 s)."""
_GRANT_SHARE: Final = 8
_MOST_GRANTED_NANO_USD: Final = 1_000_000_000
_LEAST_GRANTED_JOBS: Final = 32
_EXPECTED_OUTPUT: Final = (
    256  # tokens assumed of an answer when load is compared; conversations average 129-350 (mechanisms.md 11)
)


@dataclass(frozen=True, slots=True)
class Ask:
    """An admission request. Modality and features by wire number, tokens in tokens, deadline in seconds from now."""

    job_id: bytes
    key_id: str
    key_sha256: bytes
    model: str
    modality: int
    features: frozenset[int]
    input_tokens: int
    max_output_tokens: int | None
    choices: int
    attempt: int
    deadline_s: float
    service_class: int = 0
    excluded: tuple[str, ...] = ()
    accepts_grant: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The job may run."""

    ask: Ask
    account_id: str
    model: Model
    price: Price
    hold_nano_usd: int
    max_output_tokens: int  # over all choices
    scheduler: Scheduler


@dataclass(frozen=True, slots=True)
class StandingGrant:
    """The caller may admit further jobs like `first` by itself, for GRANT_S and holds up to the budget."""

    grant_id: bytes
    first: Grant
    budget_nano_usd: int

    @property
    def features(self) -> frozenset[int]:
        """What jobs under it may need: what the model supports and the scheduler's nodes can do now."""
        capacity = self.first.scheduler.models.get(self.first.model.model_id)
        return self.first.model.features & capacity.features if capacity is not None else frozenset()


class Missing(Enum):
    """What must be fetched before the decision can be made."""

    KEY = auto()
    BALANCE = auto()


@dataclass(frozen=True, slots=True)
class Fetch:
    """Ask the registry or metering, then decide again."""

    missing: Missing
    account_id: str = ""


@dataclass(slots=True)
class Desk:
    """The router's copies and the decision over them. Not thread-safe; called from the event loop only."""

    catalogue: Catalogue = field(default_factory=Catalogue)
    identities: Identities = field(default_factory=Identities)
    balances: Balances = field(default_factory=Balances)
    capacity: CapacityTable = field(default_factory=CapacityTable)

    def decide(self, ask: Ask, now: float) -> Grant | Fetch:
        """Admits, or says what must be fetched first. `now`: monotonic seconds. Raises MeshError: refused, with the reason.

        The order is who, what, may it pay, where: a stranger learns nothing about models or load.
        """
        account_id = self.identities.account_of(ask.key_id, ask.key_sha256, now)
        if account_id is None:
            return Fetch(Missing.KEY)
        model = self.catalogue.resolve(ask.model)
        _check_fit(ask, model)
        price = self.catalogue.price(model.model_id)
        if not self.balances.knows(account_id, now):
            return Fetch(Missing.BALANCE, account_id)
        output = _output_cap(ask, model) * ask.choices
        tokens = ask.input_tokens + min(output, _EXPECTED_OUTPUT * ask.choices)
        scheduler = self.capacity.choose(model.model_id, tokens, ask.excluded, now, ask.features)
        hold = price.hold_nano_usd(ask.input_tokens, output)
        self.balances.hold(ask.job_id, account_id, hold, now + ask.deadline_s)
        return Grant(ask, account_id, model, price, hold, output, scheduler)

    def stand(self, grant: Grant, grant_id: bytes, now: float) -> StandingGrant | None:
        """A standing grant beside an admission, its budget reserved; None where the account is too near its end.

        An eighth of what is left, only when that covers many jobs, and only while half of the account is free: several callers may each
        hold one, and none may make another refuse what the account could pay.
        """
        spare = self.balances.spare(grant.account_id)
        budget = min(spare // _GRANT_SHARE, _MOST_GRANTED_NANO_USD)
        if budget < grant.hold_nano_usd * _LEAST_GRANTED_JOBS or spare * 2 < self.balances.available(grant.account_id):
            return None
        self.balances.hold(grant_id, grant.account_id, budget, now + GRANT_S + grant.ask.deadline_s)
        return StandingGrant(grant_id, grant, budget)


def _check_fit(ask: Ask, model: Model) -> None:
    """Refuses what the model cannot do. Raises InvalidArgument."""
    if not 1 <= ask.choices <= MAX_CHOICES:
        raise InvalidArgument(
            Reason.INVALID_ARGUMENT, f"n must be between 1 and {MAX_CHOICES}.", metadata={"param": "n"}
        )
    if ask.modality not in model.modalities:
        raise InvalidArgument(
            Reason.FEATURE_UNSUPPORTED,
            f"The model {model.model_id!r} does not do this kind of work.",
            metadata={"param": "model"},
        )
    if not ask.features <= model.features:
        raise InvalidArgument(
            Reason.FEATURE_UNSUPPORTED,
            f"The model {model.model_id!r} does not support everything that this request asks for.",
            metadata={"param": "model", "features": ",".join(str(f) for f in sorted(ask.features - model.features))},
        )
    if ask.input_tokens >= model.context_tokens:
        raise InvalidArgument(
            Reason.CONTEXT_LENGTH_EXCEEDED,
            f"This model's maximum context length is {model.context_tokens} tokens, but the prompt has {ask.input_tokens}. "
            "Shorten the prompt.",
            metadata={"param": "messages", "limit": str(model.context_tokens), "used": str(ask.input_tokens)},
        )


def _output_cap(ask: Ask, model: Model) -> int:
    """Most output tokens of one choice. Not lowered by the estimated prompt: the engine knows the real one and stops at the context."""
    cap = model.max_output_tokens or model.context_tokens
    return cap if ask.max_output_tokens is None else max(1, min(ask.max_output_tokens, cap))
