"""The Python SDK against a front door over real TLS."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh_client import Answer, Client, MeshError, Reason
from gpumesh_runtime.errors import Unavailable
from tests.support.front_door import API_KEY, JOB_ID, FrontDoor, front_door, pieces
from tests.support.ports import free_port


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[FrontDoor]:
    async with front_door(tmp_path) as served:
        yield served


async def test_an_answer_grows_piece_by_piece_and_is_whole_at_the_end(door: FrontDoor) -> None:
    door.script = pieces("Hel", "lo")

    def ask() -> list[str | Answer]:
        with Client.from_file(door.client_file()) as mesh:
            return [chunk.answer or chunk.text for chunk in mesh.stream([("user", "Hi")], temperature=0.0, seed=7)]

    got = await asyncio.to_thread(ask)
    assert got[:2] == ["Hel", "lo"]
    assert got[2] == Answer(
        text="Hello",
        reasoning="",
        finish_reason="stop",
        model="test-model",
        job_id=JOB_ID.hex(),
        prompt_tokens=7,
        completion_tokens=2,
        charge_nano_usd=1_234,
    )
    (request,) = door.requests
    assert request.model == "test-model"
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "Hi")]
    assert (request.chat.HasField("temperature"), request.chat.seed) == (True, 7)
    assert not request.chat.HasField("max_tokens")


async def test_chat_gives_the_whole_answer(door: FrontDoor) -> None:
    door.script = pieces("Hello")
    with Client.from_file(door.client_file()) as mesh:
        answer = await asyncio.to_thread(mesh.chat, [("system", "Be brief."), ("user", "Hi")], max_tokens=5)
    assert answer.text == "Hello"
    assert door.requests[0].chat.max_tokens == 5


async def test_a_wrong_key_is_a_typed_error(door: FrontDoor) -> None:
    with Client.from_file(door.client_file("gm_live_wrong")) as mesh, pytest.raises(MeshError) as caught:
        await asyncio.to_thread(mesh.chat, [("user", "Hi")])
    assert caught.value.reason is Reason.INVALID_API_KEY


async def test_an_error_after_content_carries_its_reason(door: FrontDoor) -> None:
    door.script = [*pieces("Hel")[:2], MeshError.of(Reason.ANSWER_INTERRUPTED)]
    with Client.from_file(door.client_file()) as mesh, pytest.raises(MeshError) as caught:
        await asyncio.to_thread(mesh.chat, [("user", "Hi")])
    assert caught.value.reason is Reason.ANSWER_INTERRUPTED


async def test_leaving_a_stream_cancels_the_job(door: FrontDoor) -> None:
    door.script = [*pieces("Hel")[:2], None]

    def leave_after_the_first_piece() -> str:
        with Client.from_file(door.client_file()) as mesh:
            stream = mesh.stream([("user", "Hi")])
            first = next(stream)
            stream.close()
            return first.text

    assert await asyncio.to_thread(leave_after_the_first_piece) == "Hel"
    await asyncio.wait_for(door.cancelled.wait(), 5)


async def test_a_tls_handshake_over_a_long_way_is_waited_for(door: FrontDoor) -> None:
    """gRPC's min_reconnect_backoff_ms is its connect timeout: at 100 ms no distant client ever connected."""
    host, _, port = door.address.partition(":")

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            await asyncio.sleep(0.08)
            writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pass_on(reader, onward_writer), pass_on(onward_reader, writer))

    long_way = await asyncio.start_server(relay, "127.0.0.1", 0)
    target = f"127.0.0.1:{long_way.sockets[0].getsockname()[1]}"
    with Client(target, API_KEY, door.folder / "ca" / "ca.crt", timeout_s=10) as mesh:
        assert (await asyncio.to_thread(mesh.models)).models
    long_way.close()
    await long_way.wait_closed()


async def test_nobody_there_is_unavailable(door: FrontDoor) -> None:
    ca = door.folder / "ca" / "ca.crt"
    with Client(f"127.0.0.1:{free_port()}", "gm_live_x", ca, timeout_s=5) as mesh, pytest.raises(Unavailable):
        await asyncio.to_thread(mesh.models)


async def test_a_server_that_another_ca_vouches_for_is_not_talked_to(door: FrontDoor, tmp_path: Path) -> None:
    from gpumesh_runtime.ca import FileCa  # noqa: PLC0415 -- only this test needs a stranger

    stranger = FileCa.load_or_create(tmp_path / "stranger")
    with Client(door.address, "gm_live_x", stranger.ca_file, timeout_s=5) as mesh, pytest.raises(Unavailable):
        await asyncio.to_thread(mesh.models)
