"""Wire messages and domain values: both ways, and within bounds."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpumesh.common.v1 import job_pb2
from gpumesh.metering.v1.settlement_service_pb2 import EvidenceSource, SegmentPay, Settle, Settled
from gpumesh.node.v1 import session_pb2
from gpumesh.scheduler.v1 import dispatch_service_pb2
from gpumesh_runtime.config import ConfigError
from gpumesh_runtime.error_types import InvalidArgument, PermissionDenied
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.sealing import KeyRing, create_file
from gpumesh_scheduler.config import SchedulerSettings, new_boot_id
from gpumesh_scheduler.domain.evidence import Bill, Segment
from gpumesh_scheduler.domain.nouns import Build, Limits, NodeBreachError, Outcome, Party, Usage
from gpumesh_scheduler.domain.tickets import Ticket
from gpumesh_scheduler.seals import Seals
from gpumesh_scheduler.wire import (
    delivered_from_wire,
    offer_to_wire,
    reason_from_wire,
    settle_to_wire,
    settled_from_wire,
    status_from_wire,
    terms_from_wire,
    usage_from_node,
)
from tests.unit.scheduler.books import Books, job_id

TICKET = Ticket(job_id(1), 1, ("m", "r"), "s1", "boot", 1_000, 2_000, 10, 20, 1, frozenset({2}))
BUILD = Build("m", "r", "F16", "mock", "1")
counts = st.integers(0, 10**6)


def test_terms_join_ticket_and_submit() -> None:
    submit = dispatch_service_pb2.Submit(
        ticket=b"sealed", streaming=True, deadline_ms=1500, window_bytes=1000, tries_used=1, excluded_node_ids=["n1"]
    )
    terms = terms_from_wire(job_id(1), submit, TICKET, Limits(), 10.0)
    assert (terms.model, terms.attempt, terms.ticket, terms.deadline_at) == (("m", "r"), 1, b"sealed", 11.5)
    assert (terms.window_bytes, terms.tries_used, terms.excluded, terms.cost) == (1000, 1, frozenset({"n1"}), 30)


def test_a_submit_without_deadline_or_window_gets_the_bounds() -> None:
    limits = Limits()
    terms = terms_from_wire(job_id(1), dispatch_service_pb2.Submit(), TICKET, limits, 10.0)
    assert (terms.deadline_at, terms.window_bytes) == (10.0 + limits.max_deadline_s, limits.default_window_bytes)
    large = dispatch_service_pb2.Submit(deadline_ms=2**32 - 1, window_bytes=2**60)
    terms = terms_from_wire(job_id(1), large, TICKET, limits, 10.0)
    assert (terms.deadline_at, terms.window_bytes) == (10.0 + limits.max_deadline_s, limits.max_window_bytes)


def test_an_offer_says_what_is_left_of_the_deadline_and_nothing_of_the_buyer() -> None:
    books = Books()
    books.node()
    job = books.submit(ticket=b"the buyer's ticket", prefix_token_ids=(5, 6), deadline_s=9.0)
    body = offer_to_wire(job, b"token", "00-trace", books.now + 2.0)
    offer = session_pb2.Offer.FromString(body)
    assert (offer.model_id, offer.payload, offer.receipt_token, offer.traceparent) == (
        "tiny",
        b"{}",
        b"token",
        "00-trace",
    )
    assert (offer.deadline_ms, offer.max_output_tokens, list(offer.prefix_token_ids)) == (7000, 10, [5, 6])
    assert b"buyer" not in body


def test_a_status_keeps_what_the_cores_need() -> None:
    status = status_from_wire(
        session_pb2.Status(
            models=[
                session_pb2.ServedModel(
                    build=job_pb2.ModelBuild(model_id="m", revision="r"),
                    slots=3,
                    context_tokens=100,
                    features=[job_pb2.FEATURE_TOOLS],
                    modalities=[job_pb2.MODALITY_CHAT],
                    state=session_pb2.MODEL_STATE_READY,
                ),
                session_pb2.ServedModel(build=job_pb2.ModelBuild(model_id="n"), state=session_pb2.MODEL_STATE_LOADING),
            ],
            running=[session_pb2.RunningJob(job_id=job_id(1), fence=7)],
            draining=True,
        )
    )
    ready, loading = status.models
    assert (ready.slots, ready.context_tokens, ready.features, ready.modalities, ready.ready) == (
        3,
        100,
        frozenset({1}),
        frozenset({1}),
        True,
    )
    assert not loading.ready
    assert (status.running, status.draining) == (frozenset({(job_id(1), 7)}), True)


@pytest.mark.parametrize(
    "status",
    [
        session_pb2.Status(running=[session_pb2.RunningJob(job_id=b"short")]),
        session_pb2.Status(running=[session_pb2.RunningJob(job_id=job_id(n)) for n in range(5000)]),
        session_pb2.Status(models=[session_pb2.ServedModel()]),
        session_pb2.Status(models=[session_pb2.ServedModel(build=job_pb2.ModelBuild(model_id="m"), context_tokens=-1)]),
    ],
)
def test_a_status_out_of_bounds_is_a_breach(status: session_pb2.Status) -> None:
    with pytest.raises(NodeBreachError):
        status_from_wire(status)


@given(st.builds(Usage, counts, counts, counts, counts), st.sampled_from(Outcome), st.booleans())
@settings(deadline=None)
def test_a_bill_arrives_as_it_was_written(usage: Usage, outcome: Outcome, from_caller: bool) -> None:
    party = Party("acme", "n1", BUILD)
    segments = (Segment(1, 0, 5, party), Segment(2, 5, 9, None))
    bill = Bill(job_id(1), b"ticket", outcome, segments, usage, {1: usage}, "WHY", False, from_caller)
    settle = Settle.FromString(settle_to_wire(bill))
    assert (settle.ticket, settle.outcome, settle.reason, settle.receipt_only) == (
        b"ticket",
        outcome.value,
        "WHY",
        False,
    )
    assert settle.source == (
        EvidenceSource.EVIDENCE_SOURCE_CALLER if from_caller else EvidenceSource.EVIDENCE_SOURCE_RELAY
    )
    assert _usage(settle.usage) == _usage(settle.node_counts[0].usage) == usage
    first, second = settle.segments
    assert (first.provider_id, first.node_id, first.build.quantisation) == ("acme", "n1", "F16")
    assert (second.provider_id, second.segment.start_token, second.segment.end_token) == ("", 5, 9)


def _usage(message: job_pb2.Usage) -> Usage:
    return usage_from_node(message)


def test_a_receipt_alone_has_no_outcome() -> None:
    settle = Settle.FromString(settle_to_wire(Bill(job_id(1), b"", None, (), Usage(), {}, "", True, False)))
    assert (settle.receipt_only, settle.outcome) == (True, job_pb2.JOB_OUTCOME_UNSPECIFIED)


def test_meterings_answer_is_charge_pays_and_reason() -> None:
    settled = Settled(reason="R", pays=[SegmentPay(fence=3, pay_nano_usd=7)])
    settled.charge.amount_nano_usd = 9
    assert settled_from_wire(settled) == (9, {3: 7}, "R")


@pytest.mark.parametrize(
    "fields",
    [
        {"ticket": b"t"},
        {"ticket": b"t", "outcome": 9},
        {"outcome": 1},
        {"ticket": b"t", "outcome": 1, "segments": [job_pb2.Segment()] * 17},
    ],
)
def test_a_delivered_record_that_is_none_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        delivered_from_wire(dispatch_service_pb2.Delivered(**fields))


def test_a_reason_that_this_build_does_not_know_has_a_fallback() -> None:
    assert reason_from_wire("ENGINE_ERROR", Reason.INTERNAL) is Reason.ENGINE_ERROR
    assert reason_from_wire("FROM_THE_FUTURE", Reason.ENGINE_ERROR) is Reason.ENGINE_ERROR


# ---- seals -------------------------------------------------------------------------------------------------------------------------


def seals(folder: Path) -> Seals:
    create_file(folder / "ring.json")
    return Seals(KeyRing(folder / "ring.json"))


def test_a_receipt_token_says_who_may_claim_what_until_when(tmp_path: Path) -> None:
    seal = seals(tmp_path)
    books = Books()
    books.node("n1")
    books.node("n2")
    for number in (1, 2):
        attempt = books.submit(number).current
        assert attempt is not None
        settle_by_ns = time.time_ns() + number * 10**9
        claim = seal.open_receipt(seal.receipt_token(attempt, settle_by_ns))
        assert claim is not None
        assert (claim.job_id, claim.fence, claim.party) == (job_id(number), attempt.fence, attempt.party)
        assert settle_by_ns - 10**9 < claim.settle_by_ns <= settle_by_ns


def test_a_token_of_another_ring_or_of_no_ring_is_nothing(tmp_path: Path) -> None:
    books = Books()
    books.node()
    attempt = books.submit().current
    assert attempt is not None
    (tmp_path / "other").mkdir()
    token = seals(tmp_path / "other").receipt_token(attempt, 1)
    seal = seals(tmp_path)
    assert seal.open_receipt(token) is None
    assert seal.open_receipt(b"\xff") is None
    with pytest.raises(PermissionDenied):
        seal.open_ticket(token)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_garbage_is_never_more_than_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "garbage"
    folder.mkdir(exist_ok=True)
    seal = seals(folder)
    assert seal.open_receipt(data) is None
    with pytest.raises(PermissionDenied):
        seal.open_ticket(data)


# ---- settings ------------------------------------------------------------------------------------------------------------------------


def test_settings_carry_their_times_to_cores_and_links(tmp_path: Path) -> None:
    read = SchedulerSettings.read(
        key_ring=tmp_path / "ring.json",
        metering_address="127.0.0.1:1",
        lost_s=3.0,
        suspect_s=2.0,
        tries=2,
        caller_wait_s=4.0,
    )
    assert (read.limits().lost_s, read.limits().tries, read.waits().caller_s) == (3.0, 2, 4.0)
    assert (read.node_link().lost_s, read.node_link().suspect_s) == (3.0, 2.0)


def test_a_misspelt_setting_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUMESH_SCHEDULER_LOOST_S", "3")
    with pytest.raises(ConfigError) as wrong:
        SchedulerSettings.read(key_ring=tmp_path / "ring.json", metering_address="127.0.0.1:1")
    assert "GPUMESH_SCHEDULER_LOST_S" in str(wrong.value)


def test_each_start_has_a_boot_of_its_own() -> None:
    assert new_boot_id() != new_boot_id()
