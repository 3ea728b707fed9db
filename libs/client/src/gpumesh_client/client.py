"""The buyer's side: chats and models over gRPC, by API key."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from gpumesh.common.v1 import job_pb2
from gpumesh.node.v1 import session_pb2
from gpumesh.router.v1 import inference_service_pb2 as pb
from gpumesh_client.channel import mesh_errors, open_channel
from gpumesh_client.files import ClientFile
from gpumesh_runtime.tls import TlsIdentity

_SERVICE: Final = "/gpumesh.router.v1.InferenceService/"
# (role, text), oldest first. Roles: system, user, assistant, tool.
Messages = Iterable[tuple[str, str]]
_FINISH: Final = {
    session_pb2.FINISH_REASON_STOP: "stop",
    session_pb2.FINISH_REASON_LENGTH: "length",
    session_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
    session_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. reasoning: what a reasoning model thinks aloud. answer: set in the last chunk only."""

    text: str = ""
    reasoning: str = ""
    answer: "Answer | None" = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. finish_reason: as OpenAI names them. charge_nano_usd: what it cost, 10^-9 USD."""

    text: str
    reasoning: str
    finish_reason: str
    model: str
    job_id: str
    prompt_tokens: int
    completion_tokens: int
    charge_nano_usd: int


class Client:
    """A connection to a mesh, for one API key. Thread-safe. Every method raises MeshError (see .reason)."""

    def __init__(
        self, target: str, api_key: str, ca_file: str | Path, *, model: str = "", timeout_s: float = 120.0
    ) -> None:
        """target: host:port of the router. model: the default one. timeout_s: for a whole answer."""
        self.model = model
        self.timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {api_key}"),)
        self._channel = open_channel(target, TlsIdentity.ca_only(ca_file))
        self._infer: grpc.UnaryStreamMultiCallable[pb.InferRequest, pb.InferResponse] = self._channel.unary_stream(
            _SERVICE + "Infer",
            request_serializer=pb.InferRequest.SerializeToString,
            response_deserializer=pb.InferResponse.FromString,
        )
        self._list: grpc.UnaryUnaryMultiCallable[pb.ListModelsRequest, pb.ListModelsResponse] = (
            self._channel.unary_unary(
                _SERVICE + "ListModels",
                request_serializer=pb.ListModelsRequest.SerializeToString,
                response_deserializer=pb.ListModelsResponse.FromString,
            )
        )

    @classmethod
    def from_file(cls, path: str | Path | None = None, *, timeout_s: float = 120.0) -> Self:
        """From client.json; by default that of GPUMESH_HOME. Raises ConfigurationError."""
        file = ClientFile.load(path)
        return cls(file.grpc_target, file.api_key, file.ca_file, model=file.model, timeout_s=timeout_s)

    def chat(self, messages: Messages, **options: Any) -> Answer:
        """Asks and waits for the whole answer. Options as for stream()."""
        for chunk in self.stream(messages, **options):
            if chunk.answer is not None:
                return chunk.answer
        raise AssertionError("stream() ends with an answer or raises")

    def stream(
        self,
        messages: Messages,
        *,
        model: str = "",
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[Chunk, None, None]:
        """Asks and yields the answer as it grows; the last chunk holds all of it. Closing the iterator cancels the job."""
        chat = pb.ChatInput(
            messages=[pb.ChatMessage(role=role, content=text) for role, text in messages],
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
        request = pb.InferRequest(model=model or self.model, chat=chat, modality=job_pb2.MODALITY_CHAT)
        call = self._infer(request, timeout=self.timeout_s, metadata=self._metadata)
        try:
            with mesh_errors():
                yield from _chunks(call)
        finally:
            call.cancel()

    def models(self) -> pb.ListModelsResponse:
        """The models that the key may use, with their prices by model id."""
        with mesh_errors():
            return self._list(pb.ListModelsRequest(), timeout=min(self.timeout_s, 15.0), metadata=self._metadata)

    def close(self) -> None:
        """Closes the connection; running answers end."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _chunks(responses: Iterable[pb.InferResponse]) -> Iterator[Chunk]:
    """Events of a job as chunks. Only the first choice is shown: a chat here has one."""
    text: list[str] = []
    reasoning: list[str] = []
    finish, job_id, model = "", "", ""
    for response in responses:
        event = response.WhichOneof("event")
        if event == "started":
            job_id, model = response.started.job_id.hex(), response.started.model_id
        elif event == "frame":
            for delta in response.frame.deltas:
                if delta.choice != 0:
                    continue
                finish = _FINISH.get(delta.finish_reason, finish)
                if delta.text or delta.reasoning:
                    text.append(delta.text)
                    reasoning.append(delta.reasoning)
                    yield Chunk(delta.text, delta.reasoning)
        elif event == "completed":
            done = response.completed
            answer = Answer(
                text="".join(text),
                reasoning="".join(reasoning),
                finish_reason=finish,
                model=model,
                job_id=job_id,
                prompt_tokens=done.usage.prompt_tokens,
                completion_tokens=done.usage.completion_tokens,
                charge_nano_usd=done.charge_nano_usd,
            )
            yield Chunk(answer=answer)
