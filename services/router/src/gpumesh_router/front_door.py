"""InferenceService: the gRPC front door for internal teams. One RPC per request; the job itself runs as the edge's jobs do."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from gpumesh.common.v1.job_pb2 import Modality, Price
from gpumesh.node.v1.session_pb2 import Frame
from gpumesh.router.v1 import inference_service_pb2 as inference_pb2
from gpumesh.router.v1.inference_service_pb2_grpc import InferenceServiceServicer
from gpumesh_dispatch.api_key import ApiKey, read_api_key
from gpumesh_dispatch.caller import Dispatcher
from gpumesh_dispatch.models import Models
from gpumesh_dispatch.prepare import Prepared, prepare_chat
from gpumesh_dispatch.request import Admitted, Completed, JobRequest
from gpumesh_dispatch.running import Running
from gpumesh_dispatch.tokens import TokenCounter
from gpumesh_router.admissions import Admissions
from gpumesh_router.publisher import CataloguePublisher
from gpumesh_runtime.error_types import AlreadyExists, DeadlineExceeded, InvalidArgument, MeshError, Unauthenticated
from gpumesh_runtime.link import new_id
from gpumesh_runtime.reasons import Reason

MAX_DEADLINE_S: Final = 3600.0
"""Requests without a deadline get this one; a longer one is cut to it."""
_AHEAD_S: Final = 0.05  # this service reports the timeout itself, a little before gRPC would
_BEHIND_S: Final = 1.0  # scheduler and node are told a later one, and end only what this service did not cancel
_ID_BYTES: Final = 16


class InferenceServicer(InferenceServiceServicer):
    """Infer and ListModels by API key."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        admissions: Admissions,
        publisher: CataloguePublisher,
        models: Models,
        counter: TokenCounter,
    ) -> None:
        self._dispatcher = dispatcher
        self._admissions = admissions
        self._publisher = publisher
        self._models = models
        self._counter = counter

    async def Infer(
        self, request: inference_pb2.InferRequest, context: Any
    ) -> AsyncIterator[inference_pb2.InferResponse]:
        """Runs one request and streams its answer."""
        key = _api_key(context)
        prepared = await prepare_chat(_openai_json(request), self._models, self._counter)
        job = self._job(request, key, prepared, context)
        sink = _Stream(job.job_id)
        running = self._dispatcher.run(job, sink)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(job.deadline_s - _BEHIND_S, _out_of_time, running, sink)
        try:
            async for response in sink.responses(running.consumed):
                yield response
        finally:
            timer.cancel()
            running.cancel()  # does nothing when the job is over; otherwise the client left or its deadline passed

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """Lists the models that the key may use: all of them, today."""
        key = _api_key(context)
        await self._admissions.authenticate(key.key_id, key.sha256)
        catalogue = self._publisher.wire()
        return inference_pb2.ListModelsResponse(models=catalogue.models, prices=catalogue.prices)

    def _job(self, request: inference_pb2.InferRequest, key: ApiKey, prepared: Prepared, context: Any) -> JobRequest:
        """The job of a request. Raises InvalidArgument, AlreadyExists."""
        if request.job_id and len(request.job_id) != _ID_BYTES:
            raise InvalidArgument(Reason.INVALID_ARGUMENT, "job_id takes 16 bytes.", metadata={"param": "job_id"})
        if request.job_id in self._dispatcher.jobs:
            raise AlreadyExists(Reason.ALREADY_EXISTS, "A job of this id is running. Make a new id.")
        remaining = context.time_remaining()
        chat = prepared.chat
        return JobRequest(
            job_id=request.job_id or new_id(),
            key_id=key.key_id,
            key_sha256=key.sha256,
            model=chat.request.model,
            payload=chat.body,
            streaming=True,
            features=chat.features,
            input_tokens=prepared.size.estimate,
            input_tokens_bound=prepared.size.bound,
            max_output_tokens=chat.max_output_tokens,
            choices=chat.choices,
            deadline_s=max(MAX_DEADLINE_S if remaining is None else min(remaining, MAX_DEADLINE_S) - _AHEAD_S, 0.001)
            + _BEHIND_S,
        )


class _Stream:
    """A job's sink, as messages to yield. Bounded by the job's window: what was not consumed is never more than that."""

    def __init__(self, job_id: bytes) -> None:
        self._job_id = job_id
        self._price: Price | None = None
        self._ready: deque[inference_pb2.InferResponse | MeshError] = deque()
        self._wake = asyncio.Event()
        self._started = False

    def on_admitted(self, admission: Admitted) -> None:
        """The first message says which job and model; a further attempt changes neither for the client."""
        self._price = admission.price
        if not self._started:
            self._started = True
            started = inference_pb2.JobStarted(job_id=self._job_id, model_id=admission.model_id)
            self._put(inference_pb2.InferResponse(started=started))

    def on_frame(self, frame: Frame, size: int) -> None:
        """Part of the answer."""
        del size
        self._put(inference_pb2.InferResponse(frame=frame))

    def on_done(self, completed: Completed) -> None:
        """The last message."""
        done = inference_pb2.JobCompleted(
            usage=completed.usage, charge_nano_usd=completed.charge_nano_usd, price=self._price
        )
        self._put(inference_pb2.InferResponse(completed=done))

    def on_error(self, error: MeshError) -> None:
        """Becomes the RPC's status."""
        self._put(error)

    def _put(self, item: inference_pb2.InferResponse | MeshError) -> None:
        self._ready.append(item)
        self._wake.set()

    async def responses(self, consumed: Any) -> AsyncIterator[inference_pb2.InferResponse]:
        """Yields until the job is over. Raises its error. `consumed` is called when what was yielded has left."""
        while True:
            while self._ready:
                item = self._ready.popleft()
                if isinstance(item, MeshError):
                    raise item
                yield item
                if item.HasField("completed"):
                    return
            consumed()  # the generator runs on only after gRPC has written the message
            self._wake.clear()
            await self._wake.wait()


def _out_of_time(running: Running, sink: _Stream) -> None:
    """The client's deadline: it pays for what it has received, as when it cancels."""
    if not running.job.ended:
        running.cancel(Reason.DEADLINE_EXCEEDED)
        text = "The deadline passed before the answer was complete. You are charged for what you received."
        sink.on_error(DeadlineExceeded(Reason.DEADLINE_EXCEEDED, text))


def _api_key(context: Any) -> ApiKey:
    """From metadata "authorization: Bearer gm_live_...". Raises Unauthenticated."""
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            scheme, _, text = str(value).partition(" ")
            if scheme.lower() == "bearer" and text:
                return read_api_key(text.strip())
    raise Unauthenticated(
        Reason.MISSING_API_KEY, 'Send your API key as metadata: ("authorization", "Bearer gm_live_...").'
    )


def _openai_json(request: inference_pb2.InferRequest) -> bytes:
    """The request as an OpenAI chat body. Raises InvalidArgument."""
    which = request.WhichOneof("input")
    if which == "openai_json":
        if request.modality not in (Modality.MODALITY_UNSPECIFIED, Modality.MODALITY_CHAT):
            raise InvalidArgument(
                Reason.INVALID_ARGUMENT, "Only chat is served so far.", metadata={"param": "modality"}
            )
        return _with_stream(request.openai_json, request.model)
    if which != "chat":
        raise InvalidArgument(Reason.INVALID_ARGUMENT, "Set `chat` or `openai_json`.", metadata={"param": "input"})
    chat = request.chat
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": message.role, "content": message.content} for message in chat.messages],
        "stream": True,
    }
    for name in ("max_tokens", "temperature", "top_p", "seed"):
        if chat.HasField(name):
            body[name] = getattr(chat, name)
    if chat.stop:
        body["stop"] = list(chat.stop)
    return msgspec.json.encode(body)


def _with_stream(body: bytes, model: str) -> bytes:
    """The body with "stream" set, and the request's model where the body names none. Raises InvalidArgument."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError as err:
        raise InvalidArgument(
            Reason.INVALID_ARGUMENT, "openai_json is not a JSON object.", metadata={"param": "openai_json"}
        ) from err
    fields["stream"] = msgspec.Raw(b"true")
    if model and "model" not in fields:
        fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
