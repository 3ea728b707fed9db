"""How a node gets, keeps and renews its certificate."""

import asyncio
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from gpumesh.common.v1.link_pb2 import GoodbyeReason
from gpumesh_node.config import NodeSettings
from gpumesh_node.identity import Enrolment, validity
from gpumesh_runtime.clock import FakeClock, SystemClock
from gpumesh_runtime.config import ConfigError
from gpumesh_runtime.errors import Reason
from gpumesh_runtime.identity import node_uri
from gpumesh_runtime.lifecycle import StartError
from tests.support.node_process import running_node
from tests.support.node_registry import FakeRegistry
from tests.support.node_scheduler import FakeScheduler, NodeCertificates

ENGINES = '[{"kind": "mock", "model_id": "m"}]'


def settings(folder: Path, registry: FakeRegistry | None, certificates: NodeCertificates, **more: Any) -> NodeSettings:
    """Settings of a node that enrols."""
    given: dict[str, Any] = {
        "state_dir": folder / "state",
        "registry_address": registry.address if registry else "",
        "ca_file": certificates.ca.ca_file,
        "enrolment_token": "token",
        "engines": ENGINES,
        "ready_file": folder / "node.ready",
        "reconnect_min_s": 0.05,
        "reconnect_max_s": 0.2,
        "drain_s": 5.0,
    }
    return NodeSettings.read(**{**given, **more})


def mode(path: Path) -> int:
    """Permissions."""
    return stat.S_IMODE(path.stat().st_mode)


async def test_a_new_node_enrols_and_works(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with (
        FakeScheduler(certificates.scheduler) as scheduler,
        FakeRegistry(certificates.ca, [scheduler.address]) as registry,
    ):
        for _ in range(2):  # the second time from the state folder
            async with running_node(settings(tmp_path, registry, certificates)):
                await scheduler.ready()
                await scheduler.completed(scheduler.offer())
        assert (registry.enrolments, scheduler.hellos[0].node_id, scheduler.peers[0].provider_id) == (1, "n1", "p1")
    state = tmp_path / "state"
    assert mode(state) == 0o700
    assert {mode(state / name) for name in ("node.key", "node.crt", "ca.crt", "node.json")} == {0o600}


async def test_a_refused_token_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeRegistry(certificates.ca, ["x:1"]) as registry:
        enrolment = Enrolment(settings(tmp_path, registry, certificates, enrolment_token="wrong"), SystemClock())
        with pytest.raises(StartError, match="ENROLMENT_TOKEN_INVALID"):
            await enrolment.identity()


async def test_the_same_key_is_used_when_enrolment_is_repeated(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeRegistry(certificates.ca, ["x:1"]) as registry:
        enrolment = Enrolment(settings(tmp_path, registry, certificates), SystemClock())
        await enrolment.identity()
        key = (tmp_path / "state/node.key").read_bytes()
        (tmp_path / "state/node.crt").unlink()
        identity = await enrolment.identity()
        assert identity.schedulers == ("x:1",)
        assert (tmp_path / "state/node.key").read_bytes() == key


async def test_missing_settings_are_named(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    for missing, name in (({"enrolment_token": ""}, "TOKEN"), ({"ca_file": None}, "CA_FILE"), ({}, "REGISTRY_ADDRESS")):
        with pytest.raises(ConfigError, match=name):
            await Enrolment(settings(tmp_path, None, certificates, **missing), SystemClock()).identity()


async def test_a_registry_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeRegistry(certificates.ca, ["x:1"]) as registry:
        registry.refuse = Reason.UNAVAILABLE
        waiting = asyncio.create_task(Enrolment(settings(tmp_path, registry, certificates), SystemClock()).identity())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        registry.refuse = None
        assert (await asyncio.wait_for(waiting, 10)).node_id == "n1"


async def test_an_expired_certificate_is_renewed_before_the_start(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with FakeRegistry(certificates.ca, ["x:1"]) as registry:
        given = settings(tmp_path, registry, certificates)
        await Enrolment(given, SystemClock()).identity()
        later = FakeClock(SystemClock().now() + timedelta(days=3))
        await Enrolment(given, later).identity()
        assert (registry.enrolments, registry.renewals) == (1, 1)
        registry.refuse = Reason.NODE_REVOKED
        with pytest.raises(StartError, match="NODE_REVOKED"):
            await Enrolment(given, FakeClock(SystemClock().now() + timedelta(days=3))).identity()


async def test_half_way_the_certificate_is_renewed_and_the_session_opened_anew(tmp_path: Path) -> None:
    certificates = NodeCertificates(tmp_path)
    async with (
        FakeScheduler(certificates.scheduler) as scheduler,
        # Back-dated by five minutes, so that it is half over three seconds after it was made.
        FakeRegistry(certificates.ca, [scheduler.address], lifetime=timedelta(minutes=5, seconds=6)) as registry,
        running_node(settings(tmp_path, registry, certificates)),
    ):
        await scheduler.ready()
        registry.lifetime = timedelta(hours=24)
        await scheduler.until(lambda: len(scheduler.hellos) >= 2, 20)
        assert registry.renewals == 1
        assert [goodbye.reason for goodbye in scheduler.goodbyes] == [GoodbyeReason.GOODBYE_REASON_REAUTHENTICATE]
        await scheduler.ready()
        await scheduler.completed(scheduler.offer())
        assert scheduler.hellos[1].session_counter == scheduler.hellos[0].session_counter + 1


@pytest.mark.parametrize("lifetime", [timedelta(hours=1), timedelta(days=365 * 60)])
def test_validity_is_read_as_a_parser_reads_it(tmp_path: Path, lifetime: timedelta) -> None:
    tls = NodeCertificates(tmp_path).ca.issue_files("n", node_uri("p", "n"), lifetime=lifetime)
    assert tls.cert_file is not None
    pem = tls.cert_file.read_bytes()
    certificate = x509.load_pem_x509_certificate(pem)
    assert validity(pem) == (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    with pytest.raises(ValueError, match="not a certificate"):
        validity(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----")
