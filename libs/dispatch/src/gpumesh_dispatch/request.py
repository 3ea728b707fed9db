"""What a caller asks the dispatcher to run, and how it hears of it."""

from typing import Final, Protocol

import msgspec

from gpumesh.common.v1.job_pb2 import Feature, Modality, ModelBuild, Price, ServiceClass, Usage
from gpumesh.node.v1.session_pb2 import Frame
from gpumesh_runtime.errors import MeshError

# Looking a name up in a protobuf enum costs 0.5 us.
CHAT: Final = Modality.MODALITY_CHAT
STANDARD: Final = ServiceClass.SERVICE_CLASS_STANDARD


class JobRequest(msgspec.Struct, frozen=True, gc=False):
    """One job, validated.

    job_id: 16 bytes, made by the caller. key_sha256: SHA-256 of the whole API key (sensitive). payload: the OpenAI request body (sensitive:
    never logged). input_tokens: estimated or counted. input_tokens_bound: no honest node counts more prompt tokens; 0: unknown.
    max_output_tokens: per choice, None: the model's. deadline_s: for the whole answer. traceparent: empty when not sampled.
    modality, features, service_class: wire numbers.
    """

    job_id: bytes
    key_id: str
    key_sha256: bytes
    model: str
    payload: bytes
    streaming: bool
    modality: "Modality.ValueType" = CHAT
    features: tuple["Feature.ValueType", ...] = ()
    input_tokens: int = 0
    input_tokens_bound: int = 0
    max_output_tokens: int | None = None
    choices: int = 1
    deadline_s: float = 600.0
    traceparent: str = ""
    service_class: "ServiceClass.ValueType" = STANDARD


class Admitted(Protocol):
    """An admission: from a router (gpumesh.router.v1.Admission), or made here under its grant (grants.LocalAdmission).

    ticket: SealedTicket, encoded. max_output_tokens: over all choices.
    """

    @property
    def ticket(self) -> bytes: ...
    @property
    def scheduler_id(self) -> str: ...
    @property
    def scheduler_address(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def max_output_tokens(self) -> int: ...
    @property
    def price(self) -> Price: ...
    @property
    def account_id(self) -> str: ...
    @property
    def hold_nano_usd(self) -> int: ...


class Completed(msgspec.Struct, frozen=True):
    """A whole answer. usage: as billed. charge_nano_usd: what it will cost. build: how it was computed, says the node. fence: the try."""

    usage: Usage
    charge_nano_usd: int
    build: ModelBuild
    fence: int
    seed: int | None


class Sink(Protocol):
    """Hears how a job goes. Every callback is synchronous, must not block and may call the job's cancel(). Exactly one of on_done and
    on_error ends it; after cancel() there is no further call.
    """

    def on_admitted(self, admission: Admitted) -> None:
        """The job may run, on attempt after attempt: called once for each."""

    def on_frame(self, frame: Frame, size: int) -> None:
        """The answer grew, in order and without gaps; `size` is the frame's encoded bytes. Once it has left for the client, call
        consumed() of the job: the node stops when a window's worth has not been consumed.
        """

    def on_done(self, completed: Completed) -> None:
        """The answer is complete."""

    def on_error(self, error: MeshError) -> None:
        """The job failed; frames may have come before, nothing is charged."""
