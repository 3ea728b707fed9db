"""The link to metering: Settle goes out, Settled comes back. What is not answered is sent again; the reconciler keeps it."""

import asyncio
from typing import Final

from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.metering.v1.settlement_service_pb2 import Settle, Settled, SettlementHello
from gpumesh_runtime.link import Link, LinkClient, LinkEnd, LinkProtocolError
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.tls import TlsIdentity
from gpumesh_scheduler import metrics
from gpumesh_scheduler.desk import Desk
from gpumesh_scheduler.domain.evidence import Bill
from gpumesh_scheduler.domain.reconcile import Settling
from gpumesh_scheduler.wire import many_from_wire, settle_to_wire, settled_from_wire

log = get_logger("gpumesh.scheduler.settlement")

_SETTLE: Final = int(ItemKind.ITEM_KIND_SETTLE)
_SETTLED: Final = int(ItemKind.ITEM_KIND_SETTLED)
# Of bills in one item: well inside a message between services.
_MOST_BYTES: Final = 64 * 1024
METHOD: Final = "/gpumesh.metering.v1.SettlementService/Connect"


class Settlement:
    """Receiver of the link to metering."""

    def __init__(self, desk: Desk, address: str, tls: TlsIdentity) -> None:
        self._desk = desk
        desk.give_settle = self.give
        hello = SettlementHello(scheduler_id=desk.scheduler_id).SerializeToString()
        self._bills: list[tuple[bytes, bytes]] = []
        self._bills_bytes = 0
        self._call_soon = asyncio.get_running_loop().call_soon
        self.client = LinkClient(address, METHOD, credentials=tls, hello=lambda: hello, receiver=self)

    def give(self, bill: Bill) -> None:
        """Sends a bill with all others of this turn of the loop if the link is up; if not, it goes when it is."""
        link = self.client.link
        if link is None or link.end is not None:
            return
        bills = self._bills
        if not bills:
            self._call_soon(self._send)
        body = settle_to_wire(bill)
        bills.append((bill.job_id, body))
        self._bills_bytes += len(body)
        if self._bills_bytes > _MOST_BYTES:
            self._send()

    def _send(self) -> None:
        link, bills = self.client.link, self._bills
        self._bills, self._bills_bytes = [], 0
        if not bills or link is None or link.end is not None:
            return  # on_up sends them again
        metrics.SETTLES.value += len(bills)
        if len(bills) == 1:
            job_id, body = bills[0]
            link.send_new(_SETTLE, id=job_id, body=body)
        else:
            job_ids, bodies = zip(*bills, strict=True)
            link.send_new(_SETTLE, body=Settle(job_ids=b"".join(job_ids), jobs=bodies).SerializeToString())

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """Everything that has not been answered goes again: metering answers repeats with the first result."""
        del hello_or_welcome
        desk = self._desk
        log.info("metering connected", count=len(desk.reconciler.cases))
        desk.settle(desk.reconciler.unanswered(desk.time(), everything=True))

    def on_item(self, link: Link, item: Item) -> None:
        """Settled."""
        if item.kind != _SETTLED:
            raise LinkProtocolError("metering does not send this")
        settled = Settled.FromString(item.body)
        if settled.job_ids:
            self._many(settled)
            return
        charge, pays, reason = settled_from_wire(settled)
        metrics.SETTLED.labels(reason).value += 1
        self._desk.settle(self._desk.reconciler.settled(item.id, charge, pays, reason))

    def _many(self, settled: Settled) -> None:
        judge = self._desk.reconciler.settled
        acks: Settling = []
        for job_id, charge, fence, pay in many_from_wire(settled):
            acks += judge(job_id, charge, {fence: pay}, "")
        metrics.SETTLED_WELL.value += len(settled.charges_nano_usd)
        self._desk.answer(acks)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """metering stops: the link ends soon and comes back with its successor."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """Settles wait."""
        log.warning("metering gone", end=end.value, count=len(self._desk.reconciler.cases))
