# ruff: noqa: N818 -- errors are named for what happened, as gRPC names its codes; the family is MeshError
"""The one family of errors. Pure: domain code may raise these; how they travel is in `errors`."""

from collections.abc import Mapping
from typing import ClassVar, Final

from gpumesh_runtime.reasons import GRPC_CODE_NAME, Reason


class MeshError(Exception):
    """Something that a caller should be told, with a reason from the closed list.

    reason: why. message: one sentence for a person, without prompt text or secrets. metadata: details that clients may act on,
    all strings. retry_after_s: when to try again, seconds; None: unknown, or never. retryable: the request may be tried again
    elsewhere without risk. The constructor is the same for every subclass; `MeshError.of` picks the subclass that belongs to the
    reason.
    """

    code_name: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        reason: Reason,
        message: str = "",
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message or f"{reason.value.replace('_', ' ').capitalize()}."
        self.metadata: dict[str, str] = dict(metadata) if metadata else {}
        self.retry_after_s = retry_after_s
        self.retryable = retryable

    @staticmethod
    def of(
        reason: Reason,
        message: str = "",
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        retryable: bool = False,
    ) -> "MeshError":
        """Makes the subclass that belongs to `reason`."""
        cls = class_of(reason)
        return cls(reason, message, metadata=metadata, retry_after_s=retry_after_s, retryable=retryable)

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.message}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason.value}, {self.message!r})"


class InvalidArgument(MeshError):
    """The request is wrong and stays wrong when repeated."""

    code_name = "INVALID_ARGUMENT"


class PayloadTooLarge(InvalidArgument):
    """The request, or a part of it, is larger than its bound."""


class Unauthenticated(MeshError):
    """Who asks is not known."""

    code_name = "UNAUTHENTICATED"


class PermissionDenied(MeshError):
    """Who asks is known and may not."""

    code_name = "PERMISSION_DENIED"


class NotFound(MeshError):
    """The thing named does not exist."""

    code_name = "NOT_FOUND"


class AlreadyExists(MeshError):
    """A thing of that id exists and differs."""

    code_name = "ALREADY_EXISTS"


class Conflict(MeshError):
    """The state changed under the request, or the same id came with another body."""

    code_name = "ABORTED"


class FailedPrecondition(MeshError):
    """The thing is in a state that does not allow this."""

    code_name = "FAILED_PRECONDITION"


class InsufficientBalance(FailedPrecondition):
    """The account cannot pay for this."""


class ResourceExhausted(MeshError):
    """A limit is reached; later it may work."""

    code_name = "RESOURCE_EXHAUSTED"


class Unavailable(MeshError):
    """Something that is needed is not there now."""

    code_name = "UNAVAILABLE"


class DeadlineExceeded(MeshError):
    """The time given was not enough."""

    code_name = "DEADLINE_EXCEEDED"


class Cancelled(MeshError):
    """The caller stopped it. Not asyncio.CancelledError, which is never converted."""

    code_name = "CANCELLED"


class Unimplemented(MeshError):
    """This build does not offer the call."""

    code_name = "UNIMPLEMENTED"


class Internal(MeshError):
    """A bug of ours."""

    code_name = "INTERNAL"


_BY_REASON: Final[dict[Reason, type[MeshError]]] = {
    Reason.PAYLOAD_TOO_LARGE: PayloadTooLarge,
    Reason.INSUFFICIENT_BALANCE: InsufficientBalance,
}
_BY_CODE: Final[dict[str, type[MeshError]]] = {
    cls.code_name: cls
    for cls in (
        InvalidArgument,
        Unauthenticated,
        PermissionDenied,
        NotFound,
        AlreadyExists,
        Conflict,
        FailedPrecondition,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        Unimplemented,
        Internal,
    )
}


def class_of(reason: Reason) -> type[MeshError]:
    """The subclass that belongs to a reason."""
    return _BY_REASON.get(reason) or _BY_CODE[GRPC_CODE_NAME[reason]]
