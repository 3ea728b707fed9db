"""Whether the other side lives and when to beat. Pure: monotonic times come in as arguments; two machines' clocks never meet."""

from enum import Enum
from typing import Final

from gpumesh_runtime.link.options import LinkOptions

_JITTER: Final = 0.2
# A tick this late means that this process stood still (suspended, stopped, a long pause): messages may wait unread in the socket.
_STOOD_STILL_S: Final = 2.0


class Life(Enum):
    """What silence says."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    LOST = "lost"


class Liveness:
    """Times of one link. The rim sets heard_at and sent_at on every message and calls tick()."""

    __slots__ = ("_beat_after", "_expected_at", "_options", "heard_at", "sent_at")

    def __init__(self, options: LinkOptions, now: float, jitter: float) -> None:
        """jitter: a random number in [0, 1) that places this link's heartbeat within +-20 %."""
        self._options = options
        self.heard_at = now
        self.sent_at = now
        self._beat_after = options.heartbeat_s * (1 - _JITTER + 2 * _JITTER * jitter)
        self._expected_at = now + self._beat_after

    def life(self, now: float) -> Life:
        """By the time since anything was heard."""
        silence = now - self.heard_at
        if silence < self._options.suspect_s:
            return Life.ALIVE
        return Life.SUSPECT if silence < self._options.lost_s else Life.LOST

    def tick(self, now: float) -> tuple[Life, bool]:
        """(life, whether to beat now). A tick that comes late gives the silence a second chance: the sleeper may be us."""
        late = now - self._expected_at
        life = self.life(now)
        if late > _STOOD_STILL_S and life is Life.LOST:
            self.heard_at = now - self._options.suspect_s
            life = Life.SUSPECT
        return life, now - self.sent_at >= self._beat_after - 0.001

    def next_tick(self, now: float) -> float:
        """Seconds until tick() may have something to say; at least a millisecond."""
        silence = now - self.heard_at
        options = self._options
        border = options.suspect_s if silence < options.suspect_s else options.lost_s
        wait = max(0.001, min(self.sent_at + self._beat_after - now, border - silence))
        self._expected_at = now + wait
        return wait
