"""What nodes may get wrong, by accident or on purpose: only their own session suffers."""

from collections.abc import Callable

import pytest

from gpumesh.common.v1.job_pb2 import ModelBuild, Usage
from gpumesh.common.v1.link_pb2 import Cancel, GoodbyeReason, Item, ItemKind
from gpumesh.node.v1.session_pb2 import Done, ServedModel, Status
from gpumesh_runtime.error_types import Conflict, PermissionDenied
from gpumesh_runtime.link import LinkEnd, fence, new_id
from gpumesh_runtime.reasons import Reason
from tests.support.link_server import Tunnel
from tests.support.scheduler_mesh import Mesh, metric
from tests.support.scheduler_peers import CANCEL, CONTENT, DONE, FRAME, OFFER, FakeCaller, FakeNode, frame_body

DROPPED = "gpumesh_scheduler_dropped_items_total"


async def running_job(mesh: Mesh, node: FakeNode, caller: FakeCaller) -> Item:
    """The offer of a job that its node has accepted."""
    offer = await node.item(OFFER, caller.submit())
    node.accept(offer)
    return offer


async def test_duplicate_frames_reach_the_caller_once(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    before = metric(DROPPED, reason="duplicate")
    offer = await running_job(mesh, node, caller)
    for seq in (1, 1, 2, 1, 2, 3):
        node.frame(offer, seq)
    node.done(offer, 3)
    await caller.item(DONE, offer.id)
    assert [frame.seq for frame in caller.of_kind(FRAME)] == [1, 2, 3]
    assert metric(DROPPED, reason="duplicate") == before + 3
    assert node.ends == []


async def test_frames_of_an_earlier_try_are_dropped(mesh: Mesh) -> None:
    node, caller = await mesh.node("n1"), await mesh.caller()
    before = metric(DROPPED, reason="stale_fence")
    offer = await running_job(mesh, node, caller)
    other = await mesh.node("n2")
    node.error(offer, "ENGINE_ERROR")
    again = await other.item(OFFER, offer.id)
    node.frame(offer, 1)
    await mesh.until(lambda: metric(DROPPED, reason="stale_fence") == before + 1)
    other.answer(again, 2)
    await caller.item(DONE, offer.id)
    assert {frame.fence for frame in caller.of_kind(FRAME)} == {again.fence}
    assert node.ends == []


async def test_frames_of_a_job_that_is_over_are_dropped(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    offer = await running_job(mesh, node, caller)
    node.frame(offer, 1)
    node.done(offer, 1)
    await caller.item(DONE, offer.id)
    node.frame(offer, 2)
    # It is told to stop: whatever it still runs under that id, nobody wants it.
    assert Cancel.FromString((await node.item(CANCEL, offer.id)).body).reason == "UNKNOWN_JOB"
    assert len(caller.of_kind(FRAME)) == 1
    assert node.ends == []


def _done_body(node: FakeNode, offer: Item, token: bytes) -> bytes:
    return Done(usage=node.usage(0), receipt_token=token).SerializeToString()


BREACHES: dict[str, Callable[[FakeNode, Item], None]] = {
    "a gap": lambda node, offer: node.frame(offer, 2),
    "frame 0": lambda node, offer: node.frame(offer, 0),
    "a fence of the future": lambda node, offer: node.frame(offer, 1, fence_=offer.fence + 1),
    "garbage for Done": lambda node, offer: node.send(DONE, offer, b"\xff\xff\xff", seq=0),
    "a wrong count": lambda node, offer: node.done(offer, 7),
    "another token": lambda node, offer: node.send(DONE, offer, _done_body(node, offer, b"forged")),
    "absurd usage": lambda node, offer: node.send(
        DONE, offer, Done(usage=Usage(prompt_tokens=10**15), receipt_token=node.token(offer)).SerializeToString()
    ),
    "negative usage": lambda node, offer: node.send(
        DONE, offer, Done(usage=Usage(completion_tokens=-1), receipt_token=node.token(offer)).SerializeToString()
    ),
    "garbage for Accept": lambda node, offer: node.send(ItemKind.ITEM_KIND_ACCEPT, offer, b"\xff\xff"),
    "garbage for Reject": lambda node, offer: node.send(ItemKind.ITEM_KIND_REJECT, offer, b"\xff\xff"),
    "garbage for Error": lambda node, offer: node.send(ItemKind.ITEM_KIND_ERROR, offer, b"\xff\xff"),
    "garbage for Heartbeat": lambda node, offer: node.send(ItemKind.ITEM_KIND_HEARTBEAT, offer, b"\xff\xff"),
    "a kind that nodes do not send": lambda node, offer: node.send(OFFER, offer, b""),
    "a short id": lambda node, offer: node.link.send_new(FRAME, id=b"short", fence=1, seq=1),
    "an item without an id": lambda node, offer: node.link.send_new(DONE),
    "too many slots": lambda node, offer: node.send(
        ItemKind.ITEM_KIND_HEARTBEAT,
        offer,
        Status(models=[ServedModel(build=ModelBuild(model_id="m"), slots=10**6)]).SerializeToString(),
    ),
    "too many models": lambda node, offer: node.send(
        ItemKind.ITEM_KIND_HEARTBEAT,
        offer,
        Status(models=[ServedModel(build=ModelBuild(model_id=f"m{n}")) for n in range(65)]).SerializeToString(),
    ),
    "an overlong name": lambda node, offer: node.send(
        ItemKind.ITEM_KIND_HEARTBEAT,
        offer,
        Status(models=[ServedModel(build=ModelBuild(model_id="m" * 1000))]).SerializeToString(),
    ),
}


@pytest.mark.parametrize("breach", BREACHES)
async def test_a_breach_ends_that_nodes_session_and_no_other(mesh: Mesh, breach: str) -> None:
    bad, caller = await mesh.node("bad", slots=1), await mesh.caller()
    offer = await running_job(mesh, bad, caller)
    good = await mesh.node("good", slots=1)
    others = await running_job(mesh, good, caller)
    BREACHES[breach](bad, offer)
    await bad.until(lambda: bool(bad.ends))
    assert [goodbye.reason for goodbye in bad.goodbyes] == [GoodbyeReason.GOODBYE_REASON_PROTOCOL_ERROR]
    good.frame(others, 1)
    good.done(others, 1)
    await caller.item(DONE, others.id)
    again = await good.item(OFFER, offer.id)
    good.answer(again)
    await caller.item(DONE, offer.id)
    assert good.ends == []


async def test_a_node_cannot_answer_for_another(mesh: Mesh) -> None:
    victim, caller = await mesh.node("victim", slots=1), await mesh.caller()
    offer = await running_job(mesh, victim, caller)
    thief = await mesh.node("thief")
    thief.frame(offer, 1)
    await thief.until(lambda: bool(thief.ends))
    victim.answer(offer, 2)
    await caller.item(DONE, offer.id)
    assert caller.of_kind(FRAME)[0].body == frame_body("t1 ")


async def test_a_node_that_runs_over_the_window_is_cut_off(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    offer = await node.item(OFFER, caller.submit(window_bytes=10_000))
    node.accept(offer)
    body = frame_body("x" * 30_000)
    for seq in range(1, 6):
        node.frame(offer, seq, body=body)
    await node.until(lambda: bool(node.ends))
    assert (await caller.failure(offer.id)).reason == "ANSWER_INTERRUPTED"
    assert sum(len(frame.body) for frame in caller.of_kind(FRAME)) <= 10_000 + 64 * 1024 + 30_000


async def test_a_flood_of_unknown_jobs_ends_the_session(mesh: Mesh) -> None:
    node = await mesh.node()
    for _ in range(1100):
        node.link.send_new(FRAME, id=new_id(), fence=fence(1, 1), seq=1, flags=CONTENT)
    await node.until(lambda: bool(node.ends))


# ---- sessions --------------------------------------------------------------------------------------------------------------------


async def test_a_second_session_with_a_higher_counter_takes_over(mesh: Mesh) -> None:
    old, caller = await mesh.node("n1", counter=1), await mesh.caller()
    offer = await running_job(mesh, old, caller)
    new = await mesh.node("n1", counter=2)
    await old.until(lambda: bool(old.goodbyes))
    assert old.goodbyes[0].reason == GoodbyeReason.GOODBYE_REASON_REPLACED
    again = await new.item(OFFER, offer.id)
    assert again.fence == fence(1, 2)
    new.answer(again)
    await caller.item(DONE, offer.id)


async def test_a_second_session_with_a_lower_counter_is_refused(mesh: Mesh) -> None:
    await mesh.node("n1", counter=5)
    assert isinstance(await mesh.refused_node("n1", Reason.SESSION_REPLACED, counter=4), Conflict)


async def test_a_node_cannot_take_another_nodes_name(mesh: Mesh) -> None:
    assert isinstance(await mesh.refused_node("n1", Reason.PERMISSION_DENIED, claims="n2"), PermissionDenied)


async def test_a_revoked_node_is_sent_away_and_stays_out(mesh: Mesh) -> None:
    node = await mesh.node("n1")
    mesh.registry.push(revoked_node_ids=["n1"])
    await node.until(lambda: bool(node.goodbyes))
    assert node.goodbyes[0].reason == GoodbyeReason.GOODBYE_REASON_REVOKED
    await node.until(lambda: bool(node.ends))
    await mesh.until(
        lambda: node.client.last_error is not None and node.client.last_error.reason is Reason.NODE_REVOKED
    )


async def test_a_model_that_leaves_the_catalogue_gets_no_jobs(mesh: Mesh) -> None:
    node, caller = await mesh.node(), await mesh.caller()
    mesh.registry.catalogue("another")
    await mesh.until(lambda: mesh.service.desk.board.pools.catalogue is not None)
    job_id = caller.submit()
    await mesh.until(lambda: job_id in mesh.service.desk.board.jobs)
    assert node.offers == {}
    mesh.registry.catalogue("tiny")
    await node.item(OFFER, job_id)


@pytest.mark.parametrize("mesh", [{"suspect_s": 0.5, "lost_s": 1.0, "heartbeat_s": 0.1}], indirect=True)
async def test_a_black_holed_node_is_suspected_then_lost_and_its_job_goes_elsewhere(mesh: Mesh) -> None:
    async with Tunnel(mesh.address) as tunnel:
        node, caller = await mesh.node("n1", address=tunnel.address), await mesh.caller()
        offer = await running_job(mesh, node, caller)
        tunnel.black_hole()
        await mesh.until(lambda: mesh.service.desk.roster.sessions["n1"].state.name == "SUSPECT")
        later = caller.submit()
        await mesh.until(lambda: "n1" not in mesh.service.desk.roster.sessions)
        assert (later, fence(1, 1)) not in node.offers
        await mesh.node("n2", serve=1)
        await caller.item(DONE, offer.id)
        await caller.item(DONE, later)
        await node.kill()


async def test_a_bare_eof_loses_the_session_at_once(mesh: Mesh) -> None:
    node = await mesh.node("n1")
    await node.kill()
    await mesh.until(lambda: not mesh.service.desk.roster.sessions, timeout_s=2.0)


async def test_a_node_that_says_goodbye_finishes_its_job(mesh: Mesh) -> None:
    node, caller = await mesh.node("n1"), await mesh.caller()
    offer = await running_job(mesh, node, caller)
    node.link.goodbye(GoodbyeReason.GOODBYE_REASON_DRAIN, 1000)
    await mesh.until(lambda: mesh.service.desk.roster.sessions["n1"].state.name == "DRAINING")
    later = caller.submit()
    node.answer(offer)
    await caller.item(DONE, offer.id)
    assert all(job_id != later for job_id, _ in node.offers)
    await node.client.stop()
    await mesh.until(lambda: not mesh.service.desk.roster.sessions)
    assert LinkEnd.CLOSED_BY_US in node.ends
