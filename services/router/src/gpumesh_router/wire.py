"""Wire messages to the router's nouns and back: total, pure."""

from collections.abc import Mapping
from math import ceil
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from gpumesh.common.v1 import job_pb2
from gpumesh.router.v1 import admission_service_pb2 as admission_pb2
from gpumesh.scheduler.v1 import capacity_service_pb2 as capacity_pb2
from gpumesh_router.domain.admission import GRANT_S, Ask, Grant, StandingGrant
from gpumesh_router.domain.capacity import ModelCapacity
from gpumesh_router.domain.catalogue import Model, Price
from gpumesh_runtime.sealing import KeyRing

TICKET_CONTEXT: Final = b"gpumesh-ticket-v1"
GRANT_CONTEXT: Final = b"gpumesh-grant-v1"
_DEFAULT_DEADLINE_S: Final = 600.0


def ask_from_wire(wire: admission_pb2.AdmitRequest) -> Ask:
    """An admission request as the desk reads it."""
    return Ask(
        job_id=wire.job_id,
        key_id=wire.key_id,
        key_sha256=wire.key_sha256,
        model=wire.model,
        modality=wire.modality,
        features=frozenset(wire.features),
        input_tokens=max(wire.input_tokens_estimate, 0),
        max_output_tokens=wire.max_output_tokens if wire.HasField("max_output_tokens") else None,
        choices=wire.choices or 1,
        attempt=wire.attempt or 1,
        deadline_s=wire.deadline_ms / 1000 if wire.deadline_ms else _DEFAULT_DEADLINE_S,
        service_class=wire.service_class,
        excluded=tuple(wire.excluded_scheduler_ids),
        accepts_grant=wire.accepts_grant,
    )


def price_to_wire(price: Price) -> job_pb2.Price:
    """A price."""
    return job_pb2.Price(
        version=price.version,
        input_nano_usd_per_mtok=price.input_nano_usd_per_mtok,
        output_nano_usd_per_mtok=price.output_nano_usd_per_mtok,
        cached_input_nano_usd_per_mtok=price.cached_input_nano_usd_per_mtok,
    )


def price_from_wire(wire: job_pb2.Price) -> Price:
    """A price."""
    return Price(
        version=wire.version,
        input_nano_usd_per_mtok=wire.input_nano_usd_per_mtok,
        output_nano_usd_per_mtok=wire.output_nano_usd_per_mtok,
        cached_input_nano_usd_per_mtok=(
            wire.cached_input_nano_usd_per_mtok if wire.HasField("cached_input_nano_usd_per_mtok") else None
        ),
    )


def prices_from_wire(wire: Mapping[str, job_pb2.Price]) -> dict[str, Price]:
    """A price list."""
    return {model_id: price_from_wire(price) for model_id, price in wire.items()}


def model_from_wire(wire: job_pb2.Model) -> Model:
    """A catalogue entry."""
    return Model(
        model_id=wire.model_id,
        revision=wire.revision,
        context_tokens=wire.context_tokens,
        max_output_tokens=wire.max_output_tokens,
        aliases=tuple(wire.aliases),
        modalities=frozenset(wire.modalities),
        features=frozenset(wire.features),
    )


def capacity_from_wire(wire: capacity_pb2.ModelCapacity) -> ModelCapacity:
    """What a scheduler can take of a model."""
    return ModelCapacity(
        model_id=wire.model_id,
        nodes=wire.nodes,
        slots=wire.slots,
        free_slots=wire.free_slots,
        queued_jobs=wire.queued_jobs,
        outstanding_tokens=wire.outstanding_tokens,
        features=frozenset(wire.features),
    )


def ticket_to_wire(grant: Grant, now_s: int, submit_s: int, settle_s: int) -> job_pb2.Ticket:
    """The ticket of an admission. `now_s`: wall time, Unix seconds; the two periods in seconds."""
    ask, model, scheduler = grant.ask, grant.model, grant.scheduler
    return job_pb2.Ticket(
        job_id=ask.job_id,
        account_id=grant.account_id,
        key_id=ask.key_id,
        model_id=model.model_id,
        model_revision=model.revision,
        price=price_to_wire(grant.price),
        hold_nano_usd=grant.hold_nano_usd,
        scheduler_id=scheduler.scheduler_id,
        scheduler_boot_id=scheduler.boot_id,
        submit_by_time=Timestamp(seconds=now_s + submit_s),
        settle_by_time=Timestamp(seconds=now_s + settle_s),
        max_output_tokens=grant.max_output_tokens,
        input_tokens_estimate=ask.input_tokens,
        service_class=ask.service_class,  # type: ignore[arg-type]  # an enum travels as its number
        features=ask.features,  # type: ignore[arg-type]  # likewise
        modality=ask.modality,  # type: ignore[arg-type]  # likewise
        attempt=ask.attempt,
        choices=ask.choices,
    )


def grant_to_wire(
    granted: StandingGrant, now_s: int, submit_s: int, settle_s: int, ring: KeyRing
) -> admission_pb2.Grant:
    """A standing grant with the secret of its tickets. Their times all count from its issue."""
    first, model = granted.first, granted.first.model
    shared = job_pb2.Ticket(
        account_id=first.account_id,
        key_id=first.ask.key_id,
        model_id=model.model_id,
        model_revision=model.revision,
        price=price_to_wire(first.price),
        scheduler_id=first.scheduler.scheduler_id,
        scheduler_boot_id=first.scheduler.boot_id,
        submit_by_time=Timestamp(seconds=now_s + ceil(GRANT_S) + submit_s),
        settle_by_time=Timestamp(seconds=now_s + settle_s),
        grant_id=granted.grant_id,
    )
    body = shared.SerializeToString()
    key_id, secret = ring.grant(GRANT_CONTEXT, body)
    return admission_pb2.Grant(
        grant_id=granted.grant_id,
        key_id=key_id,
        body=body,
        secret=secret,
        lifetime_ms=int(GRANT_S * 1000),
        budget_nano_usd=granted.budget_nano_usd,
        features=granted.features,  # type: ignore[arg-type]  # enums travel as their numbers
        context_tokens=model.context_tokens,
        max_output_tokens=model.max_output_tokens or model.context_tokens,
    )


def admission_to_wire(grant: Grant, ticket: job_pb2.Ticket, ring: KeyRing) -> admission_pb2.Admission:
    """The answer to the caller, with the ticket sealed."""
    body = ticket.SerializeToString()
    key_id, mac = ring.seal(TICKET_CONTEXT, body)
    return admission_pb2.Admission(
        ticket=job_pb2.SealedTicket(key_id=key_id, body=body, mac=mac).SerializeToString(),
        scheduler_id=grant.scheduler.scheduler_id,
        scheduler_address=grant.scheduler.address,
        model_id=grant.model.model_id,
        max_output_tokens=grant.max_output_tokens,
        price=ticket.price,
        account_id=grant.account_id,
        hold_nano_usd=grant.hold_nano_usd,
    )
