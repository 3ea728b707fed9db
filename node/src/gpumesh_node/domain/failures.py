"""What an engine's failure means for the job. Texts of engines are never passed on: they quote prompts."""

import re
from typing import Final

import msgspec

from gpumesh_runtime.reasons import Reason

# Integers of an engine's context error, for example "request (10012 tokens) exceeds the available context size (2048 tokens)".
_NUMBER: Final = re.compile(r"\b\d{1,9}\b")
_CONTEXT_WORDS: Final = re.compile(
    r"context[ _](?:length|size|window)|maximum context|max_model_len|`inputs` tokens", re.IGNORECASE
)
_SAFE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.\[\]]{0,63}")
_BODY_LIMIT: Final = 64 * 1024


class EngineFailure(Exception):  # noqa: N818 -- "failure" is the word for a job's end, here and on the wire
    """A try that failed at the engine.

    reason: from the closed list. message: one sentence of ours. retryable: another node, or the same later, may well succeed.
    metadata: details for clients, such as limit, used, param.
    """

    def __init__(
        self, reason: Reason, message: str, *, retryable: bool, metadata: dict[str, str] | None = None
    ) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.retryable = retryable
        self.metadata = metadata or {}


class _Inner(msgspec.Struct):
    message: object = ""
    type: object = ""
    code: object = None
    param: object = None
    n_prompt_tokens: object = None
    n_ctx: object = None


class _Outer(msgspec.Struct):
    # OpenAI, vLLM >= 0.10 and llama.cpp nest; older vLLM has the fields at the top; TGI and Ollama give a string.
    error: _Inner | str | None = None
    message: object = ""
    type: object = ""
    code: object = None
    param: object = None


_DECODER: Final = msgspec.json.Decoder(_Outer, strict=False)


def broken(message: str) -> EngineFailure:
    """The engine did not do its part (connection, 5xx, garbage): retryable until content has been sent."""
    return EngineFailure(Reason.ENGINE_ERROR, message, retryable=True)


def from_status(status: int, body: bytes) -> EngineFailure:
    """The failure that an HTTP answer other than 2xx stands for. Total: any body is accepted.

    Context overflow is CONTEXT_LENGTH_EXCEEDED with limit and used where the engine tells; another 400, 413 or 422 is ENGINE_REJECTED;
    these stay wrong when repeated. Everything else is the engine's own trouble and retryable.
    """
    if status in (400, 413, 422):
        return _refusal(status, body)
    if status == 404:
        return EngineFailure(
            Reason.ENGINE_UNAVAILABLE, "The engine does not serve the model (HTTP 404).", retryable=True
        )
    if status in (401, 403):
        return EngineFailure(
            Reason.ENGINE_UNAVAILABLE, f"The engine refused the node's credentials (HTTP {status}).", retryable=True
        )
    return broken(f"The engine failed (HTTP {status}).")


def from_stream(data: bytes) -> EngineFailure:
    """The failure that an `error` object inside an already started answer stands for."""
    inner = _decode(data)
    if inner is not None and _is_context(inner):
        return _context(inner)
    return broken("The engine reported an error in its answer.")


def _decode(body: bytes) -> _Inner | None:
    try:
        outer = _DECODER.decode(body[:_BODY_LIMIT])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if isinstance(outer.error, _Inner):
        return outer.error
    if isinstance(outer.error, str):
        return _Inner(message=outer.error)
    return _Inner(message=outer.message, type=outer.type, code=outer.code, param=outer.param)


def _is_context(inner: _Inner) -> bool:
    marks = (
        {inner.type, inner.code}
        if isinstance(inner.code, str | int | None) and isinstance(inner.type, str | None)
        else set()
    )
    if marks & {"exceed_context_size_error", "context_length_exceeded"}:
        return True
    return isinstance(inner.message, str) and _CONTEXT_WORDS.search(inner.message) is not None


def _context(inner: _Inner) -> EngineFailure:
    metadata: dict[str, str] = {}
    if isinstance(inner.n_ctx, int) and isinstance(inner.n_prompt_tokens, int):
        metadata = {"limit": str(inner.n_ctx), "used": str(inner.n_prompt_tokens)}
    elif isinstance(inner.message, str):
        numbers = sorted({int(number) for number in _NUMBER.findall(inner.message) if int(number) > 0})
        # With exactly two numbers the smaller is what fits. Engines that name more (prompt, output, sum) leave it unclear.
        if len(numbers) == 2:
            metadata = {"limit": str(numbers[0]), "used": str(numbers[1])}
    message = "The prompt and the asked output do not fit the model's context."
    return EngineFailure(Reason.CONTEXT_LENGTH_EXCEEDED, message, retryable=False, metadata=metadata)


def _refusal(status: int, body: bytes) -> EngineFailure:
    inner = _decode(body)
    if inner is None:
        return EngineFailure(
            Reason.ENGINE_REJECTED, f"The engine refused the request (HTTP {status}).", retryable=False
        )
    if _is_context(inner):
        return _context(inner)
    metadata: dict[str, str] = {}
    if isinstance(inner.param, str) and _SAFE_NAME.fullmatch(inner.param):
        metadata["param"] = inner.param
    return EngineFailure(
        Reason.ENGINE_REJECTED, f"The engine refused the request (HTTP {status}).", retryable=False, metadata=metadata
    )
