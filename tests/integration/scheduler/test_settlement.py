"""Settlement: sent until it is answered, with exactly one effect; nodes and callers told; receipts and records presented again."""

import pytest

from gpumesh.common.v1.job_pb2 import ReceiptToken
from gpumesh.common.v1.link_pb2 import ItemKind
from gpumesh.metering.v1.settlement_service_pb2 import EvidenceSource
from gpumesh.metering.v1.settlement_service_pb2_grpc import add_SettlementServiceServicer_to_server
from gpumesh.node.v1.session_pb2 import ReceiptAck
from gpumesh.scheduler.v1.dispatch_service_pb2 import DeliveredAck
from gpumesh_runtime.identity import Role
from gpumesh_runtime.link import new_id
from gpumesh_runtime.rpc.server import Server
from tests.support.scheduler_mesh import Mesh
from tests.support.scheduler_peers import (
    COMPLETED,
    DELIVERED_ACK,
    DONE,
    FAILED,
    OFFER,
    RECEIPT_ACK,
    FakeCaller,
    FakeNode,
)


async def finished(mesh: Mesh, node: FakeNode, caller: FakeCaller, tokens: int = 2) -> bytes:
    """A job whose Done has reached the caller."""
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    node.answer(offer, tokens)
    await caller.item(DONE, job_id)
    return job_id


@pytest.mark.parametrize("mesh", [{"resend_s": 0.1}], indirect=True)
async def test_a_settle_goes_again_until_it_is_answered_and_has_one_effect(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    mesh.metering.silent = True
    job_id = await finished(mesh, node, caller)
    caller.delivered(job_id, COMPLETED, 2)
    first = await mesh.metering.settle(job_id)
    again = await mesh.metering.settle(job_id, 3)
    assert again == first
    mesh.metering.silent = False
    await caller.item(DELIVERED_ACK, job_id)
    await node.item(RECEIPT_ACK, job_id)
    assert mesh.metering.effects == {job_id}
    await mesh.until(lambda: not mesh.service.desk.reconciler.cases)


async def test_metering_that_was_away_gets_everything_when_it_is_back(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    port = mesh.metering_server.port
    await mesh.metering_server.stop(0)
    await mesh.until(lambda: mesh.service.settlement.client.link is None)
    jobs = [await finished(mesh, node, caller) for _ in range(5)]
    for job_id in jobs:
        caller.delivered(job_id, COMPLETED, 2)
    await mesh.until(lambda: len(mesh.service.desk.reconciler.cases) == 5 and not mesh.service.desk.reconciler.waiting)
    back = Server("metering", f"127.0.0.1:{port}", mesh.certificates.role(Role.METERING))
    back.add(mesh.metering, add_SettlementServiceServicer_to_server)
    await back.start()
    try:
        for job_id in jobs:
            await caller.item(DELIVERED_ACK, job_id)
            await node.item(RECEIPT_ACK, job_id)
            assert mesh.metering.count(job_id) == 1
    finally:
        await back.stop(0)


async def test_a_caller_that_died_after_done_is_settled_from_what_was_relayed(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = await finished(mesh, node, caller, 3)
    await caller.kill()
    settle = await mesh.metering.settle(job_id)
    assert (settle.outcome, settle.source) == (COMPLETED, EvidenceSource.EVIDENCE_SOURCE_RELAY)
    assert (settle.usage.completion_tokens, settle.segments[0].segment.end_token) == (3, 3)
    assert (settle.segments[0].provider_id, bool(settle.ticket)) == ("acme", True)
    await node.item(RECEIPT_ACK, job_id)


async def test_a_record_presented_after_a_reconnect_settles_the_job_once(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = await finished(mesh, node, caller)
    await caller.kill()
    again = await mesh.caller()
    again.delivered(job_id, COMPLETED, 2)
    again.delivered(job_id, COMPLETED, 2)
    settle = await mesh.metering.settle(job_id)
    assert settle.source == EvidenceSource.EVIDENCE_SOURCE_CALLER
    ack = DeliveredAck.FromString((await again.item(DELIVERED_ACK, job_id)).body)
    assert (ack.charge_nano_usd, ack.reason) == (1000, "")


async def test_record_and_receipt_of_a_job_of_another_scheduler_are_settled_here(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    token = node.token(offer)
    # As after a restart: this scheduler forgets everything about the job.
    desk = mesh.service.desk
    desk.board.jobs.clear()
    node.receipt(offer, 2)
    caller.delivered(job_id, COMPLETED, 2, tokens_of=[token])
    settle = await mesh.metering.settle(job_id)
    assert [(paid.provider_id, paid.node_id, paid.build.model_id) for paid in settle.segments] == [
        ("acme", "n1", "tiny")
    ]
    assert settle.node_counts[0].usage.completion_tokens == 2
    await caller.item(DELIVERED_ACK, job_id)
    await node.item(RECEIPT_ACK, job_id)


async def test_a_record_alone_is_settled_with_the_provider_from_its_receipt_token(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    mesh.service.desk.board.jobs.clear()
    caller.delivered(job_id, COMPLETED, 2, tokens_of=[node.token(offer)])
    settle = await mesh.metering.settle(job_id)
    assert (settle.segments[0].node_id, list(settle.node_counts)) == ("n1", [])


async def test_a_receipt_alone_is_presented_to_metering_and_parked_without_an_answer(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    mesh.service.desk.board.jobs.clear()
    mesh.metering.reason = "PARKED"
    node.receipt(offer, 2)
    settle = await mesh.metering.settle(job_id)
    assert (settle.receipt_only, settle.ticket) == (True, b"")
    assert (settle.segments[0].node_id, settle.segments[0].segment.fence) == ("n1", offer.fence)
    await mesh.until(lambda: not mesh.service.desk.reconciler.cases)
    mesh.metering.reason = ""
    node.receipt(offer, 2)
    ack = await node.item(RECEIPT_ACK, job_id)
    assert ReceiptAck.FromString(ack.body).earned_nano_usd == 800
    assert len(node.of_kind(RECEIPT_ACK)) == 1


async def test_forged_receipts_are_refused_for_good(mesh: Mesh) -> None:
    node, caller = await mesh.node("n1"), await mesh.caller()
    other = await mesh.node("n2", slots=1)
    job_id = caller.submit()
    await mesh.until(lambda: bool(node.offers or other.offers))
    owner, thief = (node, other) if node.offers else (other, node)
    offer = owner.of_kind(OFFER)[0]
    token = ReceiptToken.FromString(owner.token(offer))
    token.mac = bytes(32)
    owner.receipt(offer, 5, token.SerializeToString())
    owner.receipt(offer, 5, b"garbage")
    thief.receipt(offer, 5)  # a good token, another node's
    for who, number in ((owner, 2), (thief, 1)):
        ack = ReceiptAck.FromString((await who.item(RECEIPT_ACK, job_id, number)).body)
        assert (ack.reason, ack.earned_nano_usd, ack.fence) == ("RECEIPT_INVALID", 0, offer.fence)
    assert mesh.metering.count(job_id) == 0


async def test_a_record_that_cannot_be_read_is_not_presented_for_ever(mesh: Mesh) -> None:
    caller = await mesh.caller()
    job_id = new_id()
    caller.link.send_new(ItemKind.ITEM_KIND_DELIVERED, id=job_id, body=b"\xff\xff")
    assert DeliveredAck.FromString((await caller.item(DELIVERED_ACK, job_id)).body).reason == "PROTOCOL_ERROR"


async def test_a_failed_job_gets_its_row_too(mesh: Mesh) -> None:
    caller = await mesh.caller()
    job_id = new_id()
    caller.delivered(job_id, FAILED)
    settle = await mesh.metering.settle(job_id)
    assert (settle.outcome, bool(settle.ticket)) == (FAILED, True)
    await caller.item(DELIVERED_ACK, job_id)


async def test_a_ticket_that_metering_refuses_ends_the_matter_for_both(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    mesh.metering.reason = "TICKET_EXPIRED"
    job_id = await finished(mesh, node, caller)
    caller.delivered(job_id, COMPLETED, 2)
    assert DeliveredAck.FromString((await caller.item(DELIVERED_ACK, job_id)).body).reason == "TICKET_EXPIRED"
    assert ReceiptAck.FromString((await node.item(RECEIPT_ACK, job_id)).body).reason == "TICKET_EXPIRED"
