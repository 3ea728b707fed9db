"""What clients see when something breaks, and what is tried again without their notice."""

import asyncio
import json

import aiohttp
import pytest

from gpumesh.common.v1.job_pb2 import JobOutcome
from gpumesh.common.v1.link_pb2 import ItemFlag, ItemKind
from gpumesh.router.v1.admission_service_pb2 import AdmitRequest
from gpumesh_runtime.errors import MeshError, Reason
from tests.support.edge_client import CHAT, chat_body, post, stream, text_of
from tests.support.edge_peers import EdgeMesh, PlayedJob, eventually, hello_world


def refusing(mesh: EdgeMesh, error: MeshError, times: int = 1_000_000) -> None:
    """The router refuses the next `times` requests."""
    left = [times]

    def refusal(request: AdmitRequest) -> MeshError | None:
        left[0] -= 1
        return error if left[0] >= 0 else None

    mesh.router.refusal = refusal


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.INVALID_API_KEY, 401),
        (Reason.REVOKED_API_KEY, 401),
        (Reason.INSUFFICIENT_BALANCE, 402),
        (Reason.UNKNOWN_MODEL, 404),
        (Reason.RATE_LIMITED, 429),
        (Reason.NO_CAPACITY, 503),
    ],
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_refusal_has_its_status_also_on_a_stream(
    mesh: EdgeMesh, http: aiohttp.ClientSession, reason: Reason, status: int, streamed: bool
) -> None:
    refusing(mesh, MeshError.of(reason, "No.", retry_after_s=2.0))
    async with http.post(mesh.base + CHAT, json=chat_body(stream=streamed), headers=mesh.headers) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["message"].startswith("No.")
        assert ("Retry-After" in answer.headers) == (status in (429, 503))
    assert not mesh.dispatch.jobs


async def test_a_failure_before_content_has_a_status_on_a_stream(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    mesh.dispatch.play = lambda job: job.fail(MeshError.of(Reason.ENGINE_REJECTED, "The engine says no."))
    async with http.post(mesh.base + CHAT, json=chat_body(stream=True), headers=mesh.headers) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "engine_rejected"
    await eventually(lambda: len(mesh.dispatch.delivered) == 1)
    assert mesh.dispatch.delivered[0][1].outcome == JobOutcome.JOB_OUTCOME_FAILED
    assert list(mesh.router.releases.values()) == [0]


async def test_a_failure_after_content_ends_the_stream_with_an_error_event(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    def play(job: PlayedJob) -> None:
        job.say("Hel")
        job.fail(MeshError.of(Reason.ANSWER_INTERRUPTED, "The node went away. You are not charged."))

    mesh.dispatch.play = play
    status, events = await stream(http, mesh)
    assert status == 200
    assert text_of(events) == "Hel"
    assert events[-1]["error"]["code"] == "answer_interrupted"
    assert "[DONE]" not in events
    await eventually(lambda: len(mesh.dispatch.delivered) == 1)
    record = mesh.dispatch.delivered[0][1]
    assert (record.outcome, record.reason) == (JobOutcome.JOB_OUTCOME_FAILED, "ANSWER_INTERRUPTED")
    assert list(mesh.router.releases.values()) == [0]


async def test_a_whole_answer_that_breaks_off_is_an_error(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def play(job: PlayedJob) -> None:
        job.say("Hel")
        job.fail(MeshError.of(Reason.ANSWER_INTERRUPTED, "It broke."))

    mesh.dispatch.play = play
    assert (await post(http, mesh))[0] == 502


async def test_a_second_try_replaces_what_came_without_content(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def play(job: PlayedJob) -> None:
        job.say("", tokens=0)
        job.again()
        hello_world(job)

    mesh.dispatch.play = play
    _, events = await stream(http, mesh)
    assert text_of(events) == "Hello world"


async def test_duplicate_and_stale_frames_reach_no_client(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def play(job: PlayedJob) -> None:
        job.say("Hello")
        job.seq -= 1
        job.say("Hello")
        job.again()
        job.say("stranger")
        job.try_number, job.seq, job.tokens = 1, 1, 1
        job.say(" world")
        job.done()

    mesh.dispatch.play = play
    _, events = await stream(http, mesh)
    assert text_of(events) == "Hello world"
    assert events[-1] == "[DONE]"


async def test_an_answer_with_a_hole_is_not_passed_off_as_complete(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def gap(job: PlayedJob) -> None:
        job.say("a")
        job.seq += 1
        job.say("c")

    def short(job: PlayedJob) -> None:
        job.say("a")
        job.seq += 5
        job.done()

    for play in (gap, short):
        mesh.dispatch.play = play
        _, events = await stream(http, mesh)
        assert events[-1]["error"]["code"] == "missing_frames"


async def test_garbage_ends_its_job_and_leaves_the_others_alone(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def garbage(job: PlayedJob) -> None:
        flags = ItemFlag.ITEM_FLAG_CONTENT | ItemFlag.ITEM_FLAG_FIRST
        job.link.send_new(
            ItemKind.ITEM_KIND_FRAME, id=job.job_id, fence=job.fence, seq=1, flags=flags, body=b"\xff\xff\xff"
        )

    mesh.dispatch.play = garbage
    assert (await post(http, mesh))[0] == 502
    link = mesh.dispatch.links[0]
    mesh.dispatch.play = hello_world
    assert (await post(http, mesh))[0] == 200
    assert mesh.dispatch.links == [link]


async def test_a_draining_scheduler_is_left_for_a_new_admission(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def play(job: PlayedJob) -> None:
        if job.attempt == 1:
            job.fail(MeshError.of(Reason.DRAINING, "going", retryable=True))
        else:
            hello_world(job)

    mesh.dispatch.play = play
    assert (await post(http, mesh))[0] == 200
    assert [request.attempt for request in mesh.router.admits] == [1, 2]
    assert list(mesh.router.admits[1].excluded_scheduler_ids) == ["s0"]


async def test_a_router_that_is_away_for_a_moment_is_waited_for(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    port = await mesh.stop_router()
    asking = asyncio.create_task(post(http, mesh))
    await eventually(lambda: len(mesh.edge.dispatcher.jobs) == 1)
    await mesh.start_router(port)
    status, _ = await asking
    assert status == 200


async def test_an_admission_that_a_dead_router_took_along_is_asked_again(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    mesh.router.silent = True
    asking = asyncio.create_task(post(http, mesh))
    await eventually(lambda: len(mesh.router.admits) == 1)
    port = await mesh.stop_router()
    mesh.router.silent = False
    await mesh.start_router(port)
    assert (await asking)[0] == 200
    assert {request.attempt for request in mesh.router.admits} == {1}


async def test_a_job_is_placed_again_within_a_second_of_its_schedulers_return(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    mesh.dispatch.play = lambda job: None
    asking = asyncio.create_task(stream(http, mesh))
    await eventually(lambda: len(mesh.dispatch.submits) == 1)
    port = await mesh.stop_dispatch()
    mesh.dispatch.play = hello_world
    await mesh.start_dispatch(port)
    back = asyncio.get_running_loop().time()
    status, events = await asking
    assert asyncio.get_running_loop().time() - back < 1.0
    assert (status, text_of(events), events[-1]) == (200, "Hello world", "[DONE]")
    assert [fence >> 16 for _, fence in mesh.dispatch.submits][-1] >= 2
    assert len({job_id for job_id, _ in mesh.dispatch.submits}) == 1


async def test_a_stream_whose_scheduler_dies_after_content_breaks_off_with_an_error(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    mesh.dispatch.play = lambda job: job.say("Hel")
    async with http.post(mesh.base + CHAT, json=chat_body(stream=True), headers=mesh.headers) as answer:
        assert answer.status == 200
        first = await answer.content.readuntil(b"\n\n")
        assert json.loads(first[6:])["choices"][0]["delta"]["content"] == "Hel"
        port = await mesh.stop_dispatch()
        rest = (await answer.content.read()).decode()
    assert "answer_interrupted" in rest
    assert "[DONE]" not in rest
    await mesh.start_dispatch(port)
    await eventually(lambda: len(mesh.dispatch.delivered) == 1)
    assert mesh.dispatch.delivered[0][1].outcome == JobOutcome.JOB_OUTCOME_FAILED


async def test_records_are_sent_again_on_a_new_link_until_acknowledged(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    mesh.dispatch.acknowledge = False
    await post(http, mesh)
    await eventually(lambda: len(mesh.dispatch.delivered) == 1)
    port = await mesh.stop_dispatch()
    mesh.dispatch.acknowledge = True
    await mesh.start_dispatch(port)
    await eventually(lambda: len(mesh.edge.dispatcher.deliveries) == 0)
    assert len(mesh.dispatch.delivered) == 2
    assert len({job_id for job_id, _ in mesh.dispatch.delivered}) == 1


async def test_a_drain_waits_for_jobs_and_their_records(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    mesh.dispatch.acknowledge = False
    mesh.dispatch.play = lambda job: job.say("Hel")
    async with http.post(mesh.base + CHAT, json=chat_body(stream=True), headers=mesh.headers) as answer:
        await answer.content.readuntil(b"\n\n")
        draining = asyncio.create_task(mesh.edge.drain(5))
        mesh.dispatch.last.done()
        assert b"[DONE]" in await answer.content.read()
    await eventually(lambda: len(mesh.dispatch.delivered) == 1)
    assert not draining.done()
    mesh.dispatch.acknowledge_all()
    assert await draining
    with pytest.raises(aiohttp.ClientConnectionError):
        await post(http, mesh)


async def test_a_count_beyond_the_bounds_is_not_believed(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    def play(job: PlayedJob) -> None:
        job.say("x")
        job.done(prompt_tokens=1_000_000, completion_tokens=1_000_000)

    mesh.dispatch.play = play
    _, body = await post(http, mesh, max_tokens=5)
    assert body["usage"]["completion_tokens"] == 1
    assert body["usage"]["prompt_tokens"] < 100

    def absurd(job: PlayedJob) -> None:
        job.say("x")
        job.done(prompt_tokens=-5, completion_tokens=-5)

    mesh.dispatch.play = absurd
    _, body = await post(http, mesh)
    assert (body["usage"]["completion_tokens"], body["usage"]["prompt_tokens"]) == (0, 0)
    await eventually(lambda: len(mesh.router.releases) == 2)
    assert min(mesh.router.releases.values()) == 0
