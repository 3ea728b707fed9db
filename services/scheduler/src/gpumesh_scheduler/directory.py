"""The link to the registry: revoked nodes and the model catalogue. Without it the scheduler goes on with what it has."""

from typing import Final

from gpumesh.common.v1.link_pb2 import Goodbye, Item, ItemKind
from gpumesh.registry.v1.directory_service_pb2 import Directory as DirectoryMessage
from gpumesh.registry.v1.directory_service_pb2 import DirectoryHello
from gpumesh_runtime.link import Link, LinkClient, LinkEnd, LinkProtocolError
from gpumesh_runtime.logs import get_logger
from gpumesh_runtime.tls import TlsIdentity
from gpumesh_scheduler.desk import Desk

log = get_logger("gpumesh.scheduler.directory")

_UPDATE: Final = int(ItemKind.ITEM_KIND_UPDATE)
METHOD: Final = "/gpumesh.registry.v1.DirectoryService/Connect"


class Directory:
    """Receiver of the link to the registry."""

    def __init__(self, desk: Desk, address: str, tls: TlsIdentity) -> None:
        self._desk = desk
        hello = DirectoryHello(reader_id=desk.scheduler_id).SerializeToString()
        self.client = LinkClient(address, METHOD, credentials=tls, hello=lambda: hello, receiver=self)

    def on_up(self, link: Link, hello_or_welcome: bytes) -> None:
        """The registry sends everything at once."""
        log.info("registry connected")

    def on_item(self, link: Link, item: Item) -> None:
        """An update. Repetition is harmless."""
        if item.kind != _UPDATE:
            raise LinkProtocolError("the registry does not send this")
        update = DirectoryMessage.FromString(item.body)
        desk = self._desk
        now = desk.time()
        if update.revoked_node_ids:
            desk.apply(desk.roster.revoke(list(update.revoked_node_ids), now))
        if update.catalogue_whole:
            desk.apply(desk.roster.catalogue(frozenset(model.model_id for model in update.models), now))

    def on_goodbye(self, link: Link, goodbye: Goodbye) -> None:
        """The registry stops: the link comes back with its successor."""

    def on_down(self, link: Link, end: LinkEnd) -> None:
        """What is known stays."""
        log.warning("registry gone", end=end.value)
