"""Who this node is: a key that it makes itself, a certificate that the registry gives for it, and the renewal at half life.

State folder: node.key and node.crt (PEM, 0600), ca.crt (what schedulers' certificates must chain to), node.json (schedulers named at
enrolment). The key never leaves the machine.
"""

import asyncio
import base64
import json
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gpumesh.registry.v1 import enrolment_service_pb2 as enrolment
from gpumesh.registry.v1.enrolment_service_pb2_grpc import EnrolmentServiceStub
from gpumesh_node.child import Child
from gpumesh_node.config import NodeSettings
from gpumesh_runtime.clock import Clock
from gpumesh_runtime.config import ConfigError
from gpumesh_runtime.errors import MeshError, Reason
from gpumesh_runtime.files import write_private
from gpumesh_runtime.lifecycle import StartError
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.rpc import client
from gpumesh_runtime.tls import TlsIdentity

log = get_logger("gpumesh.node.identity")
_CALL_S: Final = 10.0
_RETRY_FIRST_S: Final = 1.0
_RETRY_MOST_S: Final = 60.0
# DER: SEQUENCE of two times, each UTCTime (0x17, 13 characters) or GeneralizedTime (0x18, 15).
_TIME: Final = rb"(?:\x17\x0d|\x18\x0f)(\d{12,14}Z)"
_VALIDITY: Final = re.compile(rb"\x30." + _TIME + _TIME, re.DOTALL)
# The registry cannot mend these by waiting.
_FATAL: Final = frozenset(
    (
        Reason.ENROLMENT_TOKEN_INVALID,
        Reason.CERTIFICATE_INVALID,
        Reason.NODE_REVOKED,
        Reason.PERMISSION_DENIED,
        Reason.INVALID_ARGUMENT,
    )
)


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """An enrolled node. tls: its files. schedulers: host:port, as enrolment named them."""

    node_id: str
    provider_id: str
    tls: TlsIdentity
    schedulers: tuple[str, ...]


class Enrolment:
    """The identity in a state folder and its way to the registry."""

    def __init__(self, settings: NodeSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        folder = settings.state_dir
        self._key = folder / "node.key"
        self._certificate = folder / "node.crt"
        self._ca = folder / "ca.crt"
        self._facts = folder / "node.json"

    async def identity(self) -> NodeIdentity:
        """The node's identity: from the files, else by enrolment, trying until the registry answers.

        Raises ConfigError when settings are missing, StartError when the registry refuses.
        """
        settings = self._settings
        if settings.tls_cert is not None:
            return self._made(settings.tls(), settings.scheduler_addresses)
        try:
            settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            settings.state_dir.chmod(0o700)
        except OSError as err:
            raise StartError(f"the state folder {settings.state_dir} cannot be used: {err.strerror}") from err
        if not (self._key.exists() and self._certificate.exists() and self._ca.exists()):
            await self._until_done(self._enrol, "enrolment")
        elif self.certificate_times()[1] <= self._clock.now():
            await self._renew_or_enrol()
        tls = TlsIdentity(self._certificate, self._key, self._ca)
        return self._made(tls, settings.scheduler_addresses or self._known_schedulers())

    def certificate_times(self) -> tuple[datetime, datetime]:
        """Begin and end of the certificate, UTC."""
        path = self._settings.tls_cert or self._certificate
        return validity(path.read_bytes())

    async def keep_renewed(self, on_renewed: Callable[[], Awaitable[None]]) -> None:
        """Renews at half life, for ever; calls on_renewed after each. Does nothing for a ready certificate from settings."""
        if self._settings.tls_cert is not None:
            return
        wait = _RETRY_FIRST_S
        while True:
            begin, end = self.certificate_times()
            due = begin + (end - begin) / 2
            left = (due - self._clock.now()).total_seconds()
            if left > 0:
                # Not in one sleep: a laptop that slept must notice soon that its certificate is old.
                await asyncio.sleep(min(left, 60.0))
                continue
            try:
                await self.renew()
            except MeshError as err:
                log.warning(
                    "certificate was not renewed",
                    reason=err.reason.value,
                    certificate_end=end.isoformat(),
                    after_s=round(wait),
                )
                await asyncio.sleep(random.uniform(0.5, 1.0) * wait)  # noqa: S311 -- jitter, not a secret
                wait = min(2 * wait, _RETRY_MOST_S)
                continue
            wait = _RETRY_FIRST_S
            await on_renewed()

    async def renew(self) -> None:
        """One renewal. Raises MeshError."""
        csr = await _signing_request(self._key)
        request = enrolment.RenewCertificateRequest(certificate_pem=self._certificate.read_text(), csr_der=csr)
        async with client.channel(
            self._registry(),
            TlsIdentity.ca_only(self._settings.ca_file or self._ca),
            server_name=self._settings.registry_server_name,
        ) as channel:
            answer = await client.unary(EnrolmentServiceStub(channel).RenewCertificate, request, _CALL_S)
        write_private(self._ca, answer.ca_pem.encode())
        write_private(self._certificate, answer.certificate_pem.encode())
        log.info("certificate renewed", certificate_end=answer.expire_time.ToDatetime().isoformat())

    async def _renew_or_enrol(self) -> None:
        """The certificate has ended: renews it, or enrols anew when it is too old for that and a token is there."""
        try:
            await self._until_done(self.renew, "renewal")
        except StartError:
            if not self._settings.enrolment_token.get_secret_value():
                raise
            log.warning("certificate cannot be renewed, enrolling anew")
            await self._until_done(self._enrol, "enrolment")

    async def _enrol(self) -> None:
        settings = self._settings
        token = settings.enrolment_token.get_secret_value()
        if not token:
            raise ConfigError(["GPUMESH_NODE_ENROLMENT_TOKEN: is not set, and the state folder holds no certificate"])
        if settings.ca_file is None:
            raise ConfigError(["GPUMESH_NODE_CA_FILE: is not set; it is needed to enrol"])
        # A key from an earlier try is kept: the same token and key give the same node again.
        request = enrolment.EnrolNodeRequest(enrolment_token=token, csr_der=await _signing_request(self._key))
        tls = _ca_only(settings.ca_file)
        async with client.channel(self._registry(), tls, server_name=settings.registry_server_name) as channel:
            answer = await client.unary(EnrolmentServiceStub(channel).EnrolNode, request, _CALL_S)
        write_private(self._ca, answer.ca_pem.encode())
        write_private(self._facts, json.dumps({"scheduler_addresses": list(answer.scheduler_addresses)}).encode())
        write_private(self._certificate, answer.certificate_pem.encode())
        log.info("enrolled", node_id=answer.node_id, provider_id=answer.provider_id)

    async def _until_done(self, step: Callable[[], Awaitable[None]], name: str) -> None:
        """Repeats a step while the registry cannot be reached: every start order works."""
        wait = _RETRY_FIRST_S
        while True:
            try:
                await step()
                return
            except MeshError as err:
                if err.reason in _FATAL:
                    raise StartError(f"{name} was refused: {err.message} ({err.reason.value})") from err
                log.warning("registry cannot be reached", action=name, reason=err.reason.value, after_s=round(wait))
            await asyncio.sleep(random.uniform(0.5, 1.0) * wait)  # noqa: S311 -- jitter, not a secret
            wait = min(2 * wait, _RETRY_MOST_S)

    def _registry(self) -> str:
        if not self._settings.registry_address:
            raise ConfigError(["GPUMESH_NODE_REGISTRY_ADDRESS: is not set; it is needed to enrol and to renew"])
        return self._settings.registry_address

    def _known_schedulers(self) -> tuple[str, ...]:
        try:
            return tuple(str(address) for address in json.loads(self._facts.read_text())["scheduler_addresses"])
        except (OSError, ValueError, KeyError, TypeError):
            return ()

    def _made(self, tls: TlsIdentity, schedulers: tuple[str, ...]) -> NodeIdentity:
        if not schedulers:
            raise ConfigError(["GPUMESH_NODE_SCHEDULER_ADDRESSES: is not set, and enrolment named no scheduler"])
        who = tls.identity
        if not who.node_id:
            raise ConfigError(["the certificate is not a node's"])
        return NodeIdentity(who.node_id, who.provider_id, tls, schedulers)


def validity(certificate_pem: bytes) -> tuple[datetime, datetime]:
    """Begin and end of the first certificate in a PEM file, UTC. Raises ValueError.

    Without an X.509 parser, which costs 15 MB: a validity is two times after each other, and no other field of ours holds times.
    """
    der = base64.b64decode(certificate_pem.partition(b"-----BEGIN CERTIFICATE-----")[2].partition(b"-----END")[0])
    match = _VALIDITY.search(der)
    if match is None:
        raise ValueError("not a certificate")
    begin, end = (_time(match[group].decode("ascii")) for group in (1, 2))
    return begin, end


def _time(text: str) -> datetime:
    """UTCTime (two digits of the year, 1950-2049) or GeneralizedTime (four)."""
    if len(text) == 13:
        text = ("19" if text >= "5" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


async def _signing_request(key: Path) -> bytes:
    """A request for a certificate with the key in the file, which is made if absent. Raises StartError."""
    child = await Child.start("gpumesh_node.signing_request", [str(key)])
    try:
        child.close_stdin()
        der, trouble = await asyncio.gather(child.stdout.read(), child.stderr.read())
        if await child.wait() != 0:
            last = trouble.decode(errors="replace").strip().rpartition("\n")[2]
            raise StartError(f"no signing request could be made with the key {key}: {last[:200]}")
    finally:
        child.close()
    return der


def _ca_only(path: Path) -> TlsIdentity:
    try:
        return TlsIdentity.ca_only(path)
    except OSError as err:
        raise ConfigError([f"GPUMESH_NODE_CA_FILE: cannot read {path}: {err.strerror}"]) from None
