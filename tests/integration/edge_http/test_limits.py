"""Bounds of the HTTP side, on a raw socket: requests that can be read in two ways, too much of anything, too slow in anything."""

import asyncio
import hashlib
import json
import ssl
import time
from pathlib import Path

import aiohttp
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from gpumesh.common.v1.job_pb2 import Model
from gpumesh.router.v1.admission_service_pb2 import AdmitRequest
from gpumesh_edge_http.limits import Limits
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.identity import service_uri
from tests.support.certificates import Certificates
from tests.support.edge_client import CHAT, RawClient, chat_body, events_of, post, raw_request, text_of
from tests.support.edge_peers import TINY, EdgeMesh, PlayedJob, eventually, make_key

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\n"
AMBIGUOUS = {
    "two lengths": HEAD + b"Host: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "the same length twice": HEAD + b"Host: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "length and chunks": HEAD + b"Host: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": HEAD + b"Host: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two hosts": HEAD + b"Host: a\r\nHost: b\r\nContent-Length: 0\r\n\r\n",
    "no host": HEAD + b"Content-Length: 0\r\n\r\n",
    "bare line feeds": b"POST /v1/chat/completions HTTP/1.1\nHost: a\nContent-Length: 0\n\n",
    "one bare line feed": HEAD + b"Host: a\nContent-Length: 0\r\n\r\n",
    "a space before the colon": HEAD + b"Host : a\r\nContent-Length: 0\r\n\r\n",
    "a signed length": HEAD + b"Host: a\r\nContent-Length: +5\r\n\r\nhello",
    "a folded header": HEAD + b"Host: a\r\nX-A: 1\r\n 2\r\nContent-Length: 0\r\n\r\n",
    "an unknown coding": HEAD + b"Host: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "not HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a line too long": b"POST /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a header too long": HEAD + b"Host: a\r\nX-A: " + b"a" * 9000 + b"\r\n\r\n",
    "too many headers": HEAD + b"Host: a\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(200)) + b"\r\n",
}


@pytest.mark.parametrize("request_bytes", list(AMBIGUOUS.values()), ids=list(AMBIGUOUS))
async def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(
    mesh: EdgeMesh, request_bytes: bytes
) -> None:
    async with RawClient(mesh) as client:
        client.send(request_bytes)
        status, headers = await client.head()
        body = await client.rest()
        assert status == 400
        assert headers["connection"] == "close"
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not mesh.router.admits


async def test_a_chunked_body_is_read(mesh: EdgeMesh) -> None:
    body = json.dumps(chat_body()).encode()
    head, _, _ = raw_request(mesh, b"").partition(b"Content-Length")
    async with RawClient(mesh) as client:
        client.send(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert (await client.answer())[0] == 200


async def test_a_declared_body_over_the_limit_is_refused_before_it_comes(mesh: EdgeMesh) -> None:
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh, b"{", length=(8 << 20) + 1))
        status, body = await client.answer()
        assert status == 413
        assert json.loads(body)["error"]["code"] == "payload_too_large"


async def test_a_chunked_body_over_the_limit_is_cut_off(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, max_body_bytes=4096) as mesh, RawClient(mesh) as client:
        head, _, _ = raw_request(mesh, b"").partition(b"Content-Length")
        client.send(head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"400\r\n" + b"x" * 1024 + b"\r\n") * 6)
        assert (await client.answer())[0] == 413


async def test_a_head_that_does_not_come_closes_the_connection(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, header_timeout_s=0.3) as mesh:
        async with RawClient(mesh) as silent, RawClient(mesh) as slow, RawClient(mesh) as used:
            slow.send(HEAD + b"Host: a\r\n")
            used.send(raw_request(mesh))
            await used.answer()
            used.send(b"POST ")
            for client in (silent, slow, used):
                assert await client.rest(4) == b""
        assert mesh.edge.server.head_timeouts == 3


async def test_a_body_slower_than_1_kib_per_second_is_refused(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, body_grace_s=0.2) as mesh, RawClient(mesh) as client:
        client.send(raw_request(mesh, b'{"model"', length=1000))
        status, body = await client.answer()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "request_timeout"


async def test_a_client_that_stops_reading_is_cut_off_and_its_job_cancelled(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, write_stall_s=0.5) as mesh:

        def flood(job: PlayedJob) -> None:
            for _ in range(30):
                job.say("x" * 16_000)

        mesh.dispatch.play = flood
        async with RawClient(mesh, receive_buffer=4096) as client:
            client.send(raw_request(mesh, stream=True))
            await client.head()
            await eventually(lambda: mesh.dispatch.last.cancelled == "CLIENT_TOO_SLOW", 6)
        assert mesh.edge.server.write_stalls == 1


async def test_other_media_types_methods_and_paths_are_refused(mesh: EdgeMesh, http: aiohttp.ClientSession) -> None:
    async def send(method: str, path: str, **kwargs: object) -> tuple[int, str]:
        async with http.request(method, mesh.base + path, **kwargs) as answer:  # type: ignore[arg-type]  # checked by aiohttp
            return answer.status, answer.headers.get("Allow", "")

    form = {**mesh.headers, "Content-Type": "text/plain"}
    packed = {**mesh.headers, "Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert (await send("POST", CHAT, data=b"{}", headers=form))[0] == 415
    assert (await send("POST", CHAT, data=b"{}", headers=packed))[0] == 415
    assert await send("GET", CHAT, headers=mesh.headers) == (405, "POST")
    assert await send("POST", "/v1/models", json={}, headers=mesh.headers) == (405, "GET")
    assert (await send("GET", "/v2", headers=mesh.headers))[0] == 404
    assert (await send("HEAD", "/health"))[0] == 200


async def test_deep_json_is_refused(mesh: EdgeMesh) -> None:
    async with RawClient(mesh) as client:
        client.send(
            raw_request(
                mesh, b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"x":' + b"[" * 40 + b"]" * 40 + b"}"
            )
        )
        status, body = await client.answer()
    assert status == 400
    assert "nest" in json.loads(body)["error"]["message"]


async def test_a_prompt_beyond_the_context_is_refused_before_admission(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    status, body = await post(http, mesh, messages=[{"role": "user", "content": "word " * 20_000}])
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "context_length_exceeded", "messages")
    assert "4096" in body["error"]["message"]
    assert not mesh.router.admits


async def test_an_address_that_keeps_failing_waits_but_good_keys_pass(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with EdgeMesh(tmp_path, auth_failures_burst=3, auth_failures_per_s=0.001) as mesh:
        assert (await post(http, mesh))[0] == 200
        mesh.router.refusal = _unknown_key
        wrong = {"Authorization": f"Bearer {make_key('k2')}"}
        statuses = [(await post(http, mesh, headers={}))[0], (await post(http, mesh, headers=wrong))[0]]
        statuses += [(await post(http, mesh, headers=wrong))[0] for _ in range(3)]
        assert statuses == [401, 401, 401, 429, 429]
        asked = len(mesh.router.admits)
        assert (await post(http, mesh, headers={}))[0] == 429
        assert len(mesh.router.admits) == asked, "the router is spared"
        assert (await post(http, mesh))[0] == 200


def _unknown_key(request: AdmitRequest) -> MeshError | None:
    return None if request.key_id == "k1" else MeshError.of(Reason.INVALID_API_KEY, "The API key is not valid.")


async def test_comments_keep_a_waiting_stream_open_and_a_later_failure_is_an_event(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, keep_alive_comment_s=0.01) as mesh, RawClient(mesh) as client:
        mesh.dispatch.play = lambda job: None
        client.send(raw_request(mesh, stream=True))
        assert (await client.head())[0] == 200
        await client.reader.readuntil(b": keep-alive\n\n")
        mesh.dispatch.last.fail(MeshError.of(Reason.ENGINE_ERROR, "It failed."))
        rest = await client.reader.readuntil(b"\r\n0\r\n\r\n")
        assert b'"code":"engine_error"' in rest
        assert b"[DONE]" not in rest


async def test_more_connections_than_allowed_are_closed(tmp_path: Path) -> None:
    async with EdgeMesh(tmp_path, max_connections=2) as mesh, RawClient(mesh), RawClient(mesh):
        await eventually(lambda: mesh.edge.server.connections == 2)
        async with RawClient(mesh) as third:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await third.head()


async def test_an_answer_that_takes_too_long_is_ended(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    async with EdgeMesh(tmp_path, deadline_s=1.0) as mesh:
        mesh.dispatch.play = lambda job: None
        began = time.monotonic()
        status, body = await post(http, mesh)
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert time.monotonic() - began < 3
        await eventually(lambda: mesh.dispatch.last.cancelled == "DEADLINE_EXCEEDED")


async def test_a_prompt_near_the_context_is_counted_with_the_models_tokenizer(
    mesh: EdgeMesh, http: aiohttp.ClientSession
) -> None:
    words = Tokenizer(models.WordLevel({"word": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    file = words.to_str().encode()
    sha256 = hashlib.sha256(file).hexdigest()
    counted = Model()
    counted.CopyFrom(TINY)
    counted.tokenizer_sha256 = sha256
    mesh.router.tokenizers[sha256] = file
    mesh.router.models = [counted]
    mesh.router.publish()
    find = mesh.edge.models.find
    await eventually(lambda: (found := find("tiny")) is not None and found.tokenizer_sha256 == sha256)
    assert (await post(http, mesh, messages=[{"role": "user", "content": "word " * 4000}]))[0] == 200
    assert mesh.router.admits[-1].input_tokens_estimate == 4000 + 2 * TINY.template_overhead_tokens
    status, body = await post(http, mesh, messages=[{"role": "user", "content": "word " * 4100}])
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "4096" in body["error"]["message"]
    assert "4100" in body["error"]["message"]


async def test_clients_may_come_over_tls(tmp_path: Path) -> None:
    tls = Certificates(tmp_path / "ca").uri(service_uri("edge"))
    context = ssl.create_default_context(cafile=str(tls.ca_file))
    async with EdgeMesh(tmp_path, http_tls_cert=tls.cert_file, http_tls_key=tls.key_file) as mesh:
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(connector=connector) as http:
            url = f"https://127.0.0.1:{mesh.edge.server.port}{CHAT}"
            async with http.post(url, json=chat_body(stream=True), headers=mesh.headers) as answer:
                assert text_of(events_of(await answer.text())) == "Hello world"


async def test_bodies_that_come_in_together_are_bounded(mesh: EdgeMesh) -> None:
    mesh.edge.server.limits = Limits(max_uploading_bytes=100_000)
    async with RawClient(mesh) as first, RawClient(mesh) as second:
        first.send(raw_request(mesh, b"{" + b" " * 80_000, length=200_000))
        await eventually(lambda: mesh.edge.server.uploads.bytes > 80_000)
        second.send(raw_request(mesh, b"{" + b" " * 80_000, length=200_000))
        assert (await second.answer())[0] == 429
        assert mesh.edge.server.uploads.bytes > 80_000
    await eventually(lambda: mesh.edge.server.uploads.bytes == 0)


async def test_answers_during_a_drain_say_that_the_connection_closes(mesh: EdgeMesh) -> None:
    mesh.dispatch.play = lambda job: None
    async with RawClient(mesh) as client:
        client.send(raw_request(mesh))
        await eventually(lambda: len(mesh.dispatch.jobs) == 1)
        draining = asyncio.create_task(mesh.edge.drain(5))
        await eventually(lambda: mesh.edge.dispatcher.draining)
        mesh.dispatch.last.say("x")
        mesh.dispatch.last.done()
        status, headers = await client.head()
        assert (status, headers["connection"]) == (200, "close")
        assert await draining
