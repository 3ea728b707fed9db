"""A scheduler's session side, as far as a node sees it: real links and certificates, offers on demand, everything recorded."""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumesh.common.v1.job_pb2 import Modality
from gpumesh.common.v1.link_pb2 import Failure, Goodbye, Item, ItemFlag, ItemKind, Window
from gpumesh.node.v1 import session_pb2
from gpumesh.scheduler.v1 import (
    session_service_pb2,  # noqa: F401 -- registers the service's descriptor, which its grpc module does not
    session_service_pb2_grpc,
)
from gpumesh_runtime.ca import FileCa
from gpumesh_runtime.identity import Identity, node_uri, service_uri
from gpumesh_runtime.link import Link, LinkEnd, LinkServer
from gpumesh_runtime.rpc.server import Server
from gpumesh_runtime.tls import TlsIdentity

FENCE = (1 << 16) | 1
TOKEN = b"opaque receipt token"


def chat(text: str = "hello", **fields: Any) -> bytes:
    """An OpenAI request body."""
    return json.dumps({"model": "any", "messages": [{"role": "user", "content": text}], **fields}).encode()


@dataclass
class NodeJob:
    """What a node said about one job."""

    id: bytes
    fence: int
    accepts: list[session_pb2.Accept] = field(default_factory=list)
    rejects: list[session_pb2.Reject] = field(default_factory=list)
    frames: list[Item] = field(default_factory=list)
    dones: list[Item] = field(default_factory=list)
    errors: list[Item] = field(default_factory=list)
    cancel_acks: list[Item] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    @property
    def deltas(self) -> list[session_pb2.Delta]:
        """All deltas in order; a frame that came twice counts once."""
        seen: dict[int, Item] = {}
        for item in self.frames:
            seen.setdefault(item.seq, item)
        return [delta for seq in sorted(seen) for delta in session_pb2.Frame.FromString(seen[seq].body).deltas]

    @property
    def text(self) -> str:
        """The answer's text, all choices after each other as they came."""
        return "".join(delta.text for delta in self.deltas)

    @property
    def done(self) -> session_pb2.Done:
        """The body of the only Done."""
        (item,) = self.dones
        return session_pb2.Done.FromString(item.body)

    @property
    def failure(self) -> Failure:
        """The body of the only Error."""
        (item,) = self.errors
        return Failure.FromString(item.body)

    @property
    def cancel_ack(self) -> session_pb2.CancelAck:
        """The body of the only CancelAck."""
        (item,) = self.cancel_acks
        return session_pb2.CancelAck.FromString(item.body)


class _Servicer(session_service_pb2_grpc.SessionServiceServicer):
    def __init__(self, links: LinkServer) -> None:
        self._links = links

    async def Connect(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # stream methods read through the context
        await self._links.serve(request_iterator, context)


class FakeScheduler:
    """One scheduler. Async context manager; `port` 0 takes a free one, and `restart` uses the same again."""

    def __init__(
        self, tls: TlsIdentity, *, scheduler_id: str = "s1", welcome: session_pb2.Welcome | None = None
    ) -> None:
        self.hellos: list[session_pb2.Hello] = []
        self.peers: list[Identity] = []
        self.statuses: list[session_pb2.Status] = []
        self.receipts: list[tuple[bytes, int, session_pb2.Receipt]] = []
        self.goodbyes: list[Goodbye] = []
        self.ends: list[LinkEnd] = []
        self.jobs: dict[tuple[bytes, int], NodeJob] = {}
        self.link: Link | None = None
        self.welcome = welcome or session_pb2.Welcome(
            scheduler_id=scheduler_id, scheduler_boot_id=os.urandom(4).hex(), heartbeat_ms=100
        )
        self._tls = tls
        self._server: Server | None = None
        self._port = 0
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "FakeScheduler":
        await self.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """host:port."""
        return f"localhost:{self._port}"

    async def start(self) -> None:
        """Listens, on the port of last time if there was one."""
        self._links = LinkServer(self, self._on_hello)
        self._server = Server("fake-scheduler", f"localhost:{self._port}", self._tls)
        self._server.add(_Servicer(self._links), session_service_pb2_grpc.add_SessionServiceServicer_to_server)
        await self._server.start()
        self._port = self._server.port

    async def stop(self) -> None:
        """Cuts everything, as a killed process does."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    # --- Receiver ---------------------------------------------------------------------------------------------------------

    def _on_hello(self, hello: bytes, peer: Identity) -> bytes:
        self.hellos.append(session_pb2.Hello.FromString(hello))
        self.peers.append(peer)
        return self.welcome.SerializeToString()

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """The node's session."""
        self.link = link
        self._changed.set()

    def on_item(self, link: Link, item: Item) -> None:
        """Recorded."""
        job = self.jobs.setdefault((item.id, item.fence), NodeJob(item.id, item.fence)) if item.id else None
        if job is not None:
            job.kinds.append(item.kind)
        match item.kind:
            case ItemKind.ITEM_KIND_HEARTBEAT:
                self.statuses.append(session_pb2.Status.FromString(item.body))
            case ItemKind.ITEM_KIND_RECEIPT:
                self.receipts.append((item.id, item.fence, session_pb2.Receipt.FromString(item.body)))
            case ItemKind.ITEM_KIND_ACCEPT if job:
                job.accepts.append(session_pb2.Accept.FromString(item.body))
            case ItemKind.ITEM_KIND_REJECT if job:
                job.rejects.append(session_pb2.Reject.FromString(item.body))
            case ItemKind.ITEM_KIND_FRAME if job:
                job.frames.append(item)
            case ItemKind.ITEM_KIND_DONE if job:
                job.dones.append(item)
                if only := session_pb2.Done.FromString(item.body).frame:
                    header = Item()
                    header.CopyFrom(item)
                    header.body = only
                    job.frames.append(header)
            case ItemKind.ITEM_KIND_ERROR if job:
                job.errors.append(item)
            case ItemKind.ITEM_KIND_CANCEL_ACK if job:
                job.cancel_acks.append(item)
        self._changed.set()

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """Recorded."""
        self.goodbyes.append(goodbye)
        self._changed.set()

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Recorded."""
        self.ends.append(end)
        if self.link is link:
            self.link = None
        self._changed.set()

    # --- what tests do ----------------------------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        """Waits until the condition holds, looking after each item. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def up(self) -> Link:
        """The node's session, waiting for it."""
        await self.until(lambda: self.link is not None)
        assert self.link is not None
        return self.link

    async def ready(self, model_id: str = "m") -> None:
        """Waits until the node says that a model answers."""

        def is_ready() -> bool:
            told = [*(hello.status for hello in self.hellos[-1:]), *self.statuses[-1:]]
            return any(
                model.build.model_id == model_id and model.state == session_pb2.MODEL_STATE_READY
                for status in told
                for model in status.models
            )

        await self.until(is_ready, 60.0)
        await self.up()

    def offer(
        self,
        payload: bytes | None = None,
        *,
        job_id: bytes = b"",
        fence: int = FENCE,
        streaming: bool = True,
        pieces: int = 0,
        **fields: Any,
    ) -> NodeJob:
        """Offers a job; with `pieces` the payload follows in that many."""
        assert self.link is not None
        body = chat() if payload is None else payload
        offer = session_pb2.Offer(
            model_id=fields.pop("model_id", "m"),
            modality=Modality.MODALITY_CHAT,
            max_output_tokens=fields.pop("max_output_tokens", 64),
            receipt_token=TOKEN,
            streaming=streaming,
            **fields,
        )
        if pieces:
            offer.payload_bytes = len(body)
        else:
            offer.payload = body
        job = NodeJob(job_id or os.urandom(16), fence)
        self.jobs[(job.id, fence)] = job
        first_last = ItemFlag.ITEM_FLAG_FIRST | (0 if pieces else ItemFlag.ITEM_FLAG_LAST)
        self.link.send_new(
            ItemKind.ITEM_KIND_OFFER, id=job.id, fence=fence, flags=first_last, body=offer.SerializeToString()
        )
        size = -(-len(body) // pieces) if pieces else 0
        for number in range(pieces):
            last = ItemFlag.ITEM_FLAG_LAST if number == pieces - 1 else 0
            piece = body[number * size : (number + 1) * size]
            self.link.send_new(
                ItemKind.ITEM_KIND_PAYLOAD, id=job.id, fence=fence, seq=number + 1, flags=last, body=piece
            )
        return job

    def window(self, job: NodeJob, consumed_seq: int, limit_bytes: int = 0) -> None:
        """Tells the node how far the caller is."""
        assert self.link is not None
        body = Window(consumed_seq=consumed_seq, limit_bytes=limit_bytes).SerializeToString()
        self.link.send_new(ItemKind.ITEM_KIND_WINDOW, id=job.id, fence=job.fence, body=body)

    def ack(self, job_id: bytes, fence: int = FENCE, reason: str = "") -> None:
        """Metering has settled it."""
        assert self.link is not None
        body = session_pb2.ReceiptAck(fence=fence, reason=reason).SerializeToString()
        self.link.send_new(ItemKind.ITEM_KIND_RECEIPT_ACK, id=job_id, fence=fence, body=body)

    async def completed(self, job: NodeJob, timeout_s: float = 30.0) -> NodeJob:
        """Waits for the job's end and checks what every complete answer has in common."""
        await self.until(lambda: job.dones or job.errors or job.rejects or job.cancel_acks, timeout_s)
        assert not job.rejects, job.rejects
        assert not job.errors, job.failure
        assert job.dones, "cancelled"
        assert [item.seq for item in job.frames] == list(range(1, len(job.frames) + 1))
        tokens = [item.tokens for item in job.frames]
        assert tokens == sorted(tokens)
        assert job.dones[0].seq == len(job.frames)
        assert job.dones[0].flags & ItemFlag.ITEM_FLAG_LAST
        if job.frames:
            assert job.frames[0].flags & ItemFlag.ITEM_FLAG_FIRST
        assert job.done.receipt_token == TOKEN
        return job

    async def ended(self, job: NodeJob) -> NodeJob:
        """Waits for the job's end, whatever it is."""
        await self.until(lambda: job.dones or job.errors or job.rejects or job.cancel_acks)
        return job


class NodeCertificates:
    """A CA with a scheduler's and nodes' certificates for localhost."""

    def __init__(self, folder: Path) -> None:
        self.ca = FileCa.load_or_create(folder / "ca")
        self.scheduler = self.ca.issue_files("scheduler", service_uri("scheduler", "s1"))

    def node(self, node_id: str = "n1") -> TlsIdentity:
        """A node's certificate."""
        return self.ca.issue_files(f"node-{node_id}", node_uri("p1", node_id))
