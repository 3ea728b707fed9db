"""Tickets under a grant: what the router said counts, whatever the caller writes into its own part."""

from pathlib import Path

import pytest

from gpumesh.common.v1.job_pb2 import SealedTicket, Ticket
from gpumesh_runtime.error_types import PermissionDenied
from gpumesh_runtime.sealing import KeyRing, Mac, create_file
from gpumesh_scheduler.seals import Seals

TICKET, GRANT = b"gpumesh-ticket-v1", b"gpumesh-grant-v1"
ROUTER = {"account_id": "acct_1", "key_id": "k", "model_id": "m", "scheduler_id": "s1", "scheduler_boot_id": "b"}
JOB = bytes(range(16))


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    create_file(tmp_path / "ring.json")
    return KeyRing(tmp_path / "ring.json")


def under(ring: KeyRing, grant: Ticket, own: Ticket) -> bytes:
    """A ticket that a caller makes under a grant."""
    said, body = grant.SerializeToString(), own.SerializeToString()
    key_id, secret = ring.grant(GRANT, said)
    return SealedTicket(key_id=key_id, body=body, mac=Mac(secret)(TICKET + body), grant=said).SerializeToString()


@pytest.mark.parametrize("again", [1, 2, 3])
def test_a_caller_changes_nothing_that_the_router_said(ring: KeyRing, again: int) -> None:
    seals = Seals(ring)
    grant = Ticket(**ROUTER)  # type: ignore[arg-type]  # names and texts
    grant.submit_by_time.seconds = 100
    for _ in range(again):
        own = Ticket(
            job_id=JOB, attempt=1, max_output_tokens=7, model_id="dear", scheduler_id="s2", scheduler_boot_id="x"
        )
        own.submit_by_time.seconds = 10_000
        ticket = seals.open_ticket(under(ring, grant, own))
        assert (ticket.job_id, ticket.attempt, ticket.max_output_tokens) == (JOB, 1, 7)
        assert (ticket.model, ticket.scheduler_id, ticket.scheduler_boot_id) == (("m", ""), "s1", "b")
        assert ticket.submit_by_ns == 100 * 10**9


def test_a_grant_that_caps_its_jobs_is_obeyed(ring: KeyRing) -> None:
    seals = Seals(ring)
    grant = Ticket(**ROUTER, max_output_tokens=5)  # type: ignore[arg-type]  # names and texts
    for _ in range(2):
        ticket = seals.open_ticket(under(ring, grant, Ticket(job_id=JOB, attempt=1, max_output_tokens=500)))
        assert ticket.max_output_tokens == 5


def test_a_known_grant_does_not_open_a_ticket_with_another_seal(ring: KeyRing) -> None:
    seals = Seals(ring)
    grant = Ticket(**ROUTER)  # type: ignore[arg-type]  # names and texts
    good = under(ring, grant, Ticket(job_id=JOB, attempt=1))
    seals.open_ticket(good)
    bad = SealedTicket.FromString(good)
    bad.body = Ticket(job_id=JOB, attempt=2).SerializeToString()
    with pytest.raises(PermissionDenied):
        seals.open_ticket(bad.SerializeToString())
