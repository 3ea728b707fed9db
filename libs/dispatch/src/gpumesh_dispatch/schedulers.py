"""Links to schedulers: opened when an admission first names an address, kept up, closed when long unused."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from gpumesh.common.v1.link_pb2 import Goodbye, Item
from gpumesh.scheduler.v1.dispatch_service_pb2 import DispatchHello
from gpumesh_runtime.link import Link, LinkClient, LinkEnd, LinkOptions
from gpumesh_runtime.tls import TlsIdentity

METHOD: Final = "/gpumesh.scheduler.v1.DispatchService/Connect"
# Reconnects are quicker than between other services: jobs must be placed again within 1 s of a scheduler's return.
_OPTIONS: Final = LinkOptions(reconnect_min_s=0.05, reconnect_max_s=0.25)
# A scheduler that has been away this long, with nothing waiting for it, has moved.
_FORGET_S: Final = 300.0


class Owner(Protocol):
    """Who is told what happens on the links."""

    def scheduler_up(self, connection: "SchedulerConnection", link: Link) -> None:
        """A link is up."""

    def scheduler_item(self, connection: "SchedulerConnection", link: Link, item: Item) -> None:
        """An item came."""

    def scheduler_down(self, connection: "SchedulerConnection") -> None:
        """A link broke or was closed."""

    def scheduler_overflow(self, link: Link, job_id: bytes) -> None:
        """Data queued for a job went over its bound; the other side has been told."""


class SchedulerConnection:
    """One address, its link client, and what waits for the link to come up."""

    def __init__(self, address: str, owner: Owner, credentials: TlsIdentity | None, hello: bytes, now: float) -> None:
        self.address = address
        self.link: Link | None = None
        self.waiting: dict[bytes, Callable[[Link | None], None]] = {}
        self.idle_since = now
        self.draining = False
        self._owner = owner
        self.client = LinkClient(
            address, METHOD, credentials=credentials, hello=lambda: hello, receiver=self, options=_OPTIONS
        )
        self.task = asyncio.get_running_loop().create_task(self.client.run(), name=f"dispatch-link {address}")

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """The handshake is done: what waited is submitted."""
        del hello_or_welcome
        self.link = link
        self.draining = False
        self._owner.scheduler_up(self, link)
        waiting, self.waiting = self.waiting, {}
        for submit in waiting.values():
            submit(link)

    def on_item(self, link: Link, item: Item) -> None:
        """All items."""
        self._owner.scheduler_item(self, link, item)

    def on_overflow(self, link: Link, job_id: bytes) -> None:
        """Data queued for a job went over its bound."""
        self._owner.scheduler_overflow(link, job_id)

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """It drains: running jobs go on, new ones are refused by it or not sent here by the router."""
        del link, goodbye
        self.draining = True

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """The jobs on it are told by the owner."""
        del link, end
        self.link = None
        self.idle_since = asyncio.get_running_loop().time()
        self._owner.scheduler_down(self)

    async def stop(self) -> None:
        """Goodbye and the end of the link."""
        await self.client.stop()
        await asyncio.wait([self.task])


class Schedulers:
    """All connections, by address."""

    def __init__(self, owner: Owner, credentials: TlsIdentity | None, caller_id: str) -> None:
        self._owner = owner
        self._credentials = credentials
        self._hello = DispatchHello(caller_id=caller_id).SerializeToString()
        self._connections: dict[str, SchedulerConnection] = {}
        self._stopping: set[asyncio.Task[None]] = set()

    def at(self, address: str) -> SchedulerConnection:
        """The connection to "host:port", opened if need be."""
        connection = self._connections.get(address)
        if connection is None:
            now = asyncio.get_running_loop().time()
            connection = SchedulerConnection(address, self._owner, self._credentials, self._hello, now)
            self._connections[address] = connection
        return connection

    def any_link(self) -> Link | None:
        """Some live link, not to a scheduler that drains if there is another."""
        found = None
        for connection in self._connections.values():
            if connection.link is not None and connection.link.end is None:
                if not connection.draining:
                    return connection.link
                found = connection.link
        return found

    def tick(self, now: float) -> None:
        """Closes what has long been away and is not waited for."""
        gone = [
            address
            for address, connection in self._connections.items()
            if connection.link is None and not connection.waiting and now - connection.idle_since > _FORGET_S
        ]
        for address in gone:
            task = asyncio.get_running_loop().create_task(self._connections.pop(address).stop())
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)

    async def stop(self) -> None:
        """Closes all, in order."""
        connections, self._connections = list(self._connections.values()), {}
        await asyncio.gather(*(connection.stop() for connection in connections))
        if self._stopping:
            await asyncio.wait(self._stopping)
