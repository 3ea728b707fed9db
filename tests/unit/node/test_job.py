"""The job machine, the outbox and the decision to take an offer."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpumesh.common.v1 import job_pb2, link_pb2
from gpumesh.node.v1 import session_pb2
from gpumesh_node.domain import job as job_module
from gpumesh_node.domain.deltas import FinishReason, Usage
from gpumesh_node.domain.job import Job, JobError, JobState, Offer, Outcome, spread
from gpumesh_node.domain.models import Feature, Modality, ModelState, ServedModel
from gpumesh_node.domain.offers import covers, refusal
from gpumesh_node.domain.outbox import Outbox, frame_cost
from gpumesh_runtime.reasons import Reason

OFFER = Offer(
    job_id=b"j" * 16,
    fence=65537,
    model_id="m",
    modality=1,
    max_output_tokens=10,
    deadline_s=0,
    streaming=True,
    traceparent="",
    receipt_token=b"token",
    payload_bytes=0,
    payload=b"{}",
    window_bytes=0,
    resumes=False,
)
MODEL = ServedModel("m", 2, state=ModelState.READY)


def test_our_numbers_are_the_wires() -> None:
    assert {reason.value: reason.name for reason in FinishReason if reason} == {
        value: name.removeprefix("FINISH_REASON_") for name, value in session_pb2.FinishReason.items() if value
    }
    assert {state.value: state.name for state in ModelState} == {
        value: name.removeprefix("MODEL_STATE_") for name, value in session_pb2.ModelState.items() if value
    }
    assert {feature.value: feature.name for feature in Feature} == {
        value: name.removeprefix("FEATURE_") for name, value in job_pb2.Feature.items() if value
    }
    assert Modality.CHAT.value == job_pb2.MODALITY_CHAT
    assert Outcome.COMPLETED.value == job_pb2.JOB_OUTCOME_COMPLETED
    assert Outcome.CANCELLED.value == job_pb2.JOB_OUTCOME_CANCELLED
    flags = link_pb2.ItemFlag
    assert (job_module.FLAG_FIRST, job_module.FLAG_LAST, job_module.FLAG_CONTENT) == (
        flags.ITEM_FLAG_FIRST,
        flags.ITEM_FLAG_LAST,
        flags.ITEM_FLAG_CONTENT,
    )


def test_a_job_runs_from_offer_to_receipt() -> None:
    job = Job(OFFER, 100.0)
    assert job.state is JobState.WAITING
    assert job.start() == b"{}"
    assert job.payload == b""
    assert job.frame(1, 101.0, content=True) == (1, 1, job_module.FLAG_FIRST | job_module.FLAG_CONTENT)
    assert job.frame(4, 102.0, content=True) == (2, 4, job_module.FLAG_CONTENT)
    assert job.frame(3, 103.0, content=False) == (3, 4, 0)
    receipt = job.done(Usage(5, 6))
    assert (receipt.outcome, receipt.token, receipt.usage) == (Outcome.COMPLETED, b"token", Usage(5, 6))
    assert (job.tokens, job.ended, job.first_output_at) == (6, True, 101.0)


@given(st.binary(min_size=1, max_size=200), st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_pieces_are_put_together(payload: bytes, sizes: list[int]) -> None:
    job = Job(replace(OFFER, payload=b"", payload_bytes=len(payload)), 0)
    at = number = 0
    while at < len(payload):
        size = sizes[number % len(sizes)]
        number += 1
        at += size
        assert job.piece(number, payload[at - size : at], last=at >= len(payload)) is (at >= len(payload))
    assert job.start() == payload


@pytest.mark.parametrize(
    "pieces",
    [
        [(2, b"12345", True)],
        [(1, b"123456", True)],
        [(1, b"1234", True)],
        [(1, b"12", False), (1, b"345", True)],
        [(1, b"12345", True), (2, b"", True)],
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces: list[tuple[int, bytes, bool]]) -> None:
    job = Job(replace(OFFER, payload=b"", payload_bytes=5), 0)
    *good, (seq, data, last) = pieces
    for number, piece, end in good:
        job.piece(number, piece, last=end)
    with pytest.raises(JobError):
        job.piece(seq, data, last=last)


def test_only_a_job_that_ran_claims_something_when_it_is_cancelled() -> None:
    waiting = Job(OFFER, 0)
    assert waiting.cancel(Usage()) is None
    running = Job(OFFER, 0)
    running.start()
    receipt = running.cancel(Usage(completion_tokens=2))
    assert receipt is not None
    assert receipt.outcome is Outcome.CANCELLED
    with pytest.raises(AssertionError):
        running.cancel(Usage())


def test_an_offer_does_not_show_its_payload() -> None:
    assert "{}" not in repr(OFFER)


@pytest.mark.parametrize(
    ("offer", "model", "taken", "problem", "reason"),
    [
        (OFFER, MODEL, 3, "", None),
        (OFFER, MODEL, 4, "", Reason.NO_CAPACITY),
        (OFFER, None, 0, "", Reason.MODEL_UNAVAILABLE),
        (OFFER, MODEL, 0, "its disk is full", Reason.RESOURCE_EXHAUSTED),
        (OFFER, MODEL.with_state(ModelState.DRAINING), 0, "", Reason.NODE_DRAINING),
        (OFFER, MODEL.with_state(ModelState.LOADING), 0, "", Reason.ENGINE_UNAVAILABLE),
        (OFFER, MODEL.with_state(ModelState.FAILED), 0, "", Reason.ENGINE_UNAVAILABLE),
        (replace(OFFER, modality=3), MODEL, 0, "", Reason.FEATURE_UNSUPPORTED),
        (replace(OFFER, resumes=True), MODEL, 0, "", Reason.FEATURE_UNSUPPORTED),
        (replace(OFFER, max_output_tokens=0), MODEL, 0, "", Reason.INVALID_ARGUMENT),
        (replace(OFFER, job_id=b"short"), MODEL, 0, "", Reason.INVALID_ARGUMENT),
        (replace(OFFER, payload=b""), MODEL, 0, "", Reason.INVALID_ARGUMENT),
        (replace(OFFER, payload=b"", payload_bytes=1 << 30), MODEL, 0, "", Reason.PAYLOAD_TOO_LARGE),
    ],
)
def test_an_offer_is_taken_or_refused_for_one_reason(
    offer: Offer, model: ServedModel | None, taken: int, problem: str, reason: Reason | None
) -> None:
    refused = refusal(offer, model, taken, problem)
    assert (refused[0] if refused else None) is reason


def test_a_cancel_means_the_job_the_attempt_or_the_try() -> None:
    assert covers(0, 65537)
    assert covers(65537, 65537)
    assert covers(65536, 65537)
    assert not covers(65538, 65537)
    assert not covers(2 * 65536, 65537)


@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=80), st.integers(1000, 20_000))
def test_an_outbox_never_holds_more_than_its_limit_and_one_frame_always_passes(
    steps: list[tuple[int, bool]], limit: int
) -> None:
    outbox: Outbox[int] = Outbox(limit)
    seq = consumed = 0
    for cost, consume in steps:
        if outbox.has_room(cost):
            seq += 1
            outbox.sent(seq, cost, seq)
        else:
            assert outbox.pending()
        if consume and consumed < seq:
            consumed += 1
            outbox.on_window(consumed, 0)
            outbox.on_window(consumed - 1, 0)
        assert outbox.under_way <= limit or len(outbox.pending()) == 1
        assert outbox.pending() == list(range(consumed + 1, seq + 1))
    outbox.on_window(seq, 5)
    assert (outbox.under_way, outbox.limit) == (0, 5)


def test_a_frame_costs_at_least_what_relays_count() -> None:
    assert frame_cost(100, 0) == frame_cost(100, 1) == 356
    assert frame_cost(100, 10) == 2660


def test_tokens_of_a_cut_frame_are_spread_over_its_parts() -> None:
    assert spread(10, 20, [5]) == [20]
    assert spread(10, 20, [100, 100, 200]) == [12, 15, 20]
    assert spread(7, 7, [1, 1]) == [7, 7]
