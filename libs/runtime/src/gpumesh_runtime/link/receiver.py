"""What a service does with a link's items, and how a link ends."""

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from gpumesh.common.v1.link_pb2 import Goodbye, Item
from gpumesh_runtime.error_types import Unavailable
from gpumesh_runtime.reasons import Reason

if TYPE_CHECKING:  # the two name each other
    from gpumesh_runtime.link.link import Link


class LinkEnd(Enum):
    """Why a link is no more."""

    GOODBYE = "goodbye"  # the other side said so first
    LOST = "lost"  # broken, silent, or closed without Goodbye
    PROTOCOL_ERROR = "protocol_error"  # the other side sent what it must not
    CLOSED_BY_US = "closed_by_us"


class LinkDown(Unavailable):
    """The link that carried the call or should take the item is down. Retryable: on a new link, with the same id."""

    def __init__(self, message: str = "The connection to a service that this request needs broke.") -> None:
        super().__init__(Reason.LINK_DOWN, message, retryable=True)


class LinkProtocolError(Exception):
    """Raised by a receiver's on_item when the other side broke the protocol: that link ends, with PROTOCOL_ERROR."""


class Receiver(Protocol):
    """All callbacks are synchronous, must not block, and run in the reader's turn of the event loop.

    on_item may raise: a MeshError (or anything else) fails that item's id and is logged; LinkProtocolError and protobuf's DecodeError
    say that the other side sent garbage, which ends this link only.
    Two more callbacks are called where a receiver has them: on_overflow(link, id) - data queued for id went over its bound, the other
    side has been told (SEND_QUEUE_FULL), end it here too; on_suspect(link, suspect) - silence of 15 s began or ended.
    """

    def on_up(self, link: "Link", hello_or_welcome: bytes) -> None:
        """The handshake is done: body of Hello on the serving side, of Welcome on the connecting side."""

    def on_item(self, link: "Link", item: Item) -> None:
        """Every item that the link does not consume itself."""

    def on_goodbye(self, link: "Link", goodbye: Goodbye) -> None:
        """The other side drains: give it no new ids."""

    def on_down(self, link: "Link", end: LinkEnd) -> None:
        """Exactly once, after on_up; all calls that waited have failed with LinkDown before."""
