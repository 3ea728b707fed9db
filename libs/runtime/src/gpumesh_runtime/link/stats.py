"""What one link has done. Plain integers, read by metrics at scrape."""

from dataclasses import dataclass


@dataclass(slots=True)
class LinkStats:
    """Counts since the link came up; bytes are encoded bytes."""

    messages_out: int = 0
    items_out: int = 0
    bytes_out: int = 0
    messages_in: int = 0
    items_in: int = 0
    bytes_in: int = 0
    # Asked for by the other side after it had cancelled them: dropped, no zombie.
    zombies_dropped: int = 0
    # Ids ended with SEND_QUEUE_FULL, and background items refused by a full queue.
    overflows: int = 0
    # Items whose handler raised something that was not the peer's fault.
    item_errors: int = 0
    # Unsent items dropped by cancels.
    cancelled_items: int = 0
