"""When to connect again. Pure: randomness comes in as an argument."""

from gpumesh_runtime.link.options import LinkOptions


class Backoff:
    """Full jitter: U(0, d), d doubling from reconnect_min_s to reconnect_max_s (aws.amazon.com/builders-library, timeouts and jitter)."""

    __slots__ = ("_failures", "_max_s", "_min_s", "_within_s")

    def __init__(self, options: LinkOptions) -> None:
        self._min_s = options.reconnect_min_s
        self._max_s = options.reconnect_max_s
        self._failures = 0
        self._within_s: float | None = None

    def spread(self, min_s: float, max_s: float) -> None:
        """Takes the other side's advice (Welcome of a node session) for the next failures."""
        self._min_s, self._max_s = min_s, max(min_s, max_s)

    def within(self, seconds: float) -> None:
        """The next wait, only it, is U(0, seconds): a node with live jobs comes back at once."""
        self._within_s = seconds

    def succeeded(self) -> None:
        """The link was up for long enough to count: start from the bottom again."""
        self._failures = 0

    def next_wait(self, random: float) -> float:
        """Seconds to wait now; random is in [0, 1)."""
        if self._within_s is not None:
            within, self._within_s = self._within_s, None
            return random * within
        most = min(self._max_s, self._min_s * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return random * most
