"""What makes a ticket good for one Submit: its audience, its time, and that it has not been used. Seals are checked by wire.py. Pure."""

import heapq
from typing import Final, NamedTuple

from gpumesh_runtime.error_types import FailedPrecondition, PermissionDenied, ResourceExhausted
from gpumesh_runtime.reasons import Reason
from gpumesh_scheduler.domain.nouns import ModelKey

_NANO: Final = 1_000_000_000


class Ticket(NamedTuple):
    """The part of a ticket that a scheduler reads. Times in nanoseconds since 1970."""

    job_id: bytes
    attempt: int
    model: ModelKey
    scheduler_id: str
    scheduler_boot_id: str
    submit_by_ns: int
    settle_by_ns: int
    max_output_tokens: int
    input_tokens_estimate: int
    modality: int
    features: frozenset[int]


def check_ticket(ticket: Ticket, job_id: bytes, attempt: int, scheduler_id: str, boot_id: str, now_ns: int) -> None:
    """Raises PermissionDenied (TICKET_INVALID) for another job, attempt, scheduler or boot.

    Raises FailedPrecondition (TICKET_EXPIRED) after submit_by. Another boot and a late ticket are retryable: a new admission gives one
    that fits, for instance after this scheduler was restarted.
    """
    if ticket.job_id != job_id or ticket.attempt != attempt:
        raise PermissionDenied(Reason.TICKET_INVALID, "The ticket is for another job or attempt.")
    if ticket.scheduler_id != scheduler_id or ticket.scheduler_boot_id != boot_id:
        raise PermissionDenied(Reason.TICKET_INVALID, "The ticket is for another scheduler or boot.", retryable=True)
    if now_ns > ticket.submit_by_ns:
        raise FailedPrecondition(Reason.TICKET_EXPIRED, "The ticket came after its submit_by.", retryable=True)


class ReplayMemory:
    """Tickets used here, until the second of their submit_by has passed (then the time check refuses them). Bounded in number.

    One small tuple per ticket: at 10 s of life and 2,000 jobs a second that is 20,000. They leave a second at a time: a heap of them
    costs a walk through cold memory for every ticket.
    """

    __slots__ = ("_most", "_order", "_seconds", "_used")

    def __init__(self, most: int = 1_000_000) -> None:
        self._used: set[tuple[bytes, int]] = set()
        self._seconds: dict[int, list[tuple[bytes, int]]] = {}
        self._order: list[int] = []
        self._most = most

    def use(self, job_id: bytes, attempt: int, submit_by_ns: int, now_ns: int) -> None:
        """Takes note. Raises FailedPrecondition (TICKET_REPLAYED) when it was used, ResourceExhausted when the memory is full."""
        order, used = self._order, self._used
        while order and order[0] < now_ns // _NANO:
            used.difference_update(self._seconds.pop(heapq.heappop(order)))
        key = (job_id, attempt)
        if key in used:
            raise FailedPrecondition(Reason.TICKET_REPLAYED, "The ticket has been used.")
        if len(used) >= self._most:
            message = "The scheduler remembers as many tickets as it may."
            raise ResourceExhausted(Reason.RESOURCE_EXHAUSTED, message, retry_after_s=1.0, retryable=True)
        used.add(key)
        second = submit_by_ns // _NANO
        keys = self._seconds.get(second)
        if keys is None:
            self._seconds[second] = [key]
            heapq.heappush(order, second)
        else:
            keys.append(key)

    def __len__(self) -> int:
        return len(self._used)
