"""Clients that go away, at five points: the scheduler hears of it, nothing stays behind. And readers that are slow."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpumesh.common.v1.job_pb2 import JobOutcome
from gpumesh_dispatch.running import DEFAULT_WINDOW_BYTES
from gpumesh_edge_http.limits import Limits
from gpumesh_runtime.link import SendWindow, Window
from tests.support.edge_client import RawClient, raw_request
from tests.support.edge_peers import EdgeMesh, PlayedJob, eventually, hello_world

CANCEL_WITHIN_S = 0.5


async def gone(mesh: EdgeMesh) -> None:
    """Nothing runs, nobody is connected, all records are acknowledged."""
    await eventually(
        lambda: (
            not mesh.edge.dispatcher.jobs
            and not mesh.edge.app.sinks
            and not mesh.edge.server.connections
            and len(mesh.edge.dispatcher.deliveries) == 0
        )
    )


async def test_gone_during_the_upload(mesh: EdgeMesh) -> None:
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh, b'{"model": "tiny", ', length=500))
        await eventually(lambda: mesh.edge.server.connections == 1)
    await gone(mesh)
    assert not mesh.router.admits


async def test_gone_while_admission_is_decided(mesh: EdgeMesh) -> None:
    mesh.router.silent = True
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh))
        await eventually(lambda: len(mesh.router.admits) == 1)
    await gone(mesh)
    assert not mesh.dispatch.jobs


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
async def test_gone_while_queued(mesh: EdgeMesh, streamed: bool) -> None:
    mesh.dispatch.play = lambda job: None
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh, stream=streamed))
        await eventually(lambda: len(mesh.dispatch.jobs) == 1)
    await eventually(lambda: mesh.dispatch.last.cancelled == "CLIENT_GONE", CANCEL_WITHIN_S)
    await gone(mesh)
    record = mesh.dispatch.delivered[0][1]
    assert record.outcome == JobOutcome.JOB_OUTCOME_CANCELLED
    assert not record.segments


async def test_gone_during_prefill_after_comments_were_sent(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, keep_alive_comment_s=0.01) as mesh:
        mesh.dispatch.play = lambda job: None
        async with RawClient(mesh) as client:
            client.send(raw_request(mesh, stream=True))
            status, headers = await client.head()
            assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert b": keep-alive\n\n" in await client.reader.readuntil(b"\n\n")
        await eventually(lambda: mesh.dispatch.last.cancelled == "CLIENT_GONE", CANCEL_WITHIN_S)
        await gone(mesh)


async def test_gone_while_streaming(mesh: EdgeMesh) -> None:
    def play(job: PlayedJob) -> None:
        for _ in range(3):
            job.say("word ")

    mesh.dispatch.play = play
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh, stream=True))
        await client.head()
    await eventually(lambda: mesh.dispatch.last.cancelled == "CLIENT_GONE", CANCEL_WITHIN_S)
    await gone(mesh)
    record = mesh.dispatch.delivered[0][1]
    assert record.outcome == JobOutcome.JOB_OUTCOME_CANCELLED
    assert record.segments[0].end_token == record.usage.completion_tokens == 3
    job_id = mesh.dispatch.last.job_id
    assert mesh.router.releases[job_id] == record.usage.prompt_tokens * 1000 + 3 * 2000


async def test_gone_during_an_answer_that_is_not_streamed(mesh: EdgeMesh) -> None:
    mesh.dispatch.play = lambda job: job.say("half")
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh))
        await eventually(lambda: bool(mesh.dispatch.jobs) and mesh.dispatch.last.seq == 1)
    await eventually(lambda: mesh.dispatch.last.cancelled == "CLIENT_GONE", CANCEL_WITHIN_S)
    await gone(mesh)


async def test_late_frames_of_a_cancelled_job_are_dropped(mesh: EdgeMesh) -> None:
    mesh.dispatch.play = lambda job: job.say("a")
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh, stream=True))
        await client.head()
    await gone(mesh)
    mesh.dispatch.last.say("b")
    mesh.dispatch.last.done()
    async with RawClient(mesh) as client:
        mesh.dispatch.play = lambda job: job.done()
        client.send(raw_request(mesh))
        assert (await client.answer())[0] == 200


class Fountain:
    """A node that sends frames of 4 KiB as far as its window lets it, `total` of them."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent_bytes = 0
        self._job: PlayedJob | None = None
        self._window = SendWindow(DEFAULT_WINDOW_BYTES)
        self._seen = 0

    def __call__(self, job: PlayedJob) -> None:
        self._job = job
        job.link.open_flow(job.job_id, self._opened)
        self.pump()

    def _opened(self, window: Window) -> None:
        self._window.on_window(window)
        self.pump()

    def pump(self) -> None:
        """Sends what the window allows."""
        job = self._job
        assert job is not None
        while job.seq < self.total and self._window.can_send(4096 + 256):
            job.say("x" * 4090)
            self.sent_bytes += 4096
            self._window.sent(4096 + 256)
        if job.seq == self.total:
            job.seq, self.total = job.seq, -1
            job.done()
            job.link.close_flow(job.job_id)


async def test_a_slow_reader_holds_a_bounded_amount_and_goes_on_when_it_reads(mesh: EdgeMesh) -> None:
    total = 1024  # 4 MiB
    fountain = Fountain(total)
    mesh.dispatch.play = fountain
    async with RawClient(mesh, receive_buffer=65536) as client:
        client.send(raw_request(mesh, stream=True))
        await client.head()
        held = await _settled(lambda: fountain.sent_bytes)
        # The kernel's buffers: ours (the setting, doubled by the kernel), the client's (64 KiB, doubled), and the loopback between.
        kernel = 2 * Limits().send_buffer_bytes + 2 * 65536
        assert held < 256 * 1024 + kernel
        assert mesh.edge.dispatcher.jobs
        text = b""
        async with asyncio.timeout(20):
            while b"[DONE]" not in text[-64:]:
                part = await client.reader.read(65536)
                assert part
                text += part
    assert text.count(b"x") >= total * 4090
    await gone(mesh)


async def _settled(value: Callable[[], int]) -> int:
    """The value once it has not changed for 0.15 s."""
    last, since = -1, time.monotonic()
    async with asyncio.timeout(10):
        while True:
            now = value()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > 0.15:
                return last
            await asyncio.sleep(0.01)


async def test_other_streams_go_on_while_one_reader_is_stuck(mesh: EdgeMesh) -> None:
    fountain = Fountain(1024)
    mesh.dispatch.play = fountain
    async with RawClient(mesh, receive_buffer=65536) as stuck, RawClient(mesh) as other:
        stuck.send(raw_request(mesh, stream=True))
        await stuck.head()
        await _settled(lambda: fountain.sent_bytes)
        mesh.dispatch.play = hello_world
        other.send(raw_request(mesh, stream=True))
        await other.head()
        async with asyncio.timeout(2):
            assert b"[DONE]" in await other.reader.readuntil(b"[DONE]")
    await gone(mesh)
