"""Standing grants at the caller: who is admitted here, under what money, and what the router is told."""

import asyncio

import pytest

from gpumesh.common.v1.job_pb2 import Feature, Price, SealedTicket, Ticket
from gpumesh.router.v1.admission_service_pb2 import Admission, Grant
from gpumesh_dispatch.grants import Grants, key_of
from gpumesh_dispatch.request import Admitted, JobRequest
from gpumesh_runtime.sealing import KeyRing, create_file
from tests.support.links import virtual

PRICE = Price(version=3, input_nano_usd_per_mtok=1_000_000, output_nano_usd_per_mtok=2_000_000)
SHARED = Ticket(
    account_id="acct_a", model_id="tiny", price=PRICE, scheduler_id="s0", scheduler_boot_id="b", grant_id=b"g" * 16
)
KEY = key_of("tiny", b"k" * 32, 1)


def request(number: int = 1, **fields: object) -> JobRequest:
    """A job of the granted key and model: 10 prompt tokens, 20 of output, a hold of 50 nano-USD."""
    given: dict[str, object] = {
        "model": "tiny",
        "input_tokens": 10,
        "max_output_tokens": 20,
        "payload": b"{}",
        **fields,
    }
    return JobRequest(job_id=bytes([number]) * 16, key_id="k", key_sha256=b"k" * 32, streaming=False, **given)  # type: ignore[arg-type]  # kwargs of mixed types


class Desk:
    """A caller with one grant of `budget`, and what its router was told."""

    def __init__(self, ring: KeyRing, budget: int = 1_000, *, ready: bool = True) -> None:
        self.told: list[tuple[bytes, int, int]] = []
        self.grants = Grants(lambda: ready, lambda grant_id, charge, held: self.told.append((grant_id, charge, held)))
        self.ring = ring
        self.give(budget)

    def give(self, budget: int, grant_id: bytes = b"g" * 16) -> None:
        """An answer of the router with a grant."""
        key_id, secret = self.ring.grant(b"gpumesh-grant-v1", SHARED.SerializeToString())
        grant = Grant(
            grant_id=grant_id,
            key_id=key_id,
            body=SHARED.SerializeToString(),
            secret=secret,
            lifetime_ms=2000,
            budget_nano_usd=budget,
            features=[Feature.FEATURE_TOOLS],
            context_tokens=1000,
            max_output_tokens=500,
        )
        self.grants.take(
            KEY, Admission(grant=grant, model_id="tiny", scheduler_id="s0", price=PRICE, account_id="acct_a")
        )

    def admitted(self, number: int = 1, **fields: object) -> Admitted:
        """An admission made here, or the test fails."""
        admission = self.grants.admit(request(number, **fields), 1)
        assert admission is not None
        return admission


@pytest.fixture
def ring(tmp_path_factory: pytest.TempPathFactory) -> KeyRing:
    """A key ring."""
    path = tmp_path_factory.mktemp("ring") / "ring.json"
    create_file(path)
    return KeyRing(path)


def test_a_ticket_made_here_is_checked_like_a_routers_and_holds_both_parts(ring: KeyRing) -> None:
    async def main() -> None:
        admission = Desk(ring).admitted()
        sealed = SealedTicket.FromString(admission.ticket)
        assert ring.check(
            (b"gpumesh-grant-v1", sealed.grant), b"gpumesh-ticket-v1", sealed.key_id, sealed.body, sealed.mac
        )
        assert not ring.check(
            (b"gpumesh-grant-v1", sealed.grant + b"x"), b"gpumesh-ticket-v1", sealed.key_id, sealed.body, sealed.mac
        )
        assert not ring.check(None, b"gpumesh-ticket-v1", sealed.key_id, sealed.body, sealed.mac)
        ticket = Ticket.FromString(sealed.body + sealed.grant)
        assert (ticket.job_id, ticket.hold_nano_usd, ticket.max_output_tokens, ticket.attempt) == (
            b"\1" * 16,
            50,
            20,
            1,
        )
        assert (ticket.account_id, ticket.scheduler_boot_id, ticket.price.version) == ("acct_a", "b", 3)

    virtual(main())


def test_a_job_part_that_claims_another_account_does_not_get_it() -> None:
    forged = Ticket(job_id=b"j" * 16, account_id="acct_rich", price=Price(version=9, input_nano_usd_per_mtok=1))
    ticket = Ticket.FromString(forged.SerializeToString() + SHARED.SerializeToString())
    assert (ticket.account_id, ticket.price.version, ticket.price.input_nano_usd_per_mtok) == ("acct_a", 3, 1_000_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "other"},
        {"input_tokens": 1000},
        {"features": (Feature.FEATURE_VISION,)},
        {"max_output_tokens": 500, "choices": 2},
    ],
)
def test_what_the_grant_does_not_cover_is_asked_for(ring: KeyRing, fields: dict[str, object]) -> None:
    async def main() -> None:
        assert Desk(ring).grants.admit(request(1, **fields), 1) is None

    virtual(main())


def test_holds_never_add_up_to_more_than_the_budget_and_come_back_less_the_charge(ring: KeyRing) -> None:
    async def main() -> None:
        desk = Desk(ring, budget=120)
        desk.admitted(1)
        desk.admitted(2)
        assert desk.grants.admit(request(3), 1) is None
        assert desk.grants.release(b"\1" * 16, 25)
        assert desk.grants.admit(request(3), 1) is None  # 20 + 25 left, 50 needed
        assert desk.grants.release(b"\2" * 16, 10)
        desk.admitted(3)

    virtual(main())


def test_a_grant_ends_after_its_lifetime_and_the_router_hears_what_still_runs_and_then_the_rest(ring: KeyRing) -> None:
    async def main() -> None:
        desk = Desk(ring)
        desk.admitted(1)
        desk.admitted(2)
        desk.grants.release(b"\1" * 16, 30)
        await asyncio.sleep(2.1)
        assert desk.grants.admit(request(3), 1) is None
        assert desk.told == [(b"g" * 16, 30, 50)]
        desk.grants.release(b"\2" * 16, 40)
        assert desk.told == [(b"g" * 16, 30, 50), (b"g" * 16, 40, 0)]
        assert not desk.grants.release(b"\2" * 16, 40)

    virtual(main())


def test_one_request_in_half_a_life_asks_the_router_while_the_others_go_on(ring: KeyRing) -> None:
    async def main() -> None:
        desk = Desk(ring)
        await asyncio.sleep(1.1)
        assert desk.grants.admit(request(1), 1) is None
        desk.admitted(2)
        desk.give(1_000, b"h" * 16)
        assert desk.told == [(b"g" * 16, 0, 50)]
        desk.admitted(3)

    virtual(main())


def test_of_a_burst_only_one_request_asks_for_a_grant(ring: KeyRing) -> None:
    async def main() -> None:
        grants = Desk(ring).grants
        other = key_of("tiny", b"o" * 32, 1)
        assert [grants.wants(other) for _ in range(3)] == [True, False, False]
        assert grants.wants(KEY)
        grants.answered(other)
        assert grants.wants(other)

    virtual(main())


def test_without_a_router_a_grant_is_used_to_its_end(ring: KeyRing) -> None:
    async def main() -> None:
        desk = Desk(ring, ready=False)
        await asyncio.sleep(1.9)
        desk.admitted(1)

    virtual(main())


def test_a_second_attempt_asks_and_ends_the_grant(ring: KeyRing) -> None:
    async def main() -> None:
        desk = Desk(ring)
        assert desk.grants.admit(request(1), 2) is None
        assert desk.grants.admit(request(2), 1) is None
        assert desk.told == [(b"g" * 16, 0, 0)]

    virtual(main())
