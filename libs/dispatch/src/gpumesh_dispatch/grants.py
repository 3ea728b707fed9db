"""Standing grants: leave from a router to admit like jobs here, for two seconds and up to a sum (docs/decisions/0005).

A grant covers one API key, one model and one kind of work, at the scheduler and the price that the router chose. Each job under it gets a
ticket that says only what is the job's own, sealed with the grant's secret; scheduler and metering check it as they check a router's.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from gpumesh.common.v1.job_pb2 import Price, SealedTicket, Ticket
from gpumesh.router.v1.admission_service_pb2 import Admission, Grant
from gpumesh_dispatch.request import Admitted, JobRequest
from gpumesh_runtime.metrics import counter
from gpumesh_runtime.sealing import Mac

TICKET_CONTEXT: Final = b"gpumesh-ticket-v1"
_TOKENS: Final = 1_000_000
_USED: Final = counter("gpumesh_dispatch_granted_jobs_total", "Jobs admitted here, under a router's grant").cell

_Key = tuple[bytes, str, int]


# Tells the router that gave a grant: its id, charges since the last word, and what running jobs still hold under it.
ReleaseGrant = Callable[[bytes, int, int], None]


class LocalAdmission:
    """An admission under a grant; reads like gpumesh.router.v1.Admission."""

    __slots__ = (
        "account_id",
        "hold_nano_usd",
        "max_output_tokens",
        "model_id",
        "price",
        "scheduler_address",
        "scheduler_id",
        "ticket",
    )

    def __init__(self, like: Admission, price: Price, ticket: bytes, hold: int, output: int) -> None:
        self.ticket = ticket
        self.scheduler_id = like.scheduler_id
        self.scheduler_address = like.scheduler_address
        self.model_id = like.model_id
        self.max_output_tokens = output
        self.price = price
        self.account_id = like.account_id
        self.hold_nano_usd = hold


class _Live:
    """One grant. Money in nano-USD, times in loop seconds."""

    __slots__ = (
        "charged",
        "context_tokens",
        "expires",
        "features",
        "grant_id",
        "held",
        "input_price",
        "left",
        "like",
        "mac",
        "output_cap",
        "output_price",
        "price",
        "renew_at",
        "retired",
        "tail",
    )

    def __init__(self, like: Admission, grant: Grant, now: float) -> None:
        self.like = like
        self.price = like.price
        self.input_price = like.price.input_nano_usd_per_mtok
        self.output_price = like.price.output_nano_usd_per_mtok
        self.grant_id = grant.grant_id
        self.mac = Mac(grant.secret)
        # Encodings of parts, one after the other, are the encoding of the whole.
        self.tail = SealedTicket(key_id=grant.key_id, grant=grant.body).SerializeToString()
        self.features = frozenset(grant.features)
        self.context_tokens = grant.context_tokens
        self.output_cap = grant.max_output_tokens
        self.left = grant.budget_nano_usd
        self.held = 0
        self.charged = 0
        self.expires = now + grant.lifetime_ms / 1000
        self.renew_at = now + grant.lifetime_ms / 2000
        self.retired = False

    def ticket(self, request: JobRequest, hold: int, output: int) -> bytes:
        """A sealed ticket for one job."""
        body = Ticket(
            job_id=request.job_id,
            hold_nano_usd=hold,
            max_output_tokens=output,
            input_tokens_estimate=request.input_tokens,
            service_class=request.service_class,
            features=request.features,
            modality=request.modality,
            attempt=1,
            choices=request.choices,
        ).SerializeToString()
        return SealedTicket(body=body, mac=self.mac(TICKET_CONTEXT + body)).SerializeToString() + self.tail


class Grants:
    """Grants of one router. Not thread-safe. `ready` says whether that router can be asked at all."""

    def __init__(self, ready: Callable[[], bool], release: ReleaseGrant) -> None:
        self._ready = ready
        self._release = release
        self._live: dict[_Key, _Live] = {}
        self._jobs: dict[bytes, tuple[_Live, int]] = {}
        self._asked: set[_Key] = set()
        self._loop = asyncio.get_running_loop()

    def admit(self, request: JobRequest, attempt: int) -> Admitted | None:
        """Admits a job here; None: ask the router. It is asked for every further attempt, and once in half a grant's life."""
        key = (request.key_sha256, request.model, request.modality)
        live = self._live.get(key)
        if live is None:
            return None
        now = self._loop.time()
        if attempt != 1 or now >= live.expires:
            self._retire(key, live)
            return None
        if now >= live.renew_at and self._ready():
            live.renew_at = live.expires  # this one asks; the others go on meanwhile
            return None
        asked = request.max_output_tokens
        output = (live.output_cap if asked is None else max(1, min(asked, live.output_cap))) * request.choices
        hold = -(-(request.input_tokens * live.input_price + output * live.output_price) // _TOKENS)
        if (
            hold > live.left
            or request.input_tokens >= live.context_tokens
            or (request.features and not live.features.issuperset(request.features))
        ):
            return None  # the router says why not, or finds the money
        live.left -= hold
        live.held += hold
        self._jobs[request.job_id] = (live, hold)
        _USED.value += 1
        return LocalAdmission(live.like, live.price, live.ticket(request, hold, output), hold, output)

    def wants(self, key: _Key) -> bool:
        """Whether a request that is about to ask should ask for a grant too: one at a time, or a burst would reserve the account away."""
        if key in self._asked:
            return False
        self._asked.add(key)
        return True

    def answered(self, key: _Key) -> None:
        """The request that asked for a grant was answered, with one or without."""
        self._asked.discard(key)

    def take(self, request_key: _Key, admission: Admission) -> None:
        """Stores the grant that came with an admission; it replaces the one before."""
        earlier = self._live.get(request_key)
        if earlier is not None:
            self._retire(request_key, earlier)
        live = _Live(admission, admission.grant, self._loop.time())
        self._live[request_key] = live
        self._loop.call_at(live.expires, self._expire, request_key, live)

    def release(self, job_id: bytes, charge_nano_usd: int) -> bool:
        """A job is over; False when it was not admitted here."""
        known = self._jobs.pop(job_id, None)
        if known is None:
            return False
        live, hold = known
        charge = min(max(charge_nano_usd, 0), hold)
        live.held -= hold
        live.left += hold - charge
        live.charged += charge
        if live.retired and live.held == 0:
            self._tell(live)
        return True

    def _expire(self, key: _Key, live: _Live) -> None:
        if self._live.get(key) is live:
            self._retire(key, live)

    def _retire(self, key: _Key, live: _Live) -> None:
        del self._live[key]
        live.retired = True
        self._tell(live)

    def _tell(self, live: _Live) -> None:
        charged, live.charged = live.charged, 0
        self._release(live.grant_id, charged, live.held)


def key_of(model: str, key_sha256: bytes, modality: int) -> _Key:
    """What a grant is kept under."""
    return (key_sha256, model, modality)
