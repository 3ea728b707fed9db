"""The schedulers' links: every Settle goes to the writer, every answer back to the link that it came by."""

from typing import Final

from gpumesh.common.v1.link_pb2 import Item, ItemKind
from gpumesh_metering import wire
from gpumesh_metering.writer import GroupCommitWriter
from gpumesh_runtime.link import Goodbye, Link, LinkEnd
from gpumesh_runtime.metrics import gauge

_SCHEDULERS: Final = gauge("gpumesh_metering_scheduler_links", "Links from schedulers").cell
_SETTLE: Final = ItemKind.ITEM_KIND_SETTLE
_SETTLED: Final = ItemKind.ITEM_KIND_SETTLED


class _Way:
    """The way back on one link (writer.Way)."""

    __slots__ = ("link",)

    def __init__(self, link: Link) -> None:
        self.link = link

    def answer(self, job_id: bytes, body: bytes) -> None:
        """Sends Settled. A link that is down loses the answer; the scheduler asks again and gets the same."""
        link = self.link
        if link.end is None:
            link.send_new(_SETTLED, id=job_id, body=body)

    def answer_many(self, body: bytes) -> None:
        """Sends one Settled of many jobs."""
        link = self.link
        if link.end is None:
            link.send_new(_SETTLED, body=body)


class SettlementReceiver:
    """Receiver of the SettlementService's links."""

    def __init__(self, writer: GroupCommitWriter) -> None:
        self._writer = writer
        self._ways: dict[Link, _Way] = {}

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """A scheduler came."""
        self._ways[link] = _Way(link)
        _SCHEDULERS.value = len(self._ways)

    def on_item(self, link: Link, item: Item) -> None:
        """A job to settle, or many. When the queue is full they are dropped: unanswered, so the scheduler keeps them."""
        if item.kind != _SETTLE:
            return
        way, submit = self._ways[link], self._writer.submit
        if item.id:
            submit(item.id, item.body, way)
        else:
            for job_id, body in wire.many_from_wire(item.body):
                submit(job_id, body, way)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The scheduler stops; what it sent is still written and answered."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """The scheduler is gone. What it sent is still written."""
        self._ways.pop(link, None)
        _SCHEDULERS.value = len(self._ways)
