"""A router over real mTLS links between scripted peers."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gpumesh.common.v1.job_pb2 import Modality, SealedTicket, Ticket
from gpumesh.common.v1.link_pb2 import ItemKind
from gpumesh.metering.v1.balance_service_pb2 import Balance, BalanceUpdate
from gpumesh.registry.v1.directory_service_pb2 import Directory
from gpumesh.router.v1.admission_service_pb2 import Admission, AdmissionHello, AdmitRequest, Catalogue, Release
from gpumesh_router.__main__ import serve
from gpumesh_router.config import RouterSettings
from gpumesh_router.wire import TICKET_CONTEXT
from gpumesh_runtime.error_types import MeshError, Unauthenticated
from gpumesh_runtime.lifecycle import Life
from gpumesh_runtime.link import LinkClient, new_id
from gpumesh_runtime.reasons import Reason
from gpumesh_runtime.sealing import KeyRing, create_file
from tests.support.links import Recorder
from tests.support.ports import free_port
from tests.support.router_peers import LOOPBACK, Peers

KEY = hashlib.sha256(b"gm_live_k1_secret").digest()
METHOD = "/gpumesh.router.v1.AdmissionService/Connect"


class Mesh:
    """The router under test and the edge that asks it."""

    def __init__(self, peers: Peers, caller: LinkClient, seen: Recorder, ring: KeyRing) -> None:
        self.peers = peers
        self.caller = caller
        self.seen = seen
        self.ring = ring

    async def admit(self, *, key: bytes = KEY, job_id: bytes = b"", model: str = "tiny") -> Admission:
        """One admission. Raises the refusal."""
        request = AdmitRequest(
            key_id="k1",
            key_sha256=key,
            model=model,
            modality=Modality.MODALITY_CHAT,
            input_tokens_estimate=10,
            max_output_tokens=100,
            choices=1,
            attempt=1,
            deadline_ms=60_000,
            job_id=job_id or new_id(),
        )
        link = await self.caller.up(5)
        return Admission.FromString(await link.call(request.SerializeToString(), 5))

    async def until_ready(self) -> None:
        """Waits until the scheduler's capacity has come: before it, everyone is told that there is no scheduler."""
        async with asyncio.timeout(5):
            while not self.peers.scheduler.links:
                await asyncio.sleep(0.01)

    async def until(self, reason: Reason, *, within_s: float = 5.0) -> None:
        """Asks until the answer is this refusal. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    await self.admit()
                except MeshError as err:
                    if err.reason is reason:
                        return
                await asyncio.sleep(0.01)

    async def until_admitted(self, *, within_s: float = 5.0) -> None:
        """Asks until the answer is yes: releases and balances ride in the background. Raises TimeoutError."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    await self.admit()
                except MeshError:
                    await asyncio.sleep(0.01)
                else:
                    return


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    """A router that knows one key with credit."""
    create_file(tmp_path / "ring.json")
    async with Peers(tmp_path) as peers:
        peers.registry.keys[KEY] = "acct_a"
        peers.metering.balances["acct_a"] = 1_000_000
        peers.identity("spiffe://gpumesh.local/service/router")
        port, public = free_port(), free_port()
        settings = RouterSettings.read(
            internal_address=f"{LOOPBACK}:{port}",
            public_address=f"{LOOPBACK}:{public}",
            registry_address=peers.addresses["registry"],
            metering_address=peers.addresses["metering"],
            scheduler_addresses=(peers.addresses["scheduler"],),
            key_ring=tmp_path / "ring.json",
            tls_cert=tmp_path / "router.crt",
            tls_key=tmp_path / "router.key",
            tls_ca=peers.ca.ca_file,
        )
        life = Life(settings, "router")
        router = asyncio.ensure_future(life.supervise(lambda life: serve(settings, life)))
        seen = Recorder()
        hello = AdmissionHello(caller_id="test").SerializeToString()
        edge = peers.identity("spiffe://gpumesh.local/service/edge")
        caller = LinkClient(f"{LOOPBACK}:{port}", METHOD, credentials=edge, hello=lambda: hello, receiver=seen)
        running = asyncio.ensure_future(caller.run())
        try:
            await caller.up(10)
            await seen.until(lambda: any(Catalogue.FromString(item.body).prices for item in seen.items))
            made = Mesh(peers, caller, seen, KeyRing(tmp_path / "ring.json"))
            await made.until_ready()
            yield made
        finally:
            await caller.stop()
            running.cancel()
            await asyncio.wait([running])
            life.stop("test over")
            await router


async def test_an_admission_carries_a_ticket_that_others_can_check(mesh: Mesh) -> None:
    job_id = new_id()
    admission = await mesh.admit(job_id=job_id)
    sealed = SealedTicket.FromString(admission.ticket)
    assert mesh.ring.verify(TICKET_CONTEXT, sealed.key_id, sealed.body, sealed.mac)
    assert not mesh.ring.verify(b"gpumesh-receipt-v1", sealed.key_id, sealed.body, sealed.mac)
    ticket = Ticket.FromString(sealed.body)
    assert (ticket.job_id, ticket.account_id, ticket.model_id) == (job_id, "acct_a", "tiny")
    assert (ticket.scheduler_id, ticket.scheduler_boot_id) == ("s0", "boot1")
    assert (ticket.price.version, ticket.hold_nano_usd, ticket.max_output_tokens) == (1, 210, 100)
    assert 8 <= ticket.submit_by_time.seconds - time.time() <= 11
    assert admission.scheduler_address == "127.0.0.1:9"


async def test_a_key_is_asked_for_once_however_many_requests_wait(mesh: Mesh) -> None:
    await asyncio.gather(*(mesh.admit() for _ in range(50)))
    assert len(mesh.peers.registry.calls) == 1
    assert len(mesh.peers.metering.calls) == 1


async def test_a_revoked_key_is_refused_as_soon_as_the_registry_says_so(mesh: Mesh) -> None:
    await mesh.admit()
    started = time.monotonic()
    mesh.peers.registry.push(Directory(revoked_key_ids=["k1"]).SerializeToString())
    await mesh.until(Reason.REVOKED_API_KEY)
    assert time.monotonic() - started < 5


async def test_an_unknown_key_and_an_unknown_model_are_refused_with_their_reason(mesh: Mesh) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await mesh.admit(key=b"x" * 32)
    assert caught.value.reason is Reason.INVALID_API_KEY
    with pytest.raises(MeshError) as unknown:
        await mesh.admit(model="tinny")
    assert unknown.value.reason is Reason.UNKNOWN_MODEL
    assert unknown.value.metadata["near"] == "tiny"


async def test_a_balance_that_metering_pushes_as_empty_is_refused_and_filled_again(mesh: Mesh) -> None:
    await mesh.admit()
    empty = Balance(account_id="acct_a", available_nano_usd=0, version=2)
    mesh.peers.metering.push(BalanceUpdate(balances=[empty]).SerializeToString())
    await mesh.until(Reason.INSUFFICIENT_BALANCE)
    filled = Balance(account_id="acct_a", available_nano_usd=10**9, version=3)
    mesh.peers.metering.push(BalanceUpdate(balances=[filled]).SerializeToString())
    await mesh.until_admitted()


async def test_released_holds_are_free_again(mesh: Mesh) -> None:
    mesh.peers.metering.balances["acct_a"] = 1
    job_id = new_id()
    await mesh.admit(job_id=job_id)
    with pytest.raises(MeshError) as refused:
        await mesh.admit()
    assert refused.value.reason is Reason.INSUFFICIENT_BALANCE
    link = await mesh.caller.up(5)
    link.send_new(ItemKind.ITEM_KIND_RELEASE, id=job_id, body=Release(charge_nano_usd=0).SerializeToString())
    await mesh.until_admitted()


async def test_a_model_without_nodes_is_refused_only_after_a_while(mesh: Mesh) -> None:
    await mesh.admit()
    mesh.peers.scheduler.say(nodes=0)
    await mesh.admit()


async def test_a_body_that_is_no_admission_request_is_refused_and_the_link_goes_on(mesh: Mesh) -> None:
    link = await mesh.caller.up(5)
    with pytest.raises(MeshError) as refused:
        await link.call(b"\xff\xff\xff", 5)
    assert refused.value.reason is Reason.INVALID_ARGUMENT
    with pytest.raises(MeshError):
        await link.call(AdmitRequest(job_id=b"short").SerializeToString(), 5)
    await mesh.admit()
