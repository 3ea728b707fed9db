"""A job's payload while it may still be needed for another try: bounded per job and in all. Pure."""

from gpumesh_runtime.error_types import InvalidArgument, PayloadTooLarge, ResourceExhausted
from gpumesh_runtime.reasons import Reason


class PayloadBudget:
    """Bytes of payload kept over all jobs."""

    __slots__ = ("limit_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0


class Payload:
    """The bytes that a caller submits: whole inside Submit (`inline`), or `expected_bytes` in pieces that follow.

    Raises PayloadTooLarge or ResourceExhausted (retryable, nothing ran) when it does not fit; what is announced is reserved at once.
    """

    __slots__ = ("_budget", "_held", "complete", "expected_bytes", "inline", "pieces", "received_bytes", "seq")

    def __init__(self, inline: bytes, expected_bytes: int, most_bytes: int, budget: PayloadBudget) -> None:
        size = len(inline) or expected_bytes
        if size > most_bytes:
            raise PayloadTooLarge(
                Reason.PAYLOAD_TOO_LARGE,
                f"The request is larger than {most_bytes} bytes.",
                metadata={"limit": str(most_bytes), "used": str(size)},
            )
        if budget.used_bytes + size > budget.limit_bytes:
            raise ResourceExhausted(
                Reason.RESOURCE_EXHAUSTED,
                "The scheduler holds as many requests as it may.",
                metadata={"limit": str(budget.limit_bytes)},
                retry_after_s=1.0,
                retryable=True,
            )
        budget.used_bytes += size
        self._budget = budget
        self._held = size
        self.inline = inline
        self.expected_bytes = 0 if inline else expected_bytes
        self.pieces: list[bytes] = []
        self.received_bytes = 0
        self.seq = 0
        self.complete = self.expected_bytes == 0

    def add(self, seq: int, piece: bytes, last: bool) -> None:
        """Takes the next piece. Raises InvalidArgument (PROTOCOL_ERROR) when it is out of order or does not fit what was announced."""
        received = self.received_bytes + len(piece)
        if (
            self.complete
            or seq != self.seq + 1
            or received > self.expected_bytes
            or last != (received == self.expected_bytes)
        ):
            raise InvalidArgument(
                Reason.PROTOCOL_ERROR, "The pieces of the request do not add up to what was announced."
            )
        self.seq = seq
        self.received_bytes = received
        self.complete = last
        if self._held:
            self.pieces.append(piece)

    def release(self) -> None:
        """Content has been relayed or the job has ended: no other try can need it. Repetition is harmless."""
        self._budget.used_bytes -= self._held
        self._held = 0
        self.inline = b""
        self.pieces = []
