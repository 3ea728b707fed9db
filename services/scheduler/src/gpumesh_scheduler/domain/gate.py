"""How fast new sessions may come: a token bucket. Pure.

A TLS handshake costs 2 ms of CPU, so a fleet that returns at once must be spread.
"""


class RateGate:
    """Lets `rate_per_s` through on average and `burst` at once."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self._rate = rate_per_s
        self._burst = burst
        self._left = burst
        self._at = 0.0

    def take(self, now: float) -> float:
        """0.0 when one may pass now, else the seconds to wait."""
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
        self._at = now
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) / self._rate
