"""End-to-end windows of one job: how far the sender of frames may be ahead of the end that consumes them. Pure.

Counts are cumulative, so a repeated or lost Window does no harm and one is sent again after a reconnect. They are rendered bytes (body +
256 a frame). Grants follow the transport's drain at the consuming end, never the arrival of frames: that deadlocks (link.md rule 5).
"""

from gpumesh.common.v1.link_pb2 import Window

DEFAULT_LIMIT_BYTES = 256 * 1024


class SendWindow:
    """The sender's side (a node, or a relay that enforces). One frame may always be under way, however large."""

    __slots__ = ("consumed_bytes", "consumed_seq", "limit_bytes", "sent_bytes")

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES, sent_bytes: int = 0) -> None:
        """sent_bytes: what had been sent before, when a window goes on after a reconnect."""
        self.limit_bytes = limit_bytes
        self.sent_bytes = sent_bytes
        self.consumed_bytes = 0
        self.consumed_seq = 0

    def can_send(self, rendered: int) -> bool:
        """Whether a frame of that many rendered bytes may go now."""
        under_way = self.sent_bytes - self.consumed_bytes
        return under_way <= 0 or under_way + rendered <= self.limit_bytes

    def sent(self, rendered: int) -> None:
        """A frame went."""
        self.sent_bytes += rendered

    def on_window(self, window: Window) -> bool:
        """Takes a grant; True when it opened the window further. Old and repeated grants change nothing."""
        opened = False
        # Nothing can be consumed that was not sent: a stranger's counts must not open the window for ever.
        consumed = min(window.consumed_bytes, self.sent_bytes)
        if consumed > self.consumed_bytes:
            self.consumed_bytes = consumed
            opened = True
        if window.consumed_seq > self.consumed_seq:
            self.consumed_seq = window.consumed_seq
        if window.limit_bytes and window.limit_bytes != self.limit_bytes:
            opened = opened or window.limit_bytes > self.limit_bytes
            self.limit_bytes = window.limit_bytes
        return opened


class ReceiveWindow:
    """The consuming end's side. Call consumed() when a frame has left through the transport, not when it arrived."""

    __slots__ = ("_granted_bytes", "consumed_bytes", "consumed_seq", "limit_bytes", "received_bytes")

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.received_bytes = 0
        self.consumed_bytes = 0
        self.consumed_seq = 0
        self._granted_bytes = 0

    def received(self, rendered: int) -> bool:
        """A frame arrived; False when the sender went further than it was allowed (WINDOW_EXCEEDED)."""
        before = self.received_bytes - self._granted_bytes
        self.received_bytes += rendered
        return before <= 0 or before + rendered <= self.limit_bytes

    def consumed(self, seq: int, rendered: int) -> Window | None:
        """Frame `seq` left for the client; a Window to send when a quarter of the limit is newly free, else None."""
        if seq > self.consumed_seq:
            self.consumed_seq = seq
        self.consumed_bytes += rendered
        if (self.consumed_bytes - self._granted_bytes) * 4 < self.limit_bytes:
            return None
        return self.grant()

    def grant(self) -> Window:
        """The window as it stands, to send now: after a reconnect, or when a drain ends a stall."""
        self._granted_bytes = self.consumed_bytes
        return Window(consumed_seq=self.consumed_seq, consumed_bytes=self.consumed_bytes, limit_bytes=self.limit_bytes)


# The name by which designs speak of the pair.
FrameWindow = ReceiveWindow
