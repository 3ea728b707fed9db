"""One job through a real scheduler: node and caller over TLS, settled with metering."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.metering.v1.settlement_service_pb2 import EvidenceSource
from gpumesh.node.v1.session_pb2 import ReceiptAck
from gpumesh.scheduler.v1.dispatch_service_pb2 import DeliveredAck
from gpumesh_runtime.link import fence
from tests.support.scheduler_peers import (
    COMPLETED,
    DELIVERED_ACK,
    DONE,
    FRAME,
    OFFER,
    RECEIPT_ACK,
    Mesh,
    running_mesh,
)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with running_mesh(tmp_path) as mesh:
        yield mesh


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
