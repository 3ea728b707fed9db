"""A token bucket per address for requests that fail to authenticate. Pure; bounded; time is an argument in seconds."""

import math
from collections import OrderedDict
from typing import Final

_MAX_ADDRESSES: Final = 20_000


class FailureThrottle:
    """`burst` failures at once, then `per_s` a second. Keys that were admitted lately are let through whatever their address did: many
    people share one address.
    """

    def __init__(self, burst: float, per_s: float, max_addresses: int = _MAX_ADDRESSES) -> None:
        self._burst = burst
        self._per_s = per_s
        self._max = max_addresses
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> tokens left, at
        self._good: dict[bytes, None] = {}

    def blocked_s(self, address: str, now: float) -> float:
        """How long this address must wait, seconds; 0: not at all."""
        bucket = self._buckets.get(address)
        if bucket is None:
            return 0.0
        left = self._left(bucket, now)
        return 0.0 if left >= 1 else math.ceil((1 - left) / self._per_s)

    def failed(self, address: str, now: float) -> None:
        """A request from there failed to authenticate."""
        left = self._left(self._buckets.get(address, (self._burst, now)), now)
        self._buckets[address] = (max(0.0, left - 1), now)
        self._buckets.move_to_end(address)
        if len(self._buckets) > self._max:
            self._buckets.popitem(last=False)

    def admitted(self, key_sha256: bytes) -> None:
        """A request with this key was admitted."""
        if key_sha256 not in self._good:
            if len(self._good) >= self._max:
                self._good.clear()
            self._good[key_sha256] = None

    def refused(self, key_sha256: bytes) -> None:
        """The key is not good (any more)."""
        self._good.pop(key_sha256, None)

    def is_good(self, key_sha256: bytes) -> bool:
        """Whether it was admitted lately."""
        return key_sha256 in self._good

    def _left(self, bucket: tuple[float, float], now: float) -> float:
        tokens, at = bucket
        return min(self._burst, tokens + (now - at) * self._per_s)
