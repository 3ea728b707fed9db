"""Jobs through a real scheduler: nodes and callers over TLS, tries, cancels, windows, payloads."""

import asyncio

import pytest

from gpumesh.common.v1.link_pb2 import Cancel, Window
from gpumesh.metering.v1.settlement_service_pb2 import EvidenceSource
from gpumesh.node.v1.session_pb2 import ReceiptAck
from gpumesh.scheduler.v1.dispatch_service_pb2 import DeliveredAck
from gpumesh_runtime.link import FLAG_LAST, fence, new_id
from tests.support.scheduler_mesh import Mesh
from tests.support.scheduler_peers import (
    CANCEL,
    CANCELLED,
    COMPLETED,
    DELIVERED_ACK,
    DONE,
    ERROR,
    FAILED,
    FRAME,
    OFFER,
    PAYLOAD,
    RECEIPT_ACK,
    WINDOW,
)


async def test_a_job_is_offered_answered_relayed_and_settled(mesh: Mesh) -> None:
    node, caller = await mesh.node(serve=3), await mesh.caller()
    job_id = caller.submit(payload=b'{"messages": []}')
    done = await caller.item(DONE, job_id)
    offer = await node.item(OFFER, job_id)
    assert node.offers[job_id, fence(1, 1)].payload == b'{"messages": []}'
    assert offer.fence == done.fence == fence(1, 1)
    assert [frame.seq for frame in caller.of_kind(FRAME)] == [1, 2, 3]
    assert done.seq == 3
    caller.delivered(job_id, COMPLETED, 3)
    settle = await mesh.metering.settle(job_id)
    assert settle.outcome == COMPLETED
    assert settle.source == EvidenceSource.EVIDENCE_SOURCE_CALLER
    assert (settle.usage.prompt_tokens, settle.usage.completion_tokens) == (11, 3)
    assert [(paid.segment.end_token, paid.provider_id, paid.node_id) for paid in settle.segments] == [(3, "acme", "n1")]
    assert settle.node_counts[0].usage.completion_tokens == 3
    assert DeliveredAck.FromString((await caller.item(DELIVERED_ACK, job_id)).body).charge_nano_usd == 1000
    ack = ReceiptAck.FromString((await node.item(RECEIPT_ACK, job_id)).body)
    assert (ack.earned_nano_usd, ack.reason, ack.fence) == (800, "", fence(1, 1))
    assert mesh.slots_taken() == 0
    assert not mesh.service.desk.board.jobs
    assert not mesh.service.desk.reconciler.cases


async def test_the_relayed_frames_are_the_nodes_own_bytes(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    node.frame(offer, 1, body=b"\xff not even protobuf \x00")
    relayed = await caller.item(FRAME, job_id)
    assert (relayed.body, relayed.fence, relayed.seq, relayed.tokens) == (
        b"\xff not even protobuf \x00",
        offer.fence,
        1,
        1,
    )
    node.done(offer, 1)
    await caller.item(DONE, job_id)


async def test_a_large_payload_travels_in_pieces_and_again_for_another_try(mesh: Mesh) -> None:
    first, caller = await mesh.node("n1"), await mesh.caller()
    pieces = [b"a" * 65536, b"b" * 65536, b"c" * 100]
    job_id = caller.submit(payload=b"", payload_bytes=sum(map(len, pieces)))
    for seq, piece in enumerate(pieces, 1):
        caller.piece(job_id, seq, piece, last=seq == 3)
    offer = await first.item(OFFER, job_id)
    await first.item(PAYLOAD, job_id, 3)
    assert [item.body for item in first.of_kind(PAYLOAD)] == pieces
    assert [item.fence for item in first.of_kind(PAYLOAD)] == [offer.fence] * 3
    second = await mesh.node("n2")
    first.error(offer, "ENGINE_ERROR")
    again = await second.item(OFFER, job_id)
    await second.item(PAYLOAD, job_id, 3)
    assert [item.body for item in second.of_kind(PAYLOAD)] == pieces
    assert [item.flags & FLAG_LAST for item in second.of_kind(PAYLOAD)] == [0, 0, FLAG_LAST]
    assert again.fence == fence(1, 2)
    assert mesh.service.desk.board.budget.used_bytes == sum(map(len, pieces))
    second.accept(again)
    second.frame(again, 1)
    await caller.item(FRAME, job_id)
    assert mesh.service.desk.board.budget.used_bytes == 0
    second.done(again, 1)
    await caller.item(DONE, job_id)


async def test_a_payload_that_does_not_add_up_fails_its_job(mesh: Mesh) -> None:
    caller = await mesh.caller()
    job_id = caller.submit(payload=b"", payload_bytes=10)
    caller.piece(job_id, 1, b"too long for that", last=True)
    assert (await caller.failure(job_id)).reason == "PROTOCOL_ERROR"
    huge = caller.submit(payload=b"", payload_bytes=9 * 1024 * 1024)
    assert (await caller.failure(huge)).reason == "PAYLOAD_TOO_LARGE"
    inline = caller.submit(payload=bytes(100_000))
    assert (await caller.failure(inline)).reason == "PAYLOAD_TOO_LARGE"
    piece = caller.submit(payload=b"", payload_bytes=1_000_000)
    caller.piece(piece, 1, bytes(1_000_000), last=True)
    assert (await caller.failure(piece)).reason == "PAYLOAD_TOO_LARGE"


@pytest.mark.parametrize("mesh", [{"accept_s": 0.1}], indirect=True)
async def test_a_node_that_does_not_answer_an_offer_is_passed_over(mesh: Mesh) -> None:
    mute, caller = await mesh.node("n1"), await mesh.caller()
    job_id = caller.submit()
    await mute.item(OFFER, job_id)
    await mesh.node("n2", serve=1)
    done = await caller.item(DONE, job_id)
    assert done.fence == fence(1, 2)
    assert Cancel.FromString((await mute.item(CANCEL, job_id)).body).reason == "ACCEPT_TIMEOUT"
    assert caller.of_kind(ERROR) == []


@pytest.mark.parametrize("mesh", [{"first_token_s": 0.1}], indirect=True)
async def test_a_node_that_accepts_and_stays_silent_is_passed_over(mesh: Mesh) -> None:
    mute, caller = await mesh.node("n1"), await mesh.caller()
    job_id = caller.submit()
    mute.accept(await mute.item(OFFER, job_id))
    await mesh.node("n2", serve=1)
    assert (await caller.item(DONE, job_id)).fence == fence(1, 2)
    assert Cancel.FromString((await mute.item(CANCEL, job_id)).body).reason == "FIRST_TOKEN_TIMEOUT"


@pytest.mark.parametrize("mesh", [{"stall_s": 0.1}], indirect=True)
async def test_a_node_that_stalls_after_content_interrupts_the_answer(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    node.frame(offer, 1)
    failure = await caller.failure(job_id)
    assert (failure.reason, failure.retryable) == ("ANSWER_INTERRUPTED", False)
    caller.delivered(job_id, FAILED)
    assert (await mesh.metering.settle(job_id)).outcome == FAILED


async def test_a_killed_node_before_content_costs_the_client_nothing(mesh: Mesh) -> None:
    first, caller = await mesh.node("n1"), await mesh.caller()
    job_id = caller.submit()
    offer = await first.item(OFFER, job_id)
    first.accept(offer)
    first.frame(offer, 1, content=False)
    await caller.item(FRAME, job_id)
    await first.kill()
    await mesh.node("n2", serve=2)
    done = await caller.item(DONE, job_id)
    assert (done.fence, done.seq) == (fence(1, 2), 2)
    caller.delivered(job_id, COMPLETED, 2, fence_=done.fence)
    settle = await mesh.metering.settle(job_id)
    assert [paid.node_id for paid in settle.segments] == ["n2"]
    assert mesh.metering.count(job_id) == 1


async def test_a_killed_node_after_content_is_an_error_to_the_caller(mesh: Mesh) -> None:
    first, caller = await mesh.node("n1"), await mesh.caller()
    job_id = caller.submit()
    offer = await first.item(OFFER, job_id)
    first.accept(offer)
    first.frame(offer, 1)
    await caller.item(FRAME, job_id)
    await mesh.node("n2", serve=2)
    await first.kill()
    assert (await caller.failure(job_id)).reason == "ANSWER_INTERRUPTED"
    assert caller.of_kind(DONE) == []


async def test_every_node_that_fails_is_left_out_until_three_have_tried(mesh: Mesh) -> None:
    nodes = [await mesh.node(f"n{number}") for number in range(4)]
    caller = await mesh.caller()
    job_id = caller.submit()
    done: set[tuple[bytes, int]] = set()
    for _ in range(3):
        await mesh.until(lambda: any(offer not in done for node in nodes for offer in node.offers))
        node, offer = next(
            (node, offer) for node in nodes for offer in node.of_kind(OFFER) if (offer.id, offer.fence) not in done
        )
        done.add((offer.id, offer.fence))
        node.reject(offer)
    failure = await caller.failure(job_id)
    assert (failure.reason, failure.metadata["last_reason"]) == ("TRIES_EXHAUSTED", "NODE_REJECTED")
    assert sorted(len(node.offers) for node in nodes) == [0, 1, 1, 1]
    assert mesh.slots_taken() == 0


async def test_an_engines_own_refusal_goes_to_the_caller_untouched(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    node.error(offer, "ENGINE_REJECTED", retryable=False)
    failure = await caller.failure(job_id)
    assert (failure.reason, failure.message) == ("ENGINE_REJECTED", "broken")


@pytest.mark.parametrize("mesh", [{"queue_s": 0.2}], indirect=True)
async def test_a_job_without_a_node_fails_by_name(mesh: Mesh) -> None:
    caller = await mesh.caller()
    failure = await caller.failure(caller.submit())
    assert (failure.reason, failure.retryable, failure.retry_after_ms) == ("NO_CAPACITY", False, 5000)


# ---- cancel at each stage ------------------------------------------------------------------------------------------------------


async def test_a_cancel_during_the_upload_frees_everything(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit(payload=b"", payload_bytes=100)
    offer = await node.item(OFFER, job_id)
    caller.cancel(job_id)
    await node.item(CANCEL, job_id)
    node.cancel_ack(offer)
    await mesh.until(lambda: mesh.slots_taken() == 0)
    assert mesh.service.desk.board.budget.used_bytes == 0


async def test_a_cancel_of_a_queued_job_ends_it_and_costs_nothing(mesh: Mesh) -> None:
    caller = await mesh.caller()
    job_id = caller.submit()
    await mesh.until(lambda: job_id in mesh.service.desk.board.jobs)
    caller.cancel(job_id)
    caller.delivered(job_id, CANCELLED)
    settle = await mesh.metering.settle(job_id)
    assert (settle.outcome, settle.usage.prompt_tokens, list(settle.segments)) == (CANCELLED, 0, [])
    assert not mesh.service.desk.board.jobs


async def test_a_cancel_in_prefill_reaches_the_node_and_pays_for_the_prompt(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    await mesh.until(lambda: mesh.service.desk.board.jobs[job_id].current.accepted)  # type: ignore[union-attr]  # offered
    caller.cancel(job_id)
    caller.delivered(job_id, CANCELLED)
    cancel = await node.item(CANCEL, job_id)
    assert cancel.fence == offer.fence
    node.cancel_ack(offer, tokens=0)
    settle = await mesh.metering.settle(job_id)
    assert (settle.usage.prompt_tokens, settle.usage.completion_tokens) == (11, 0)
    assert [(paid.segment.fence, paid.node_id) for paid in settle.segments] == [(offer.fence, "n1")]
    await node.item(RECEIPT_ACK, job_id)
    assert mesh.slots_taken() == 0


async def test_a_cancel_while_streaming_pays_for_what_was_delivered(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    for seq in (1, 2, 3):
        node.frame(offer, seq)
    await caller.item(FRAME, job_id, 3)
    caller.cancel(job_id)
    await node.item(CANCEL, job_id)
    node.frame(offer, 4)  # late: it was under way
    node.cancel_ack(offer, tokens=4)
    caller.delivered(job_id, CANCELLED, 2)
    settle = await mesh.metering.settle(job_id)
    assert (settle.outcome, settle.usage.completion_tokens, settle.segments[0].segment.end_token) == (CANCELLED, 2, 2)
    assert settle.node_counts[0].usage.completion_tokens == 4
    assert len(caller.of_kind(FRAME)) == 3


async def test_a_cancel_of_a_job_in_one_piece_reaches_its_node(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit(streaming=False)
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    caller.cancel(job_id)
    await node.item(CANCEL, job_id)


async def test_a_cancel_that_overtakes_its_submit_leaves_nothing_behind(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = new_id()
    caller.link.cancel(job_id, "CLIENT_GONE")
    caller.submit(job_id=job_id)
    other = caller.submit()
    await node.item(OFFER, other)
    assert [offer.id for offer in node.of_kind(OFFER)] == [other]


# ---- windows -------------------------------------------------------------------------------------------------------------------


async def test_a_slow_readers_window_goes_through_to_the_node(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit(window_bytes=1000)
    offer = await node.item(OFFER, job_id)
    assert node.offers[job_id, offer.fence].window_bytes == 1000
    node.accept(offer)
    node.frame(offer, 1)
    frame = await caller.item(FRAME, job_id)
    caller.window(frame, len(frame.body) + 256, 2000)
    window = await node.item(WINDOW, job_id)
    assert Window.FromString(window.body).consumed_bytes == len(frame.body) + 256
    assert (window.fence, mesh.service.desk.board.jobs[job_id].limit_bytes) == (offer.fence, 2000)


async def test_a_lost_callers_jobs_stop_at_once(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    node.frame(offer, 1)
    await caller.item(FRAME, job_id)
    await caller.kill()
    assert Cancel.FromString((await node.item(CANCEL, job_id)).body).reason == "CLIENT_GONE"
    settle = await mesh.metering.settle(job_id)
    assert (settle.outcome, settle.source) == (FAILED, EvidenceSource.EVIDENCE_SOURCE_RELAY)


async def test_a_lost_callers_job_without_content_is_not_settled_since_it_may_run_elsewhere_by_now(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.accept(offer)
    node.frame(offer, 1, content=False)
    await caller.item(FRAME, job_id)
    await caller.kill()
    await node.item(CANCEL, job_id)
    assert not mesh.service.desk.reconciler.cases
    again = await mesh.caller()
    again.submit(job_id=job_id, attempt=2)
    second = await node.item(OFFER, job_id, 2)
    assert second.fence == fence(2, 1)
    node.cancel_ack(offer)
    node.answer(second)
    await again.item(DONE, job_id)
    again.delivered(job_id, COMPLETED, 1, fence_=second.fence)
    settle = await mesh.metering.settle(job_id)
    assert (settle.outcome, settle.segments[0].segment.fence) == (COMPLETED, second.fence)


async def test_many_jobs_at_once_each_get_their_own_answer(mesh: Mesh) -> None:
    await asyncio.gather(*(mesh.node(f"n{number}", slots=4, serve=5) for number in range(3)))
    caller = await mesh.caller()
    jobs = [caller.submit() for _ in range(200)]
    await caller.until(lambda: len(caller.of_kind(DONE)) == 200)
    for job_id in jobs:
        assert [frame.seq for frame in caller.of_kind(FRAME) if frame.id == job_id] == [1, 2, 3, 4, 5]
    assert mesh.slots_taken() == 0
