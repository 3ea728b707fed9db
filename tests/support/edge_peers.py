"""A real edge between scripted peers over mTLS links: a router that admits as told and a scheduler whose jobs a test plays by hand."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpumesh.common.v1.job_pb2 import Feature, Modality, Model, Price, Usage
from gpumesh.common.v1.link_pb2 import Cancel, Goodbye, Item, ItemFlag, ItemKind, Window
from gpumesh.node.v1.session_pb2 import Delta, Done, FinishReason, Frame
from gpumesh.router.v1.admission_service_pb2 import (
    Admission,
    AdmissionWelcome,
    AdmitRequest,
    AuthenticateRequest,
    AuthenticateResponse,
    Catalogue,
    GetTokenizerRequest,
    GetTokenizerResponse,
    Release,
)
from gpumesh.router.v1.admission_service_pb2_grpc import add_AdmissionServiceServicer_to_server
from gpumesh.scheduler.v1.dispatch_service_pb2 import Delivered, DeliveredAck, DispatchWelcome, Submit
from gpumesh.scheduler.v1.dispatch_service_pb2_grpc import add_DispatchServiceServicer_to_server
from gpumesh_edge_http.config import EdgeSettings
from gpumesh_edge_http.edge import Edge
from gpumesh_runtime.errors import MeshError, NotFound, Reason, Unauthenticated
from gpumesh_runtime.health import Health
from gpumesh_runtime.identity import service_uri
from gpumesh_runtime.ids import base62, crc32_text
from gpumesh_runtime.link import Link, LinkEnd, LinkServer, fence
from gpumesh_runtime.rpc.server import Server
from tests.support.certificates import Certificates

LOOPBACK = "127.0.0.1"
RUNNING = FinishReason.FINISH_REASON_UNSPECIFIED
FEATURES = [
    Feature.FEATURE_TOOLS,
    Feature.FEATURE_STRUCTURED,
    Feature.FEATURE_LOGPROBS,
    Feature.FEATURE_MULTIPLE_CHOICES,
]
TINY = Model(
    model_id="tiny",
    revision="r1",
    aliases=["small"],
    context_tokens=4096,
    modalities=[Modality.MODALITY_CHAT],
    features=FEATURES,
    template_overhead_tokens=8,
    owner="acme",
)
PRICE = Price(version=1, input_nano_usd_per_mtok=1_000_000_000, output_nano_usd_per_mtok=2_000_000_000)


def make_key(key_id: str = "k1") -> str:
    """An API key with a right checksum."""
    body = f"gm_live_{key_id}_{base62(bytes(range(32)))}"
    return f"{body}_{crc32_text(body)}"


class _Peer:
    """What both fakes share: live links."""

    def __init__(self, welcome: bytes) -> None:
        self.links: list[Link] = []
        self._server = LinkServer(self, lambda hello, peer: welcome)

    async def Connect(self, request_iterator: Any, context: Any) -> None:
        """Serves one link."""
        await self._server.serve(request_iterator, context)

    def on_up(self, link: Link, body: bytes) -> None:
        """Remembered."""
        self.links.append(link)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """Nothing to do."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Forgotten."""
        self.links.remove(link)

    def on_item(self, link: Link, item: Item) -> None:
        """By each fake."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends all links."""
        await self._server.close()


class FakeRouter(_Peer):
    """Admits everything to `scheduler_address` unless `refusal` says otherwise for a request."""

    def __init__(self) -> None:
        super().__init__(AdmissionWelcome(router_id="router-0", router_boot_id="b").SerializeToString())
        self.models = [TINY]
        self.scheduler_address = ""
        self.refusal: Callable[[AdmitRequest], MeshError | None] = lambda request: None
        self.silent = False
        self.admits: list[AdmitRequest] = []
        self.releases: dict[bytes, int] = {}
        self.tokenizers: dict[str, bytes] = {}
        self.unknown_keys: set[bytes] = set()
        self.authenticated = 0

    async def Authenticate(self, request: AuthenticateRequest, context: Any) -> AuthenticateResponse:
        """Whose a key is, unless it is in `unknown_keys`."""
        self.authenticated += 1
        if request.key_sha256 in self.unknown_keys:
            raise Unauthenticated(Reason.INVALID_API_KEY, "The API key is not valid.")
        return AuthenticateResponse(account_id="acct_a")

    async def GetTokenizer(self, request: GetTokenizerRequest, context: Any) -> AsyncIterator[GetTokenizerResponse]:
        """A tokenizer that a test put here."""
        body = self.tokenizers.get(request.tokenizer_sha256)
        if body is None:
            raise NotFound(Reason.NOT_FOUND, "no such tokenizer")
        for start in range(0, len(body), 65536):
            yield GetTokenizerResponse(chunk=body[start : start + 65536])

    def on_up(self, link: Link, body: bytes) -> None:
        """Sends the catalogue."""
        super().on_up(link, body)
        self.publish()

    def publish(self) -> None:
        """The catalogue to everyone."""
        catalogue = Catalogue(models=self.models, prices={model.model_id: PRICE for model in self.models})
        for link in self.links:
            link.send_new(ItemKind.ITEM_KIND_UPDATE, body=catalogue.SerializeToString())

    def on_item(self, link: Link, item: Item) -> None:
        """Calls are answered, releases noted."""
        if item.kind == ItemKind.ITEM_KIND_RELEASE:
            self.releases[item.id] = Release.FromString(item.body).charge_nano_usd
        if item.kind != ItemKind.ITEM_KIND_CALL:
            return
        request = AdmitRequest.FromString(item.body)
        self.admits.append(request)
        if self.silent:
            return
        refusal = self.refusal(request)
        if refusal is not None:
            link.fail(item.id, refusal)
            return
        known = {name: model for model in self.models for name in (model.model_id, *model.aliases)}
        model = known.get(request.model)
        if model is None:
            link.fail(
                item.id,
                NotFound(
                    Reason.UNKNOWN_MODEL, f"The model '{request.model}' does not exist.", metadata={"near": "tiny"}
                ),
            )
            return
        link.reply(item.id, self._admission(request, model).SerializeToString())

    def _admission(self, request: AdmitRequest, model: Model) -> Admission:
        return Admission(
            ticket=b"ticket-" + request.job_id,
            scheduler_id="s0",
            scheduler_address=self.scheduler_address,
            model_id=model.model_id,
            max_output_tokens=(request.max_output_tokens or 1000) * (request.choices or 1),
            price=PRICE,
            account_id="acct_a",
            hold_nano_usd=10_000_000,
        )


@dataclass
class PlayedJob:
    """A job as the fake scheduler sees it; its methods are what a node would do."""

    link: Link
    job_id: bytes
    attempt: int
    submit: Submit
    payload: bytes = b""
    windows: list[Window] = field(default_factory=list)
    cancelled: str = ""
    try_number: int = 1
    seq: int = 0
    tokens: int = 0

    @property
    def fence(self) -> int:
        """Of the current try."""
        return fence(self.attempt, self.try_number)

    def again(self) -> None:
        """The next try, on another node."""
        self.try_number += 1
        self.seq = self.tokens = 0

    def say(
        self,
        text: str,
        *,
        tokens: int = 1,
        finish: "FinishReason.ValueType" = FinishReason.FINISH_REASON_UNSPECIFIED,
        **fields: Any,
    ) -> None:
        """A frame with one delta."""
        self.frame(
            Frame(deltas=[Delta(text=text, finish_reason=finish, **fields)]), tokens, content=bool(text or fields)
        )

    def frame(self, frame: Frame, tokens: int = 1, *, content: bool = True) -> None:
        """Any frame."""
        self.seq += 1
        self.tokens += tokens
        flags = (ItemFlag.ITEM_FLAG_CONTENT if content else 0) | (ItemFlag.ITEM_FLAG_FIRST if self.seq == 1 else 0)
        self._send(ItemKind.ITEM_KIND_FRAME, frame.SerializeToString(), flags)

    def done(self, prompt_tokens: int = 7, completion_tokens: int | None = None) -> None:
        """The end, with usage and a receipt token."""
        count = self.tokens if completion_tokens is None else completion_tokens
        done = Done(
            usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=count), receipt_token=b"receipt-" + self.job_id
        )
        self._send(ItemKind.ITEM_KIND_DONE, done.SerializeToString(), ItemFlag.ITEM_FLAG_LAST)

    def fail(self, error: MeshError) -> None:
        """The end, in failure."""
        self.link.fail(self.job_id, error, seq=self.seq, fence=self.fence)

    def _send(self, kind: int, body: bytes, flags: int) -> None:
        self.link.send_new(
            kind, id=self.job_id, fence=self.fence, seq=self.seq, tokens=self.tokens, flags=flags, body=body
        )


def hello_world(job: PlayedJob) -> None:
    """Two words and the end."""
    if job.submit.streaming:
        job.say("Hello")
        job.say(" world", finish=FinishReason.FINISH_REASON_STOP)
    else:
        job.say("Hello world", tokens=2, finish=FinishReason.FINISH_REASON_STOP)
    job.done()


class FakeDispatch(_Peer):
    """Calls `play` for every job whose payload has come. Acknowledges delivered records while `acknowledge` is set."""

    def __init__(self) -> None:
        super().__init__(DispatchWelcome(scheduler_id="s0", scheduler_boot_id="b0").SerializeToString())
        self.play: Callable[[PlayedJob], None] = hello_world
        self.jobs: dict[bytes, PlayedJob] = {}
        self.acknowledge = True
        self.delivered: list[tuple[bytes, Delivered]] = []
        self.submits: list[tuple[bytes, int]] = []

    @property
    def last(self) -> PlayedJob:
        """The job that came last."""
        return list(self.jobs.values())[-1]

    def on_item(self, link: Link, item: Item) -> None:
        """By kind."""
        kind = item.kind
        if kind == ItemKind.ITEM_KIND_SUBMIT:
            self._submitted(link, item)
        elif kind == ItemKind.ITEM_KIND_DELIVERED:
            self.delivered.append((item.id, Delivered.FromString(item.body)))
            if self.acknowledge:
                link.send_new(ItemKind.ITEM_KIND_DELIVERED_ACK, id=item.id, body=DeliveredAck().SerializeToString())
        elif item.id in self.jobs:
            self._about(self.jobs[item.id], item)

    def acknowledge_all(self) -> None:
        """What was held back while `acknowledge` was not set."""
        for job_id, _ in self.delivered:
            self.links[0].send_new(ItemKind.ITEM_KIND_DELIVERED_ACK, id=job_id, body=DeliveredAck().SerializeToString())

    def _submitted(self, link: Link, item: Item) -> None:
        self.submits.append((item.id, item.fence))
        submit = Submit.FromString(item.body)
        job = PlayedJob(link, item.id, item.fence >> 16, submit, payload=submit.payload)
        self.jobs[item.id] = job
        if not submit.payload_bytes:
            self.play(job)

    def _about(self, job: PlayedJob, item: Item) -> None:
        if item.kind == ItemKind.ITEM_KIND_PAYLOAD:
            job.payload += item.body
            if item.flags & ItemFlag.ITEM_FLAG_LAST:
                self.play(job)
        elif item.kind == ItemKind.ITEM_KIND_WINDOW:
            job.windows.append(Window.FromString(item.body))
        elif item.kind == ItemKind.ITEM_KIND_CANCEL:
            job.cancelled = Cancel.FromString(item.body).reason


class EdgeMesh:
    """The edge under test and its peers. Async context manager."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.certificates = Certificates(folder)
        self.router = FakeRouter()
        self.dispatch = FakeDispatch()
        self.settings = settings
        self.health = Health(started=True)
        self.key = make_key()
        self._stack = AsyncExitStack()
        self._router_server: Server | None = None
        self._dispatch_server: Server | None = None
        self.edge: Edge

    async def __aenter__(self) -> "EdgeMesh":
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def _start(self) -> None:
        await self.start_router()
        await self.start_dispatch()
        self._stack.push_async_callback(self.stop_router)
        self._stack.push_async_callback(self.stop_dispatch)
        assert self._router_server is not None
        address = f"{LOOPBACK}:{self._router_server.port}"
        settings = EdgeSettings.read(port=0, router_addresses=(address,), **self.settings)
        self.edge = Edge(settings, self.certificates.uri(service_uri("edge")), self.health)
        await self.edge.start()
        self._stack.push_async_callback(self.edge.stop)
        await eventually(lambda: self.health.ready)

    async def __aexit__(self, *args: object) -> None:
        await self._stack.aclose()

    @property
    def base(self) -> str:
        """http://host:port."""
        return f"http://{LOOPBACK}:{self.edge.server.port}"

    @property
    def headers(self) -> dict[str, str]:
        """Authorization."""
        return {"Authorization": f"Bearer {self.key}"}

    async def start_router(self, port: int = 0) -> None:
        """Starts the router."""
        self._router_server = Server("router", f"{LOOPBACK}:{port}", self.certificates.uri(service_uri("router")))
        self._router_server.add(self.router, add_AdmissionServiceServicer_to_server)
        await self._router_server.start()

    async def start_dispatch(self, port: int = 0) -> None:
        """Starts the scheduler; admissions name it from now on."""
        self._dispatch_server = Server(
            "scheduler", f"{LOOPBACK}:{port}", self.certificates.uri(service_uri("scheduler", "s0"))
        )
        self._dispatch_server.add(self.dispatch, add_DispatchServiceServicer_to_server)
        await self._dispatch_server.start()
        self.router.scheduler_address = f"{LOOPBACK}:{self._dispatch_server.port}"

    async def stop_router(self) -> int:
        """Cuts all links to the router; returns the port that it had."""
        return await _stop(self._router_server)

    async def stop_dispatch(self) -> int:
        """Cuts all links to the scheduler as a kill does; returns the port that it had."""
        return await _stop(self._dispatch_server)


async def _stop(server: Server | None) -> int:
    assert server is not None
    await server.stop(0)
    return server.port


async def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Waits for a condition; TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
