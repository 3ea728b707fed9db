"""What is let in and what is told: tickets, capacity, operators, drain."""

import asyncio

import grpc.aio
import pytest

from gpumesh.common.v1.link_pb2 import GoodbyeReason
from gpumesh.scheduler.v1.capacity_service_pb2 import Capacity, CapacityWelcome
from gpumesh.scheduler.v1.operator_service_pb2 import DrainRequest, ListNodesRequest
from gpumesh.scheduler.v1.operator_service_pb2_grpc import OperatorServiceStub
from gpumesh_runtime.errors import from_grpc
from gpumesh_runtime.identity import Role
from gpumesh_runtime.link import new_id
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.sealing import KeyRing, create_file
from tests.support.scheduler_mesh import Mesh, ticket
from tests.support.scheduler_peers import COMPLETED, DONE, OFFER, UPDATE, FakeCaller


async def refusal(caller: FakeCaller, job_id: bytes) -> tuple[str, bool]:
    failure = await caller.failure(job_id)
    return failure.reason, failure.retryable


async def test_a_replayed_ticket_is_refused(mesh: Mesh) -> None:
    await mesh.node(serve=1)
    caller = await mesh.caller()
    job_id = new_id()
    sealed = mesh.ticket(job_id)
    caller.submit(job_id=job_id, sealed=sealed)
    await caller.item(DONE, job_id)
    caller.submit(job_id=job_id, sealed=sealed)
    assert await refusal(caller, job_id) == ("TICKET_REPLAYED", False)
    caller.submit(job_id=job_id, attempt=2)
    await caller.item(DONE, job_id, 2)


async def test_a_late_ticket_and_one_for_another_boot_are_refused_and_may_be_had_anew(mesh: Mesh) -> None:
    caller = await mesh.caller()
    late, boot, elsewhere = new_id(), new_id(), new_id()
    caller.submit(job_id=late, sealed=mesh.ticket(late, submit_in_s=-1))
    caller.submit(job_id=boot, sealed=mesh.ticket(boot, scheduler_boot_id="earlier"))
    caller.submit(job_id=elsewhere, sealed=mesh.ticket(elsewhere, scheduler_id="scheduler-9"))
    assert await refusal(caller, late) == ("TICKET_EXPIRED", True)
    assert await refusal(caller, boot) == ("TICKET_INVALID", True)
    assert await refusal(caller, elsewhere) == ("TICKET_INVALID", True)


async def test_forged_and_borrowed_tickets_are_refused(mesh: Mesh, tmp_path_factory: pytest.TempPathFactory) -> None:
    caller = await mesh.caller()
    forged, garbage, borrowed, attempt = (new_id() for _ in range(4))
    path = tmp_path_factory.mktemp("another") / "ring.json"
    create_file(path)
    caller.submit(job_id=forged, sealed=ticket(KeyRing(path), mesh.service, forged))
    caller.submit(job_id=garbage, sealed=b"\xff\xff\xff")
    caller.submit(job_id=borrowed, sealed=mesh.ticket(new_id()))
    caller.submit(job_id=attempt, attempt=2, sealed=mesh.ticket(attempt, attempt=1))
    for job_id in (forged, garbage, borrowed, attempt):
        assert await refusal(caller, job_id) == ("TICKET_INVALID", False)
    assert not mesh.service.desk.board.jobs


async def test_another_caller_cannot_touch_a_job(mesh: Mesh) -> None:
    node, caller, other = await mesh.node(), await mesh.caller(), await mesh.caller()
    job_id = caller.submit()
    offer = await node.item(OFFER, job_id)
    other.cancel(job_id)
    other.submit()
    await mesh.until(lambda: len(mesh.service.desk.board.jobs) == 2)
    node.answer(offer)
    await caller.item(DONE, job_id)


# ---- capacity ----------------------------------------------------------------------------------------------------------------------


async def test_a_router_gets_a_snapshot_then_changes_then_the_whole(mesh: Mesh) -> None:
    node = await mesh.node(slots=3)
    watcher = await mesh.watcher()
    await watcher.until(lambda: bool(watcher.ups and watcher.items))
    welcome = CapacityWelcome.FromString(watcher.ups[0][1])
    assert welcome.scheduler_boot_id == mesh.service.desk.boot_id
    assert welcome.dispatch_address == mesh.address
    first = Capacity.FromString(watcher.items[0].body)
    assert first.whole
    assert [(m.model_id, m.model_revision, m.nodes, m.slots, m.free_slots) for m in first.models] == [
        ("tiny", "r1", 1, 3, 3)
    ]
    caller = await mesh.caller()
    offer = await node.item(OFFER, caller.submit())

    def updates() -> list[Capacity]:
        return [Capacity.FromString(item.body) for item in watcher.of_kind(UPDATE)]

    await watcher.until(
        lambda: any(m.free_slots == 2 and m.outstanding_tokens == 120 for u in updates() for m in u.models)
    )
    node.answer(offer)
    await watcher.until(lambda: updates()[-1].models[0].free_slots == 3)
    seen = len(watcher.items)
    await watcher.until(lambda: any(update.whole for update in updates()[seen:]))


async def test_waiting_jobs_are_told_even_where_no_node_is(mesh: Mesh) -> None:
    watcher, caller = await mesh.watcher(), await mesh.caller()
    caller.submit()
    await watcher.until(
        lambda: any(
            m.queued_jobs == 1 and m.nodes == 0 for i in watcher.items for m in Capacity.FromString(i.body).models
        )
    )


# ---- operators, drain --------------------------------------------------------------------------------------------------------------


async def test_operators_see_nodes_and_may_drain(mesh: Mesh) -> None:
    node, caller = await mesh.node("n1"), await mesh.caller()
    await mesh.node("n2")
    caller.submit()
    await mesh.until(lambda: mesh.slots_taken() == 1)
    async with channel(mesh.address, mesh.certificates.role(Role.OPERATOR)) as operator:
        stub = OperatorServiceStub(operator)
        listed = await stub.ListNodes(ListNodesRequest(), timeout=5)
        assert [(n.node_id, n.provider_id, n.state) for n in listed.nodes] == [
            ("n1", "acme", "ready"),
            ("n2", "acme", "ready"),
        ]
        assert sum(n.running_jobs for n in listed.nodes) == 1
        assert listed.nodes[0].status.models[0].slots == node.slots
        assert not (await stub.ListNodes(ListNodesRequest(provider_id="nobody"), timeout=5)).nodes
        assert (await stub.Drain(DrainRequest(), timeout=5)).jobs == 1
    assert mesh.drains == ["operator"]


async def test_only_operators_may_look_inside(mesh: Mesh) -> None:
    async with channel(mesh.address, mesh.certificates.role(Role.EDGE)) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await OperatorServiceStub(edge).ListNodes(ListNodesRequest(), timeout=5)
    assert from_grpc(refused.value).reason is Reason.PERMISSION_DENIED


async def test_a_drain_hands_back_what_waits_finishes_what_runs_and_settles_it(mesh: Mesh) -> None:
    node, caller, watcher = await mesh.node(slots=1), await mesh.caller(), await mesh.watcher()
    running = caller.submit()
    offer = await node.item(OFFER, running)
    node.accept(offer)
    waiting = caller.submit()
    await mesh.until(lambda: len(mesh.service.desk.board.jobs) == 2)
    drain = asyncio.ensure_future(mesh.service.drain())
    assert await refusal(caller, waiting) == ("DRAINING", True)
    for peer in (node, caller):
        await peer.until(lambda peer=peer: bool(peer.goodbyes))  # type: ignore[misc]  # mypy does not infer this lambda
        assert peer.goodbyes[0].reason == GoodbyeReason.GOODBYE_REASON_DRAIN
        assert peer.goodbyes[0].drain_ms == 5000
    await watcher.until(lambda: bool(watcher.items) and Capacity.FromString(watcher.items[-1].body).draining)
    assert await refusal(caller, caller.submit()) == ("DRAINING", True)
    node.answer(offer, 2)
    await caller.item(DONE, running)
    caller.delivered(running, COMPLETED, 2)
    await drain
    assert mesh.metering.effects == {running}
    for peer in (node, caller):
        await peer.until(lambda peer=peer: len(peer.ends) == 1)  # type: ignore[misc]  # mypy does not infer this lambda


async def test_a_drain_does_not_wait_for_ever(mesh: Mesh) -> None:
    object.__setattr__(mesh.service.settings, "drain_s", 0.2)
    node, caller = await mesh.node(), await mesh.caller()
    await node.item(OFFER, caller.submit())
    await asyncio.wait_for(mesh.service.drain(), 5.0)


@pytest.mark.parametrize("mesh", [{"max_sessions_per_s": 0.5}], indirect=True)
async def test_a_crowd_of_nodes_is_told_when_to_come_back(mesh: Mesh) -> None:
    await mesh.node("n1")
    error = await mesh.refused_node("n2", Reason.RESOURCE_EXHAUSTED)
    assert error.retryable
    assert error.retry_after_s
