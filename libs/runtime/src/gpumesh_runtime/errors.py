"""How errors travel: to and from gRPC statuses (RPCs) and Failure messages (items on links).

Raise a MeshError anywhere; the rims call these. An exception that is not a MeshError leaves as a neutral sentence and a 12-hex
hash, and the same hash is logged once with the traceback, so that a person who quotes it leads straight to the line.
asyncio.CancelledError is never converted: it is raised again.
"""

import asyncio
import hashlib
import traceback
from typing import Final, NoReturn

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from gpumesh.common.v1.link_pb2 import Failure
from gpumesh_runtime.error_types import (
    AlreadyExists,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InsufficientBalance,
    Internal,
    InvalidArgument,
    MeshError,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    class_of,
)
from gpumesh_runtime.reasons import GRPC_CODE_NAME, Reason

__all__ = [
    "DOMAIN",
    "AlreadyExists",
    "Cancelled",
    "Conflict",
    "DeadlineExceeded",
    "FailedPrecondition",
    "InsufficientBalance",
    "Internal",
    "InvalidArgument",
    "MeshError",
    "NotFound",
    "PayloadTooLarge",
    "PermissionDenied",
    "Reason",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "abort",
    "as_mesh_error",
    "class_of",
    "code_of",
    "error_hash",
    "from_failure",
    "from_grpc",
    "safe_traceback",
    "to_failure",
    "to_grpc",
]

# ErrorInfo.domain of every status of ours (google.rpc.ErrorInfo asks for one that is globally unique and stable).
DOMAIN: Final = "gpumesh"
_DETAILS_KEY: Final = "grpc-status-details-bin"
_CODE: Final = {reason: grpc.StatusCode[name] for reason, name in GRPC_CODE_NAME.items()}
# What a status without our ErrorInfo means: it came from gRPC itself (connection refused, deadline, ...), or from a
# stranger.
_REASON_BY_CODE: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE: Reason.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND: Reason.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS: Reason.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED: Reason.CONFLICT,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED: Reason.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Reason.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE: Reason.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Reason.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNIMPLEMENTED,
}
# Exceptions of these kinds never quote request content in their text, so it may be logged. A ValueError or KeyError may.
_QUOTABLE: Final = (MeshError, OSError, ImportError, AttributeError, TypeError, NameError, RuntimeError)
_QUOTABLE_PACKAGES: Final = ("asyncpg", "grpc", "cryptography")


def code_of(reason: Reason) -> grpc.StatusCode:
    """The gRPC status of a reason."""
    return _CODE[reason]


def error_hash(err: BaseException) -> str:
    """12 hex digits that stand for where and as what an exception arose: the same bug has the same hash in every
    process.
    """
    digest = hashlib.sha256(f"{type(err).__module__}.{type(err).__qualname__}".encode())
    for frame in traceback.extract_tb(err.__traceback__):
        digest.update(f"|{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}".encode())
    return digest.hexdigest()[:12]


def safe_traceback(err: BaseException) -> str:
    """The traceback as `file:line function` lines and exception types, causes last; texts only where they cannot
    quote a prompt.
    """
    lines: list[str] = []
    current: BaseException | None = err
    while current is not None and len(lines) < 60:
        package = type(current).__module__.partition(".")[0]
        quotable = isinstance(current, _QUOTABLE) or package in _QUOTABLE_PACKAGES
        lines += [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(current.__traceback__)[-25:]]
        lines.append(f"{type(current).__name__}: {str(current)[:500]}" if quotable else type(current).__name__)
        if isinstance(current, BaseExceptionGroup):
            lines += [safe_traceback(inner) for inner in current.exceptions[:5]]
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n".join(lines)


def as_mesh_error(err: BaseException) -> MeshError:
    """Any exception as a MeshError. Unknown ones become INTERNAL with a hash, logged once with the traceback.

    Raises asyncio.CancelledError, KeyboardInterrupt and SystemExit again: they are orders, not failures.
    """
    if isinstance(err, MeshError):
        return err
    if isinstance(err, asyncio.CancelledError | KeyboardInterrupt | SystemExit):
        raise err
    if isinstance(err, grpc.aio.AioRpcError):
        return from_grpc(err)
    if isinstance(err, TimeoutError):
        return DeadlineExceeded(
            Reason.DEADLINE_EXCEEDED, "The request took longer than the time it was given.", retryable=True
        )
    digest = error_hash(err)
    # Imported here: logs needs errors.safe_traceback, and only this failure path needs logs.
    from gpumesh_runtime.logs import get_logger  # noqa: PLC0415 -- see above

    get_logger("gpumesh.errors").error(
        "unexpected error", error_hash=digest, error_type=type(err).__name__, traceback=safe_traceback(err)
    )
    return Internal(
        Reason.INTERNAL, f"Something went wrong on our side (reference {digest}).", metadata={"hash": digest}
    )


def to_failure(err: BaseException) -> Failure:
    """Any exception as the body of an ERROR item."""
    mesh = as_mesh_error(err)
    failure = Failure(reason=mesh.reason.value, message=mesh.message, retryable=mesh.retryable)
    if mesh.metadata:
        failure.metadata.update(mesh.metadata)
    if mesh.retry_after_s is not None:
        failure.retry_after_ms = max(0, round(mesh.retry_after_s * 1000))
    return failure


def _known(reason: str, fallback: Reason, metadata: dict[str, str]) -> Reason:
    """The reason, or `fallback` when a newer version (or a stranger) sent one that this build does not know."""
    try:
        return Reason(reason)
    except ValueError:
        metadata["unknown_reason"] = reason[:64]
        return fallback


def from_failure(failure: Failure) -> MeshError:
    """The body of an ERROR item as an exception. Total: an unknown reason becomes INTERNAL and is kept in metadata."""
    metadata = dict(failure.metadata)
    reason = _known(failure.reason, Reason.INTERNAL, metadata)
    retry = failure.retry_after_ms / 1000 if failure.HasField("retry_after_ms") else None
    return MeshError.of(reason, failure.message, metadata=metadata, retry_after_s=retry, retryable=failure.retryable)


def to_grpc(err: BaseException) -> status_pb2.Status:
    """Any exception as a google.rpc.Status: exactly one ErrorInfo, and RetryInfo when the time to retry is known."""
    mesh = as_mesh_error(err)
    status = status_pb2.Status(code=code_of(mesh.reason).value[0], message=mesh.message)
    info = error_details_pb2.ErrorInfo(reason=mesh.reason.value, domain=DOMAIN, metadata=mesh.metadata)
    if mesh.retryable:
        info.metadata["retryable"] = "true"
    status.details.add().Pack(info)
    if mesh.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(max(0, round(mesh.retry_after_s * 1000)))
        status.details.add().Pack(retry)
    return status


async def abort(context: "grpc.aio.ServicerContext[object, object]", err: BaseException) -> NoReturn:
    """Ends an RPC with the status that belongs to `err`. Raises, as grpc.aio's abort does."""
    mesh = as_mesh_error(err)
    details = to_grpc(mesh).SerializeToString()
    await context.abort(code_of(mesh.reason), mesh.message, trailing_metadata=((_DETAILS_KEY, details),))
    raise AssertionError("abort always raises")


def from_grpc(err: grpc.aio.AioRpcError) -> MeshError:
    """A failed RPC as an exception; a status without our ErrorInfo is translated by its code."""
    retry: float | None = None
    for key, value in err.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        status = status_pb2.Status.FromString(value)
        info = error_details_pb2.ErrorInfo()
        found = False
        for detail in status.details:
            retry_info = error_details_pb2.RetryInfo()
            if not found and detail.Unpack(info):
                found = info.domain == DOMAIN
            elif detail.Unpack(retry_info):
                retry = retry_info.retry_delay.ToMilliseconds() / 1000
        if found:
            metadata = dict(info.metadata)
            retryable = metadata.pop("retryable", "") == "true"
            reason = _known(info.reason, _REASON_BY_CODE.get(err.code(), Reason.INTERNAL), metadata)
            return MeshError.of(reason, status.message, metadata=metadata, retry_after_s=retry, retryable=retryable)
    reason = _REASON_BY_CODE.get(err.code(), Reason.INTERNAL)
    if err.code() is grpc.StatusCode.INTERNAL and "execute_batch" in (err.debug_error_string() or ""):
        # grpc.aio's words for a write on a call that the other side had just ended: its true status is lost.
        reason = Reason.UNAVAILABLE
    # gRPC's own texts name addresses and internals; the code says enough for a caller.
    return MeshError.of(reason, _NEUTRAL.get(reason, ""), retryable=reason is Reason.UNAVAILABLE)


_NEUTRAL: Final = {
    Reason.UNAVAILABLE: "A service that this request needs cannot be reached now.",
    Reason.DEADLINE_EXCEEDED: "The request took longer than the time it was given.",
    Reason.INTERNAL: "A service that this request needs failed.",
}
