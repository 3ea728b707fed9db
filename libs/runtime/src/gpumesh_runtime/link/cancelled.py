"""Ids that the other side cancelled, remembered for a while: a Cancel overtakes data, so its Submit may come after it. Pure."""

from typing import Final

from gpumesh_runtime.link.items import fence_covers

# 65,536 ids are 10 MB at worst; at 60 s that is 1,000 cancels a second on one link.
_MOST: Final = 65_536


class CancelMemory:
    """Bounded in time and number; the oldest go first."""

    __slots__ = ("_keep_s", "_until")

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._until: dict[bytes, tuple[float, int]] = {}  # id -> (until when, fence), in order of time

    def __len__(self) -> int:
        return len(self._until)

    def add(self, id_: bytes, fence: int, now: float) -> None:
        """Remembers a cancel of id_ up to `fence` (0: all of it)."""
        until = self._until
        known = until.pop(id_, None)
        if known is not None and fence != 0:
            fence = 0 if known[1] == 0 else max(fence, known[1])
        until[id_] = (now + self._keep_s, fence)
        while until:
            oldest = next(iter(until))
            if until[oldest][0] > now and len(until) <= _MOST:
                break
            del until[oldest]

    def covers(self, id_: bytes, fence: int, now: float) -> bool:
        """Whether work of (id_, fence) was cancelled within the last minute."""
        known = self._until.get(id_)
        return known is not None and known[0] > now and fence_covers(known[1], fence)
