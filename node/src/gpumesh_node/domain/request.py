"""The buyer's request body as the engine gets it. Only the top level is read: prompts pass as the bytes they are."""

from dataclasses import dataclass
from typing import Final

import msgspec

from gpumesh_node.domain.failures import EngineFailure
from gpumesh_runtime.reasons import Reason

_TOP: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENCODE: Final = msgspec.json.Encoder().encode
_TRUE: Final = msgspec.Raw(b"true")
_FALSE: Final = msgspec.Raw(b"false")
_WITH_USAGE: Final = msgspec.Raw(b'{"include_usage":true}')
MAX_CHOICES: Final = 128  # OpenAI's own bound on n


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One job as an engine adapter gets it.

    payload: the OpenAI request body as the client sent it. Sensitive: never logged.
    model_id: catalogue id. max_output_tokens: per choice, always sent. streaming: the client wants the answer as it grows.
    traceparent: W3C trace context, empty when the job is not sampled.
    """

    payload: bytes
    model_id: str
    max_output_tokens: int
    streaming: bool
    traceparent: str = ""

    def __repr__(self) -> str:
        return f"EngineRequest(model_id={self.model_id!r}, payload=<{len(self.payload)} bytes>)"


class EngineBody:
    """A request body that can be written anew for an engine. Raises EngineFailure (INVALID_ARGUMENT) when it is not an object."""

    __slots__ = ("_fields",)

    def __init__(self, payload: bytes) -> None:
        try:
            self._fields = _TOP.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise _invalid("The request body is not a JSON object.", "") from None

    def integer(self, name: str) -> int | None:
        """A top-level integer; None when absent or null. Raises EngineFailure (INVALID_ARGUMENT) when it is something else."""
        raw = self._fields.get(name)
        if raw is None or raw == b"null":
            return None
        try:
            return msgspec.json.decode(raw, type=int)
        except msgspec.MsgspecError:
            raise _invalid(f"{name} must be an integer.", name) from None

    def flag(self, name: str) -> bool:
        """Whether a top-level field is true."""
        return self._fields.get(name) == b"true"

    @property
    def choices(self) -> int:
        """n, 1 when absent. Raises EngineFailure (INVALID_ARGUMENT)."""
        number = self.integer("n")
        if number is None:
            return 1
        if not 1 <= number <= MAX_CHOICES:
            raise _invalid(f"n must be between 1 and {MAX_CHOICES}.", "n")
        return number

    def cap(self, limit: int) -> int:
        """The output cap to send: what the client asked for, at most `limit`, at least 1."""
        asked = self.integer("max_completion_tokens")
        if asked is None:
            asked = self.integer("max_tokens")
        return max(1, limit if asked is None else min(asked, limit))

    def copy(self) -> "EngineBody":
        """Another body with the same fields."""
        other = EngineBody.__new__(EngineBody)
        other._fields = dict(self._fields)
        return other

    def set(self, name: str, value: object) -> None:
        """Sets a top-level field."""
        self._fields[name] = msgspec.Raw(_ENCODE(value))

    def drop(self, name: str) -> None:
        """Removes a top-level field."""
        self._fields.pop(name, None)

    def write(self, model: str, cap: int, *, streaming: bool) -> bytes:
        """The body for an engine that knows the model as `model`. Other fields pass through unread."""
        fields = self._fields
        fields["model"] = msgspec.Raw(_ENCODE(model))
        fields["max_tokens"] = msgspec.Raw(b"%d" % cap)
        fields.pop("max_completion_tokens", None)
        if streaming:
            fields["stream"] = _TRUE
            fields["stream_options"] = _WITH_USAGE
        else:
            fields["stream"] = _FALSE
            fields.pop("stream_options", None)
        return _ENCODE(fields)


def _invalid(message: str, param: str) -> EngineFailure:
    return EngineFailure(Reason.INVALID_ARGUMENT, message, retryable=False, metadata={"param": param} if param else {})
