"""Admission at the rim: decides at once from the desk's copies, or fetches what is missing first.

One fetch per key or account at a time; whoever asks meanwhile waits for it.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Final, Protocol

from gpumesh.router.v1 import admission_service_pb2 as admission_pb2
from gpumesh_dispatch.request import JobRequest
from gpumesh_router.domain.admission import Ask, Desk, Fetch, Grant, Missing
from gpumesh_router.wire import admission_to_wire, ask_from_wire, grant_to_wire, ticket_to_wire
from gpumesh_runtime.clock import Clock
from gpumesh_runtime.error_types import InvalidArgument, MeshError, Unavailable
from gpumesh_runtime.errors import as_mesh_error
from gpumesh_runtime.link import new_id
from gpumesh_runtime.metrics import counter
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.sealing import KeyRing

Answer = Callable[[admission_pb2.Admission | MeshError], None]
_MAX_FETCHES: Final = 3  # key, balance, and one more when a cache was dropped between the two
_ID_BYTES: Final = 16
_OUTCOMES: Final = counter("gpumesh_router_admissions_total", "Admission requests by outcome", ("outcome",))
_STANDING: Final = counter("gpumesh_router_grants_total", "Standing grants given to callers").cell
_ADMITTED: Final = _OUTCOMES.labels("ADMITTED")
_DIGEST_BYTES: Final = 32


class Directory(Protocol):
    """Where missing copies come from. Both call back exactly once, with None or why not."""

    def fetch_key(self, key_id: str, digest: bytes, done: Callable[[MeshError | None], None]) -> None:
        """Asks the registry whom a key belongs to and stores the answer at the desk."""

    def fetch_balance(self, account_id: str, done: Callable[[MeshError | None], None]) -> None:
        """Asks metering what an account can spend and stores the answer at the desk."""


class Admissions:
    """Answers admission requests. `admit` never blocks: its callback comes in the same turn unless something must be fetched."""

    def __init__(
        self,
        desk: Desk,
        directory: Directory,
        ring: KeyRing,
        clock: Clock,
        *,
        submit_s: float,
        settle_s: float,
    ) -> None:
        self._desk = desk
        self._directory = directory
        self._ring = ring
        self._clock = clock
        self._submit_s = int(submit_s)
        self._settle_s = int(settle_s)

    def admit(self, wire: admission_pb2.AdmitRequest, answer: Answer) -> None:
        """Decides one request and calls `answer` exactly once, with the admission or why not."""
        if len(wire.job_id) != _ID_BYTES or len(wire.key_sha256) != _DIGEST_BYTES:
            answer(InvalidArgument(Reason.INVALID_ARGUMENT, "job_id takes 16 bytes and key_sha256 32."))
            return
        self._try(ask_from_wire(wire), answer, _MAX_FETCHES)

    def admit_here(self, request: JobRequest, attempt: int) -> None:
        """As gpumesh_dispatch.admit.Admitter: this process needs no grant, it has the desk itself."""

    def release(self, job_id: bytes, charge_nano_usd: int, still_held_nano_usd: int = 0) -> None:
        """The job, or the grant, is over for its caller. Repetition is harmless."""
        self._desk.balances.release(job_id, charge_nano_usd, still_held_nano_usd)

    async def authenticate(self, key_id: str, digest: bytes) -> str:
        """The account of a key, asking the registry if needed. Raises MeshError."""
        for _ in range(2):
            account_id = self._desk.identities.account_of(key_id, digest, self._clock.monotonic())
            if account_id is not None:
                return account_id
            fetched: asyncio.Future[MeshError | None] = asyncio.get_running_loop().create_future()
            self._directory.fetch_key(key_id, digest, functools.partial(_set_result, fetched))
            error = await fetched
            if error is not None:
                raise error
        raise Unavailable(Reason.REGISTRY_UNAVAILABLE, "The key could not be looked up. Try again.", retryable=True)

    def _try(self, ask: Ask, answer: Answer, fetches: int) -> None:
        try:
            outcome = self._desk.decide(ask, self._clock.monotonic())
            if isinstance(outcome, Grant):
                answer(self._granted(outcome))
                _ADMITTED.add()
                return
        except MeshError as err:
            self._refuse(err, answer)
            return
        except Exception as err:  # a bug of ours must answer this caller and not end the link of all
            self._refuse(as_mesh_error(err), answer)
            return
        self._fetch(ask, outcome, answer, fetches)

    def _fetch(self, ask: Ask, fetch: Fetch, answer: Answer, fetches: int) -> None:
        if fetches == 0:
            self._refuse(
                Unavailable(
                    Reason.ROUTER_UNAVAILABLE,
                    "The router is catching up. Try again.",
                    retry_after_s=1.0,
                    retryable=True,
                ),
                answer,
            )
            return
        done = functools.partial(self._fetched, ask, answer, fetches - 1)
        if fetch.missing is Missing.KEY:
            self._directory.fetch_key(ask.key_id, ask.key_sha256, done)
        else:
            self._directory.fetch_balance(fetch.account_id, done)

    def _fetched(self, ask: Ask, answer: Answer, fetches: int, error: MeshError | None) -> None:
        if error is not None:
            self._refuse(error, answer)
        else:
            self._try(ask, answer, fetches)

    def _granted(self, grant: Grant) -> admission_pb2.Admission:
        now_s = self._clock.now_ns() // 1_000_000_000
        admission = admission_to_wire(grant, ticket_to_wire(grant, now_s, self._submit_s, self._settle_s), self._ring)
        standing = self._desk.stand(grant, new_id(), self._clock.monotonic()) if grant.ask.accepts_grant else None
        if standing is not None:
            admission.grant.CopyFrom(grant_to_wire(standing, now_s, self._submit_s, self._settle_s, self._ring))
            _STANDING.add()
        return admission

    def _refuse(self, error: MeshError, answer: Answer) -> None:
        _OUTCOMES.labels(error.reason.value).add()
        answer(error)


def _set_result(future: "asyncio.Future[MeshError | None]", error: MeshError | None) -> None:
    if not future.done():
        future.set_result(error)
