"""The node's one session: connects outwards, says what the node serves, hands items to the runner, comes back when it breaks."""

import asyncio
import random
from collections.abc import Callable
from typing import Final

from gpumesh.common.v1.link_pb2 import Goodbye, GoodbyeReason, Item, ItemKind
from gpumesh.node.v1 import session_pb2
from gpumesh_node import meters
from gpumesh_node.identity import NodeIdentity
from gpumesh_node.runner import Runner
from gpumesh_node.store import ReceiptStore
from gpumesh_node.wire import receipt_to_wire, status_to_wire
from gpumesh_runtime.link import NODE_LINK, Link, LinkClient, LinkDown, LinkEnd, LinkOptions
from gpumesh_runtime.logs import get_logger

log = get_logger("gpumesh.node.session")
METHOD: Final = "/gpumesh.scheduler.v1.SessionService/Connect"
_OFFER: Final = int(ItemKind.ITEM_KIND_OFFER)
_PAYLOAD: Final = int(ItemKind.ITEM_KIND_PAYLOAD)
_WINDOW: Final = int(ItemKind.ITEM_KIND_WINDOW)
_CANCEL: Final = int(ItemKind.ITEM_KIND_CANCEL)
_RECEIPT_ACK: Final = int(ItemKind.ITEM_KIND_RECEIPT_ACK)
_DIRECTIVE: Final = int(ItemKind.ITEM_KIND_DIRECTIVE)
_DEFAULT_HEARTBEAT_S: Final = 5.0
_HEARTBEAT_BOUNDS: Final = (0.05, 60.0)
_MAX_ADDRESSES: Final = 16
# A node with live jobs comes back within this (link.md 7).
_RETURN_WITH_JOBS_S: Final = 1.5
_REAUTHENTICATE_WITHIN_S: Final = 0.5
PRESENT_EVERY_S: Final = 30.0
_PRESENT_PIECE: Final = 500  # receipts at a time, a quarter of a megabyte in the background queue
_PRESENT_PAUSE_S: Final = 0.1


class SessionReplacedError(Exception):
    """Another process runs with this node's identity and a higher session counter. Two cannot: this one ends."""


class Session:
    """Keeps the node's session up over all schedulers' addresses. Receiver of its link (gpumesh_runtime.link.Receiver).

    run() in a task; drain() and then stop() at shutdown; tell() after any change of what the node serves.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        runner: Runner,
        journal: ReceiptStore,
        *,
        version: str,
        boot_id: str,
        options: LinkOptions = NODE_LINK,
        server_name: str = "",
        present_every_s: float = PRESENT_EVERY_S,
        on_change: Callable[[bool], None] = lambda up: None,
    ) -> None:
        """on_change: called with whether a session is up, whenever that changes."""
        self._identity = identity
        self._runner = runner
        self._journal = journal
        self._version = version
        self._boot_id = boot_id
        self._options = options
        self._present_every_s = present_every_s
        self._on_change = on_change
        self._addresses = list(identity.schedulers)
        random.shuffle(self._addresses)
        self._next_address = 0
        self._connecting_to = ""
        self._heartbeat: asyncio.TimerHandle | None = None
        self._heartbeat_s = _DEFAULT_HEARTBEAT_S
        self._presenter: asyncio.Task[None] | None = None
        self._told = False
        self._loop = asyncio.get_running_loop()
        self.replaced: asyncio.Future[None] = self._loop.create_future()
        self._client = LinkClient(
            self._addresses[0],
            METHOD,
            credentials=identity.tls,
            hello=self._hello,
            receiver=self,
            options=options,
            server_name=server_name,
        )

    @property
    def up(self) -> bool:
        """Whether a session is up."""
        return self._runner.link is not None

    async def run(self) -> None:
        """Until stop(). Raises SessionReplacedError when another process took the identity over."""
        client = asyncio.ensure_future(self._client.run())
        try:
            await asyncio.wait({client, self.replaced}, return_when=asyncio.FIRST_COMPLETED)
            if self.replaced.done():
                raise SessionReplacedError
            await client
        finally:
            client.cancel()
            self._quiet()

    def tell(self) -> None:
        """What the node serves has changed: says so soon, once for all changes of this turn of the loop."""
        if self._runner.link is not None and not self._told:
            self._told = True
            self._loop.call_soon(self._say_status)

    async def drain(self, within_s: float) -> bool:
        """Takes no more offers and waits for running jobs. Returns whether all of them ended in time."""
        self._runner.draining = True
        self.tell()
        try:
            async with asyncio.timeout(within_s):
                await self._runner.idle()
        except TimeoutError:
            log.warning("jobs still ran at the end of the drain", jobs=len(self._runner.jobs), seconds=within_s)
            self._runner.end_all()
            return False
        return True

    async def stop(self) -> None:
        """Goodbye and the end of run()."""
        await self._client.stop()

    async def reauthenticate(self, within_s: float) -> None:
        """A new certificate is there: drains, ends the session in order and opens one on the new certificate."""
        link = self._runner.link
        if link is None:
            return  # the next connection uses it anyway
        await self.drain(within_s)
        try:
            self._client.reconnect_within(_REAUTHENTICATE_WITHIN_S)
            link.goodbye(GoodbyeReason.GOODBYE_REASON_REAUTHENTICATE)
            await link.close()
        finally:
            self._runner.draining = False

    # --- Receiver -------------------------------------------------------------------------------------------------------------

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """Welcome: takes the scheduler's advice, sends again what nobody has acknowledged."""
        welcome = session_pb2.Welcome.FromString(hello_or_welcome)
        low, high = _HEARTBEAT_BOUNDS
        self._heartbeat_s = (
            min(max(welcome.heartbeat_ms / 1000, low), high) if welcome.heartbeat_ms else _DEFAULT_HEARTBEAT_S
        )
        if welcome.reconnect_spread_ms:
            # Our own maximum bounds the advice: a node beside its scheduler is no crowd.
            most = self._options.reconnect_max_s
            self._client.spread_reconnects(min(welcome.reconnect_spread_ms / 1000, most), most)
        for address in welcome.scheduler_addresses:
            if address not in self._addresses and len(self._addresses) < _MAX_ADDRESSES:
                self._addresses.append(address)
        meters.SESSIONS.value += 1
        meters.SESSION_UP.set(1)
        self._on_change(True)
        log.info(
            "session up",
            scheduler_id=welcome.scheduler_id,
            boot_id=welcome.scheduler_boot_id,
            address=self._client.address,
        )
        self._runner.attach(link)
        self._beat_later()
        self._presenter = self._loop.create_task(self._present(link), name="present-receipts")

    def on_item(self, link: Link, item: Item) -> None:
        """Hands an item to whoever it is for."""
        kind: int = item.kind
        if kind == _OFFER:
            self._runner.on_offer(item)
        elif kind == _WINDOW:
            self._runner.on_window(item)
        elif kind == _PAYLOAD:
            self._runner.on_payload(item)
        elif kind == _CANCEL:
            self._runner.on_cancel(item)
        elif kind == _RECEIPT_ACK:
            self._on_receipt_ack(item)
        elif kind == _DIRECTIVE:
            meters.IGNORED.labels("directive", "models_are_set_by_configuration").add()
        else:
            meters.IGNORED.labels(str(kind), "unknown_kind").add()

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The scheduler ends the session: what runs goes on until it closes, or is over."""
        reason = GoodbyeReason.Name(goodbye.reason) if goodbye.reason in GoodbyeReason.values() else str(goodbye.reason)
        log.info("scheduler said goodbye", reason=reason)
        if goodbye.reason == GoodbyeReason.GOODBYE_REASON_REPLACED and not self.replaced.done():
            self.replaced.set_result(None)
        elif not self._runner.jobs:
            self._loop.create_task(link.close(), name="close-session").add_done_callback(_read)

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """The session is gone; jobs go on for a while."""
        meters.SESSION_UP.set(0)
        self._on_change(False)
        meters.SESSION_ENDS.labels(end.value).add()
        log.warning("session down", end=end.value, jobs=len(self._runner.jobs))
        self._quiet()
        if self._runner.jobs:
            self._client.reconnect_within(_RETURN_WITH_JOBS_S)
        self._runner.detach()

    def on_overflow(self, link: Link, job_id: bytes) -> None:
        """Data of one job piled up: the link has told the scheduler."""
        self._runner.on_overflow(job_id)

    # --- what it says ---------------------------------------------------------------------------------------------------------

    def _hello(self) -> bytes:
        """Body of Hello, for each attempt to connect; also moves on to the next address, for the attempt after this one."""
        error = self._client.last_error
        if error is not None and self._connecting_to:
            log.warning("no session", address=self._connecting_to, reason=error.reason.value)
        # This attempt's channel is made already.
        self._connecting_to = self._client.address
        self._next_address = (self._next_address + 1) % len(self._addresses)
        self._client.address = self._addresses[self._next_address]
        hello = session_pb2.Hello(
            node_id=self._identity.node_id,
            software_version=self._version,
            session_counter=self._journal.next_session(),
            status=self._status(),
            boot_id=self._boot_id,
        )
        return hello.SerializeToString()

    def _status(self) -> session_pb2.Status:
        runner = self._runner
        reason = "draining" if runner.draining else runner.problem
        return status_to_wire(runner.models(), runner.running(), draining=runner.draining, unavailable_reason=reason)

    def _say_status(self) -> None:
        self._told = False
        link = self._runner.link
        if link is None:
            return
        try:
            link.send_new(ItemKind.ITEM_KIND_HEARTBEAT, body=self._status().SerializeToString())
        except LinkDown:
            return  # on_down follows

    def _beat_later(self) -> None:
        # +-20 %, so that fleets do not beat in step.
        wait = self._heartbeat_s * random.uniform(0.8, 1.2)  # noqa: S311 -- jitter, not a secret
        self._heartbeat = self._loop.call_later(wait, self._beat)

    def _beat(self) -> None:
        self._say_status()
        self._beat_later()

    def _quiet(self) -> None:
        """No heartbeats and no receipts until the next session."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            self._heartbeat = None
        if self._presenter is not None:
            self._presenter.cancel()
            self._presenter = None

    # --- receipts -------------------------------------------------------------------------------------------------------------

    async def _present(self, link: Link) -> None:
        """Sends receipts without acknowledgement: all on a new session, later those that have waited for a whole round."""
        waited_s = 0.0
        while True:
            if expired := self._journal.drop_expired():
                log.error("receipts expired without acknowledgement", count=expired)
            running = self._runner.jobs
            receipts = [receipt for receipt in self._journal.older_than(waited_s) if receipt.job_id not in running]
            for start in range(0, len(receipts), _PRESENT_PIECE):
                for receipt in receipts[start : start + _PRESENT_PIECE]:
                    body = receipt_to_wire(receipt).SerializeToString()
                    link.send_new(ItemKind.ITEM_KIND_RECEIPT, id=receipt.job_id, fence=receipt.fence, body=body)
                    meters.RECEIPTS_SENT.value += 1
                await asyncio.sleep(_PRESENT_PAUSE_S)
            waited_s = self._present_every_s
            await asyncio.sleep(self._present_every_s)

    def _on_receipt_ack(self, item: Item) -> None:
        ack = session_pb2.ReceiptAck.FromString(item.body)
        many = ack.job_ids
        if many:
            ids = [many[at : at + 16] for at in range(0, len(many), 16)]
            for job_id, fence in zip(ids, ack.fences, strict=True):
                self._acknowledged(job_id, fence, "settled")
        else:
            self._acknowledged(item.id, ack.fence, "refused" if ack.reason else "settled")
        meters.RECEIPTS.set(len(self._journal))

    def _acknowledged(self, job_id: bytes, fence: int, result: str) -> None:
        known = self._journal.drop(job_id, fence)
        meters.RECEIPTS_ACKED.labels(result if known else "unknown").add()


def _read(task: "asyncio.Task[None]") -> None:
    """Reads a finished task's exception, so that asyncio does not report it."""
    if not task.cancelled():
        task.exception()
