"""The numbers of a link, each with its reason. Frozen; one set for links between services, one for node sessions."""

from dataclasses import dataclass
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """Bounds and times of one link. Bytes are encoded bytes, times are seconds. The defaults suit links between services."""

    # A message of data is no larger, so that nothing waits behind more than this (one item larger than it travels alone).
    max_message_bytes: int = 256 * KIB
    # Items in one message; beyond this batching wins nothing more (2 us an item against 55-90 us a message).
    max_items: int = 256
    # One item may not be larger: under gRPC's receive limit of 4 MiB.
    max_item_bytes: int = 3 * MIB
    # Unsent data of one id; more ends that id with SEND_QUEUE_FULL. Above a JSON body of 8 MiB in pieces.
    queue_id_bytes: int = 16 * MIB
    # Unsent data of all ids together.
    queue_data_bytes: int = 64 * MIB
    # Unsent background items.
    queue_background_bytes: int = 16 * MIB
    # Unsent control items; a peer that lets these pile up reads nothing, and its link ends.
    queue_control_bytes: int = 4 * MIB
    # Data goes no sooner than this after the last data message, except first and last items (1.3-1.9x chunks, link.md rule 2).
    pace_s: float = 0.004
    # Background items wait for another message no longer than this.
    background_s: float = 0.05
    # Data rides with a control message, paced or not, when all that is queued is no more than this.
    ride_bytes: int = 8 * KIB
    # Hello to Welcome, connection included.
    handshake_s: float = 5.0
    # Mean time between heartbeats of an idle side, spread by +-20 % so that fleets do not beat in step.
    heartbeat_s: float = 10.0
    # Silence after which the other side is in doubt, and after which it is lost.
    suspect_s: float = 15.0
    lost_s: float = 25.0
    # Ids cancelled by the other side are remembered this long: a Cancel may overtake its Submit.
    cancel_memory_s: float = 60.0
    # Reconnecting waits U(0, d), d doubling from the first to the second.
    reconnect_min_s: float = 0.1
    reconnect_max_s: float = 1.0
    # close() gives what is queued this long to leave.
    close_s: float = 2.0


SERVICE_LINK: Final = LinkOptions()
# Nodes sit behind slow uplinks: smaller messages keep cancels quick. They come back gently: 10,000 handshakes cost 20 CPU-seconds.
NODE_LINK: Final = LinkOptions(
    max_message_bytes=64 * KIB,
    max_item_bytes=MIB,
    queue_data_bytes=32 * MIB,
    queue_background_bytes=4 * MIB,
    queue_control_bytes=MIB,
    handshake_s=15.0,
    reconnect_min_s=5.0,
    reconnect_max_s=60.0,
)
