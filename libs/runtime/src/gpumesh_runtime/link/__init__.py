"""Links: one long bidirectional stream between two processes, carrying items of many jobs. See docs/architecture/link.md."""

from gpumesh.common.v1.link_pb2 import Batch, Goodbye, Item, ItemFlag, ItemKind, Window
from gpumesh_runtime.link.calls import OnAnswer
from gpumesh_runtime.link.checker import FrameChecker, FrameVerdict, MissingFrames
from gpumesh_runtime.link.client import LinkClient
from gpumesh_runtime.link.items import (
    FLAG_FIRST,
    FLAG_LAST,
    ID_BYTES,
    ItemClass,
    class_of_kind,
    fence,
    new_id,
    rendered_bytes,
    split_fence,
)
from gpumesh_runtime.link.link import Link
from gpumesh_runtime.link.options import NODE_LINK, SERVICE_LINK, LinkOptions
from gpumesh_runtime.link.receiver import LinkDown, LinkEnd, LinkProtocolError, Receiver
from gpumesh_runtime.link.server import LinkServer, serve_link
from gpumesh_runtime.link.stats import LinkStats
from gpumesh_runtime.link.windows import FrameWindow, ReceiveWindow, SendWindow

__all__ = [
    "FLAG_FIRST",
    "FLAG_LAST",
    "ID_BYTES",
    "NODE_LINK",
    "SERVICE_LINK",
    "Batch",
    "FrameChecker",
    "FrameVerdict",
    "FrameWindow",
    "Goodbye",
    "Item",
    "ItemClass",
    "ItemFlag",
    "ItemKind",
    "Link",
    "LinkClient",
    "LinkDown",
    "LinkEnd",
    "LinkOptions",
    "LinkProtocolError",
    "LinkServer",
    "LinkStats",
    "MissingFrames",
    "OnAnswer",
    "ReceiveWindow",
    "Receiver",
    "SendWindow",
    "Window",
    "class_of_kind",
    "fence",
    "new_id",
    "rendered_bytes",
    "serve_link",
    "split_fence",
]
