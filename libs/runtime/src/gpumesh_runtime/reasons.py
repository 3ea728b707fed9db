"""The closed list of reasons: why anything was refused, failed or retried. Reasons are never renamed and never reused.

Pure: no I/O and no gRPC, so that domain code may use it. The HTTP status and OpenAI error type of each reason live in the edge's
`problems`; the gRPC status is here, by name, because every service needs it.
"""

from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """Why. The value goes over the wire (ErrorInfo.reason, Failure.reason, Cancel.reason) and into metric labels."""

    # --- the request itself ---------------------------------------------------------------------------------
    # A field is missing, malformed or out of range; metadata "param" names it.
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    # No model of that name, alias or revision; metadata "near" may list similar names.
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    # Prompt and asked output do not fit the model's context; metadata "limit" and "used" hold both numbers.
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    # Body, message or field is larger than its bound; metadata "limit" holds it.
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    # The request took longer to arrive than is allowed.
    REQUEST_TIMEOUT = "REQUEST_TIMEOUT"
    # The body is of a media type that this endpoint does not read.
    UNSUPPORTED_MEDIA_TYPE = "UNSUPPORTED_MEDIA_TYPE"
    # The endpoint exists but not with this HTTP method.
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    # The model cannot do what the request asks (tools, vision, log probabilities, ...); metadata "feature" names it.
    FEATURE_UNSUPPORTED = "FEATURE_UNSUPPORTED"
    # The thing named does not exist, or the caller may not know that it does.
    NOT_FOUND = "NOT_FOUND"
    # A thing of that id exists with another body.
    ALREADY_EXISTS = "ALREADY_EXISTS"
    # The same id came with a different body, or the state changed under the request.
    CONFLICT = "CONFLICT"
    # The thing exists but is in a state that does not allow this.
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    # This build or version does not offer the call.
    UNIMPLEMENTED = "UNIMPLEMENTED"

    # --- who asks -------------------------------------------------------------------------------------------
    # No API key was given.
    MISSING_API_KEY = "MISSING_API_KEY"
    # The API key is malformed or unknown.
    INVALID_API_KEY = "INVALID_API_KEY"
    # The API key was revoked.
    REVOKED_API_KEY = "REVOKED_API_KEY"
    # The API key's end date has passed.
    EXPIRED_API_KEY = "EXPIRED_API_KEY"
    # The account may not use the mesh at present.
    ACCOUNT_SUSPENDED = "ACCOUNT_SUSPENDED"
    # The caller could not be identified.
    UNAUTHENTICATED = "UNAUTHENTICATED"
    # The caller is known but may not do this.
    PERMISSION_DENIED = "PERMISSION_DENIED"
    # The enrolment token is unknown, used or expired.
    ENROLMENT_TOKEN_INVALID = "ENROLMENT_TOKEN_INVALID"  # noqa: S105 -- a reason, not a password
    # The certificate or signing request is malformed, expired, revoked or names another identity.
    CERTIFICATE_INVALID = "CERTIFICATE_INVALID"
    # The node was revoked and may not come back with this identity.
    NODE_REVOKED = "NODE_REVOKED"

    # --- money and limits -----------------------------------------------------------------------------------
    # The account cannot pay for this request.
    INSUFFICIENT_BALANCE = "INSUFFICIENT_BALANCE"
    # The key or account has sent too much in too short a time.
    RATE_LIMITED = "RATE_LIMITED"
    # The account already has as many jobs running as it may.
    TOO_MANY_JOBS = "TOO_MANY_JOBS"
    # The estimated wait in the queue is longer than its bound.
    QUEUE_FULL = "QUEUE_FULL"
    # The job waited in the queue for longer than its bound.
    QUEUE_TIMEOUT = "QUEUE_TIMEOUT"
    # Some bound of this process (memory, ids, connections) is reached.
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    # No price is published for the model.
    PRICE_UNKNOWN = "PRICE_UNKNOWN"

    # --- where it could run ---------------------------------------------------------------------------------
    # Nodes serve the model but all are busy.
    NO_CAPACITY = "NO_CAPACITY"
    # The model is in the catalogue but no node serves it now.
    MODEL_UNAVAILABLE = "MODEL_UNAVAILABLE"
    # No scheduler can be reached.
    SCHEDULER_UNAVAILABLE = "SCHEDULER_UNAVAILABLE"
    # No router can be reached.
    ROUTER_UNAVAILABLE = "ROUTER_UNAVAILABLE"
    # The registry cannot be reached and its answer is not cached.
    REGISTRY_UNAVAILABLE = "REGISTRY_UNAVAILABLE"
    # Metering cannot be reached and its answer is not cached.
    METERING_UNAVAILABLE = "METERING_UNAVAILABLE"
    # The database cannot be reached.
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    # A service cannot be reached or has just gone away.
    UNAVAILABLE = "UNAVAILABLE"
    # The process stops and takes no new work.
    DRAINING = "DRAINING"

    # --- links and nodes ------------------------------------------------------------------------------------
    # The link that carried the job or call broke.
    LINK_DOWN = "LINK_DOWN"
    # A bounded send queue overflowed for this job.
    SEND_QUEUE_FULL = "SEND_QUEUE_FULL"
    # The node's session ended while it had the job.
    NODE_LOST = "NODE_LOST"
    # The node refused the offer.
    NODE_REJECTED = "NODE_REJECTED"
    # The node stopped sending frames for longer than its bound.
    NODE_STALLED = "NODE_STALLED"
    # The node is shutting down in order and gave the job back.
    NODE_DRAINING = "NODE_DRAINING"
    # The node broke the session's protocol; that session only ends.
    NODE_PROTOCOL_ERROR = "NODE_PROTOCOL_ERROR"
    # A service broke the link's protocol.
    PROTOCOL_ERROR = "PROTOCOL_ERROR"
    # The node neither accepted nor refused the offer in time.
    ACCEPT_TIMEOUT = "ACCEPT_TIMEOUT"
    # The node accepted but sent no first token in time.
    FIRST_TOKEN_TIMEOUT = "FIRST_TOKEN_TIMEOUT"  # noqa: S105 -- a reason, not a password
    # The engine failed on this job.
    ENGINE_ERROR = "ENGINE_ERROR"
    # The engine is not running or cannot be reached.
    ENGINE_UNAVAILABLE = "ENGINE_UNAVAILABLE"
    # The engine refused the request as invalid.
    ENGINE_REJECTED = "ENGINE_REJECTED"
    # The answer broke off after content had reached the client.
    ANSWER_INTERRUPTED = "ANSWER_INTERRUPTED"
    # The count in Done differs from the frames received.
    MISSING_FRAMES = "MISSING_FRAMES"
    # The item belongs to a try that a later one replaced.
    STALE_FENCE = "STALE_FENCE"
    # The receiver went further than the window that it was granted.
    WINDOW_EXCEEDED = "WINDOW_EXCEEDED"
    # Every try that was allowed failed before content.
    TRIES_EXHAUSTED = "TRIES_EXHAUSTED"
    # The prompt crashed more than one engine and is refused for a while.
    POISON_PROMPT = "POISON_PROMPT"
    # The job is not known here (any more).
    UNKNOWN_JOB = "UNKNOWN_JOB"
    # Another session of the same node with a higher counter took over.
    SESSION_REPLACED = "SESSION_REPLACED"

    # --- tickets and receipts -------------------------------------------------------------------------------
    # The ticket's seal is wrong or it was made for another scheduler.
    TICKET_INVALID = "TICKET_INVALID"
    # The ticket came after its submit_by or settle_by.
    TICKET_EXPIRED = "TICKET_EXPIRED"
    # The ticket has been used.
    TICKET_REPLAYED = "TICKET_REPLAYED"
    # The receipt's token or counts are wrong.
    RECEIPT_INVALID = "RECEIPT_INVALID"

    # --- how it ended ---------------------------------------------------------------------------------------
    # The client closed its connection.
    CLIENT_GONE = "CLIENT_GONE"
    # The client read nothing for longer than its bound.
    CLIENT_TOO_SLOW = "CLIENT_TOO_SLOW"
    # The deadline passed.
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    # A unary RPC came without a deadline.
    DEADLINE_REQUIRED = "DEADLINE_REQUIRED"
    # The caller cancelled.
    CANCELLED = "CANCELLED"
    # A bug of ours; metadata "hash" finds the log line.
    INTERNAL = "INTERNAL"


# Reason -> name of the gRPC status code. Names, not grpc.StatusCode, so that this module stays pure.
_BY_CODE: Final[dict[str, tuple[Reason, ...]]] = {
    "INVALID_ARGUMENT": (
        Reason.INVALID_ARGUMENT,
        Reason.CONTEXT_LENGTH_EXCEEDED,
        Reason.FEATURE_UNSUPPORTED,
        Reason.UNSUPPORTED_MEDIA_TYPE,
        Reason.PAYLOAD_TOO_LARGE,
        Reason.ENGINE_REJECTED,
        Reason.PROTOCOL_ERROR,
        Reason.NODE_PROTOCOL_ERROR,
        Reason.WINDOW_EXCEEDED,
        Reason.DEADLINE_REQUIRED,
        Reason.RECEIPT_INVALID,
        Reason.POISON_PROMPT,
    ),
    "NOT_FOUND": (Reason.NOT_FOUND, Reason.UNKNOWN_MODEL, Reason.UNKNOWN_JOB),
    "ALREADY_EXISTS": (Reason.ALREADY_EXISTS,),
    "ABORTED": (
        Reason.CONFLICT,
        Reason.MISSING_FRAMES,
        Reason.STALE_FENCE,
        Reason.ANSWER_INTERRUPTED,
        Reason.SESSION_REPLACED,
    ),
    "FAILED_PRECONDITION": (
        Reason.FAILED_PRECONDITION,
        Reason.INSUFFICIENT_BALANCE,
        Reason.PRICE_UNKNOWN,
        Reason.TICKET_EXPIRED,
        Reason.TICKET_REPLAYED,
    ),
    "UNIMPLEMENTED": (Reason.UNIMPLEMENTED, Reason.METHOD_NOT_ALLOWED),
    "UNAUTHENTICATED": (
        Reason.UNAUTHENTICATED,
        Reason.MISSING_API_KEY,
        Reason.INVALID_API_KEY,
        Reason.REVOKED_API_KEY,
        Reason.EXPIRED_API_KEY,
        Reason.ENROLMENT_TOKEN_INVALID,
        Reason.CERTIFICATE_INVALID,
    ),
    "PERMISSION_DENIED": (
        Reason.PERMISSION_DENIED,
        Reason.ACCOUNT_SUSPENDED,
        Reason.TICKET_INVALID,
        Reason.NODE_REVOKED,
    ),
    "RESOURCE_EXHAUSTED": (
        Reason.RESOURCE_EXHAUSTED,
        Reason.RATE_LIMITED,
        Reason.TOO_MANY_JOBS,
        Reason.QUEUE_FULL,
        Reason.SEND_QUEUE_FULL,
        Reason.CLIENT_TOO_SLOW,
    ),
    "UNAVAILABLE": (
        Reason.UNAVAILABLE,
        Reason.NO_CAPACITY,
        Reason.QUEUE_TIMEOUT,
        Reason.MODEL_UNAVAILABLE,
        Reason.SCHEDULER_UNAVAILABLE,
        Reason.ROUTER_UNAVAILABLE,
        Reason.REGISTRY_UNAVAILABLE,
        Reason.METERING_UNAVAILABLE,
        Reason.DATABASE_UNAVAILABLE,
        Reason.DRAINING,
        Reason.LINK_DOWN,
        Reason.NODE_LOST,
        Reason.NODE_REJECTED,
        Reason.NODE_STALLED,
        Reason.NODE_DRAINING,
        Reason.ACCEPT_TIMEOUT,
        Reason.FIRST_TOKEN_TIMEOUT,
        Reason.ENGINE_ERROR,
        Reason.ENGINE_UNAVAILABLE,
        Reason.TRIES_EXHAUSTED,
    ),
    "DEADLINE_EXCEEDED": (Reason.DEADLINE_EXCEEDED, Reason.REQUEST_TIMEOUT),
    "CANCELLED": (Reason.CANCELLED, Reason.CLIENT_GONE),
    "INTERNAL": (Reason.INTERNAL,),
}

GRPC_CODE_NAME: Final[dict[Reason, str]] = {reason: code for code, reasons in _BY_CODE.items() for reason in reasons}
