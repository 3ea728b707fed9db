"""Errors as OpenAI's clients know them: the one table from reason to HTTP status, type and code, and the bodies made of it."""

import math
from typing import Final, NamedTuple

import msgspec

from gpumesh_runtime.errors import MeshError, Reason

_encode: Final = msgspec.json.Encoder().encode

INVALID: Final = "invalid_request_error"
AUTH: Final = "authentication_error"
PERMISSION: Final = "permission_error"
QUOTA: Final = "insufficient_quota"
RATE: Final = "rate_limit_error"
SERVER: Final = "server_error"
TIMEOUT: Final = "timeout_error"

STATUS_TEXT: Final[dict[int, str]] = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    499: "Client Closed Request",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}
STATUS_LINE: Final = {status: f"HTTP/1.1 {status} {text}\r\n".encode() for status, text in STATUS_TEXT.items()}


class Problem(NamedTuple):
    """How a reason looks over HTTP. code None: the reason in lower case."""

    status: int
    type: str
    code: str | None = None


_TABLE: Final[dict[Reason, Problem]] = {
    Reason.INVALID_ARGUMENT: Problem(400, INVALID, "invalid_value"),
    Reason.UNKNOWN_MODEL: Problem(404, INVALID, "model_not_found"),
    Reason.CONTEXT_LENGTH_EXCEEDED: Problem(400, INVALID),
    Reason.PAYLOAD_TOO_LARGE: Problem(413, INVALID),
    Reason.REQUEST_TIMEOUT: Problem(408, TIMEOUT),
    Reason.UNSUPPORTED_MEDIA_TYPE: Problem(415, INVALID),
    Reason.METHOD_NOT_ALLOWED: Problem(405, INVALID),
    Reason.FEATURE_UNSUPPORTED: Problem(400, INVALID),
    Reason.NOT_FOUND: Problem(404, INVALID),
    Reason.ALREADY_EXISTS: Problem(409, INVALID),
    Reason.CONFLICT: Problem(409, INVALID),
    Reason.FAILED_PRECONDITION: Problem(400, INVALID),
    Reason.UNIMPLEMENTED: Problem(501, SERVER),
    Reason.MISSING_API_KEY: Problem(401, AUTH),
    Reason.INVALID_API_KEY: Problem(401, AUTH),
    Reason.REVOKED_API_KEY: Problem(401, AUTH),
    Reason.EXPIRED_API_KEY: Problem(401, AUTH),
    Reason.UNAUTHENTICATED: Problem(401, AUTH),
    Reason.ACCOUNT_SUSPENDED: Problem(403, PERMISSION),
    Reason.PERMISSION_DENIED: Problem(403, PERMISSION),
    Reason.INSUFFICIENT_BALANCE: Problem(402, QUOTA),
    Reason.RATE_LIMITED: Problem(429, RATE, "rate_limit_exceeded"),
    Reason.TOO_MANY_JOBS: Problem(429, RATE),
    Reason.QUEUE_FULL: Problem(429, RATE),
    Reason.QUEUE_TIMEOUT: Problem(503, SERVER),
    Reason.RESOURCE_EXHAUSTED: Problem(429, RATE),
    Reason.ENGINE_REJECTED: Problem(400, INVALID),
    Reason.POISON_PROMPT: Problem(422, INVALID),
    Reason.ENGINE_ERROR: Problem(502, SERVER),
    Reason.ANSWER_INTERRUPTED: Problem(502, SERVER),
    Reason.MISSING_FRAMES: Problem(502, SERVER),
    Reason.DEADLINE_EXCEEDED: Problem(504, TIMEOUT),
    Reason.CLIENT_GONE: Problem(499, INVALID),
    Reason.CANCELLED: Problem(499, INVALID),
    Reason.CLIENT_TOO_SLOW: Problem(408, TIMEOUT),
    Reason.INTERNAL: Problem(500, SERVER),
}
# What is not in the table is something inside the mesh that a repeat may mend.
_TRY_AGAIN: Final = frozenset(
    {
        Reason.NO_CAPACITY,
        Reason.MODEL_UNAVAILABLE,
        Reason.SCHEDULER_UNAVAILABLE,
        Reason.ROUTER_UNAVAILABLE,
        Reason.REGISTRY_UNAVAILABLE,
        Reason.METERING_UNAVAILABLE,
        Reason.DATABASE_UNAVAILABLE,
        Reason.UNAVAILABLE,
        Reason.DRAINING,
        Reason.PRICE_UNKNOWN,
        Reason.LINK_DOWN,
        Reason.SEND_QUEUE_FULL,
        Reason.NODE_LOST,
        Reason.NODE_REJECTED,
        Reason.NODE_STALLED,
        Reason.NODE_DRAINING,
        Reason.ACCEPT_TIMEOUT,
        Reason.FIRST_TOKEN_TIMEOUT,
        Reason.ENGINE_UNAVAILABLE,
        Reason.TRIES_EXHAUSTED,
    }
)
_TABLE.update({reason: Problem(503, SERVER) for reason in _TRY_AGAIN})
# The rest can only come from a bug or a stranger inside the mesh: the client learns no more than that.
_OURS: Final = Problem(500, SERVER, "internal_error")
UNAUTHENTICATED: Final = frozenset(reason for reason, problem in _TABLE.items() if problem.status == 401)
_DEFAULT_RETRY_S: Final = 1.0


def problem_of(reason: Reason) -> Problem:
    """How a reason looks over HTTP."""
    return _TABLE.get(reason, _OURS)


def body_of(error: MeshError) -> bytes:
    """OpenAI's error body. The message never holds prompt text: MeshError promises that."""
    problem = problem_of(error.reason)
    hidden = problem is _OURS
    message = "Something went wrong on our side. Try again." if hidden else error.message
    near = error.metadata.get("near", "")
    if error.reason is Reason.UNKNOWN_MODEL and near and near not in message:
        message = f"{message} Similar names: {near}."
    param = error.metadata.get("param") or ("model" if error.reason is Reason.UNKNOWN_MODEL else None)
    code = problem.code or error.reason.value.lower()
    return _encode({"error": {"message": message, "type": problem.type, "param": param, "code": code}})


def headers_of(error: MeshError) -> bytes:
    """Header lines that belong to the status: Retry-After, WWW-Authenticate, Allow."""
    status = problem_of(error.reason).status
    lines = b""
    if status in (429, 503):
        wait = error.retry_after_s if error.retry_after_s is not None else _DEFAULT_RETRY_S
        lines += b"Retry-After: %d\r\n" % max(1, math.ceil(wait))
    if status == 401:
        lines += b"WWW-Authenticate: Bearer\r\n"
    if status == 405 and "allow" in error.metadata:
        lines += b"Allow: %b\r\n" % error.metadata["allow"].encode()
    return lines
