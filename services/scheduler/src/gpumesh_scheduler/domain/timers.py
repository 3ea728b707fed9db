"""A coarse timer wheel: many deadlines, one driver, lazy removal. Pure."""

import heapq


class Wheel:
    """Keys that want to be looked at at some instant, in buckets of `tick_s`.

    Adding costs a dictionary look-up and an append (0.2 us); nothing is ever removed: a key that no longer matters is found out when
    its bucket comes. That is cheaper than one event-loop timer per job (0.9 us to set, 0.5 us to cancel, and the loop's heap keeps it).
    """

    __slots__ = ("_buckets", "_order", "tick_s")

    def __init__(self, tick_s: float = 0.05) -> None:
        self.tick_s = tick_s
        self._buckets: dict[int, list[bytes]] = {}
        self._order: list[int] = []

    def add(self, key: bytes, at: float) -> None:
        """Wants `key` back at `at`, or up to one tick later."""
        index = int(at / self.tick_s) + 1
        bucket = self._buckets.get(index)
        if bucket is None:
            self._buckets[index] = [key]
            heapq.heappush(self._order, index)
        else:
            bucket.append(key)

    def due(self, now: float) -> list[bytes]:
        """Takes out every key whose instant has passed."""
        last = int(now / self.tick_s)
        order = self._order
        if not order or order[0] > last:
            return []
        keys: list[bytes] = []
        while order and order[0] <= last:
            keys += self._buckets.pop(heapq.heappop(order))
        return keys

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())
