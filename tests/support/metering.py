"""Evidence for metering's tests, and a whole metering in this process on free ports, with a CA and key ring of its own."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio

from gpumesh.common.v1.job_pb2 import JobOutcome, Modality, ModelBuild, Price, SealedTicket, Segment, Ticket, Usage
from gpumesh.metering.v1.settlement_service_pb2 import (
    EvidenceSource,
    NodeCount,
    PaidSegment,
    SegmentPay,
    Settle,
    Settled,
)
from gpumesh_metering.__main__ import serve
from gpumesh_metering.config import MeteringSettings
from gpumesh_metering.wire import TICKET_CONTEXT
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import operator_uri, service_uri
from gpumesh_runtime.lifecycle import Life
from gpumesh_runtime.rpc.client import channel
from gpumesh_runtime.sealing import KeyRing, create_file
from gpumesh_runtime.tls import TlsIdentity

COMPLETED = JobOutcome.JOB_OUTCOME_COMPLETED
CANCELLED = JobOutcome.JOB_OUTCOME_CANCELLED
FAILED = JobOutcome.JOB_OUTCOME_FAILED
FENCE = 1 << 16 | 1
_START_S = 30.0


def key_ring(folder: Path) -> KeyRing:
    """A ring with one key in a folder, made on first use."""
    create_file(folder / "ring.json")
    return KeyRing(folder / "ring.json")


def ticket(ring: KeyRing, job_id: bytes, **fields: object) -> bytes:
    """A sealed ticket, encoded: $1 per million tokens in, $2 out, a hold of $1, 1,000 output tokens, for an hour."""
    body = Ticket(
        job_id=job_id,
        account_id="acct_1",
        key_id="key_1",
        model_id="gpumesh-tiny",
        model_revision="r1",
        price=Price(version=3, input_nano_usd_per_mtok=10**9, output_nano_usd_per_mtok=2 * 10**9),
        hold_nano_usd=10**9,
        max_output_tokens=1000,
        input_tokens_estimate=100,
        modality=Modality.MODALITY_CHAT,
        attempt=1,
    )
    body.settle_by_time.FromSeconds(int(time.time()) + 3600)
    for name, value in fields.items():
        if name == "price":
            body.price.CopyFrom(value)  # type: ignore[arg-type]  # a Price
        elif name == "settle_by_s":
            body.settle_by_time.FromSeconds(value)  # type: ignore[arg-type]  # an int
        else:
            setattr(body, name, value)
    encoded = body.SerializeToString()
    key_id, mac = ring.seal(TICKET_CONTEXT, encoded)
    return SealedTicket(key_id=key_id, body=encoded, mac=mac).SerializeToString()


def paid(start: int, end: int, fence: int = FENCE, provider: str = "prov_1", node: str = "node_1") -> PaidSegment:
    """A segment."""
    build = ModelBuild(model_id="gpumesh-tiny", quantisation="F16", engine_name="llama.cpp", engine_version="b1")
    run = Segment(fence=fence, start_token=start, end_token=end)
    return PaidSegment(segment=run, provider_id=provider, node_id=node, build=build)


def settle(
    sealed: bytes,
    *,
    outcome: JobOutcome.ValueType = COMPLETED,
    prompt: int = 100,
    completion: int = 50,
    segments: Sequence[PaidSegment] | None = None,
    reason: str = "",
    counts: Sequence[NodeCount] | None = None,
) -> bytes:
    """A Settle, encoded: one segment of all completion tokens unless given."""
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
    return Settle(
        ticket=sealed,
        outcome=outcome,
        segments=[paid(0, completion)] if segments is None else segments,
        usage=usage,
        node_counts=[NodeCount(fence=FENCE, usage=usage)] if counts is None else counts,
        reason=reason,
        source=EvidenceSource.EVIDENCE_SOURCE_CALLER,
    ).SerializeToString()


def receipt_only(fence: int = FENCE) -> bytes:
    """A receipt without a record, encoded."""
    return Settle(receipt_only=True, node_counts=[NodeCount(fence=fence)]).SerializeToString()


@dataclass
class RunningMetering:
    """Address of a metering and what it takes to call it."""

    ca: FileCa
    ring: KeyRing
    address: str
    life: Life
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    def tls(self, uri: str) -> TlsIdentity:
        """A certificate for an identity, made on first use."""
        stem = uri.removeprefix("spiffe://").replace("/", "_")
        if (self.ca.folder / f"{stem}.crt").exists():
            return TlsIdentity(self.ca.folder / f"{stem}.crt", self.ca.folder / f"{stem}.key", self.ca.ca_file)
        return self.ca.issue_files(stem, uri)

    def channel(self, uri: str = operator_uri("test")) -> grpc.aio.Channel:
        """To the listener, as somebody; an operator by default."""
        made = channel(self.address, self.tls(uri))
        self._channels.append(made)
        return made

    async def close_channels(self) -> None:
        """At the end of the test."""
        for made in self._channels:
            await made.close()


@asynccontextmanager
async def running_metering(dsn: str, folder: Path, address: str = "127.0.0.1:0") -> AsyncIterator[RunningMetering]:
    """Starts a metering on a database and drains it afterwards. Several may share folder (CA, key ring) and database."""
    ring = key_ring(folder)
    ca = FileCa.load_or_create(folder / "ca")
    name = "metering"
    identity = ca.issue_files(name, service_uri("metering"))
    ready_file = folder / f"{name}-{time.monotonic_ns()}.ready"
    settings = MeteringSettings.read(
        database_url=dsn,
        address=address,
        key_ring=ring.path,
        tls_cert=identity.cert_file,
        tls_key=identity.key_file,
        tls_ca=identity.ca_file,
        ready_file=ready_file,
        drain_s=4.0,
    )
    life = Life(settings, name)
    process = asyncio.create_task(serve(life, settings), name=name)
    try:
        async with asyncio.timeout(_START_S):
            while not ready_file.exists():
                if process.done():
                    await process
                await asyncio.sleep(0.01)
        running = RunningMetering(ca, ring, f"localhost:{json.loads(ready_file.read_text())['port']}", life)
        try:
            yield running
        finally:
            await running.close_channels()
    finally:
        life.stop("test")
        await process
        life.remove_ready_file()
        await life.supervise(_nothing)


async def _nothing(_life: Life) -> None:
    """Lets Life cancel what it spawned, as at the end of a process."""


def each_settled(settled: Settled) -> list[tuple[bytes, Settled]]:
    """The jobs of a Settled of many, as if each had been answered by itself."""
    ids = [settled.job_ids[at : at + 16] for at in range(0, len(settled.job_ids), 16)]
    found = []
    for job_id, charge, fence, pay in zip(
        ids, settled.charges_nano_usd, settled.fences, settled.pays_nano_usd, strict=True
    ):
        one = Settled(pays=[SegmentPay(fence=fence, pay_nano_usd=pay)])
        one.charge.amount_nano_usd = charge
        found.append((job_id, one))
    return found
