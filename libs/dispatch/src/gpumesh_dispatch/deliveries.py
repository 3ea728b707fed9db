"""Delivered records that metering has not confirmed yet. Kept in memory, bounded, and sent again until acknowledged, to any scheduler."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh_runtime.link import Link, LinkDown
from gpumesh_runtime.metrics import counter

_DELIVERED: Final = ItemKind.ITEM_KIND_DELIVERED
RESEND_S: Final = 5.0
MAX_RECORDS: Final = 200_000
MAX_BYTES: Final = 128 << 20
# What a record costs beside its body: key, entry and dictionary slot.
_OVERHEAD_BYTES: Final = 300
# At most so many in one go: after a long outage a burst of everything would only be dropped by full queues.
_BURST: Final = 2000

_DROPPED: Final = counter(
    "gpumesh_dispatch_deliveries_dropped_total", "Delivered records dropped because too many waited"
).labels()
_RESENT: Final = counter("gpumesh_dispatch_deliveries_resent_total", "Delivered records sent again").labels()


@dataclass(slots=True)
class _Record:
    body: bytes
    sent_at: float
    link: Link | None


class Deliveries:
    """job id -> record. `any_link` gives a live link to some scheduler, or None."""

    def __init__(
        self, any_link: Callable[[], Link | None], max_records: int = MAX_RECORDS, max_bytes: int = MAX_BYTES
    ) -> None:
        self._any_link = any_link
        self._records: OrderedDict[bytes, _Record] = OrderedDict()
        self._max_records = max_records
        self._max_bytes = max_bytes
        self.bytes = 0
        self.on_empty: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._records)

    def add(self, job_id: bytes, body: bytes, link: Link | None, now: float) -> None:
        """Keeps a record and sends it on `link` if that lives, else on any. The oldest go when there is no room: node and scheduler hold
        their own evidence of those jobs.
        """
        record = _Record(body, now, None)
        self._records[job_id] = record
        self.bytes += len(body) + _OVERHEAD_BYTES
        while self.bytes > self._max_bytes or len(self._records) > self._max_records:
            _, old = self._records.popitem(last=False)
            self.bytes -= len(old.body) + _OVERHEAD_BYTES
            _DROPPED.add(1)
        if link is None or link.end is not None:
            link = self._any_link()
        if link is not None:
            self._send(job_id, record, link, now)

    def acknowledged(self, job_id: bytes) -> None:
        """Metering has committed it, or never will."""
        record = self._records.pop(job_id, None)
        if record is not None:
            self.bytes -= len(record.body) + _OVERHEAD_BYTES
            if not self._records and self.on_empty is not None:
                self.on_empty()

    def link_up(self, link: Link, now: float) -> None:
        """A new link: what was not sent, or was sent on a link that is gone, goes out on it."""
        lost = [
            (job_id, record)
            for job_id, record in self._records.items()
            if record.link is None or record.link.end is not None
        ]
        for job_id, record in lost[:_BURST]:
            _RESENT.add(1)
            self._send(job_id, record, link, now)

    def tick(self, now: float) -> None:
        """Sends again what has waited RESEND_S for its acknowledgement."""
        due = []
        for job_id, record in self._records.items():
            if now - record.sent_at >= RESEND_S:
                due.append((job_id, record))
                if len(due) >= _BURST:
                    break
        for job_id, record in due:
            link = record.link if record.link is not None and record.link.end is None else self._any_link()
            if link is None:
                return
            _RESENT.add(1)
            self._send(job_id, record, link, now)

    def _send(self, job_id: bytes, record: _Record, link: Link, now: float) -> None:
        try:
            link.send(Item(kind=_DELIVERED, id=job_id, body=record.body))
        except LinkDown:
            record.link = None
            return
        record.link = link
        record.sent_at = now
