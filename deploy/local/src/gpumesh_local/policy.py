"""When a process that died is started again, and when it is given up. Pure."""

from collections import deque
from typing import Final

FIRST_DELAY_S: Final = 0.2
LONGEST_DELAY_S: Final = 5.0
GIVE_UP_DEATHS: Final = 5
GIVE_UP_WITHIN_S: Final = 30.0


class RestartPolicy:
    """Delays double from 0.2 s to 5 s and start over after 30 s of life; the fifth death within 30 s is one too many."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=GIVE_UP_DEATHS)
        self._delay_s = FIRST_DELAY_S

    def died(self, now: float) -> float | None:
        """Seconds to wait before the next start; None: give up. now: monotonic."""
        if self._deaths and now - self._deaths[-1] > GIVE_UP_WITHIN_S:
            self._delay_s = FIRST_DELAY_S
        self._deaths.append(now)
        if len(self._deaths) == GIVE_UP_DEATHS and now - self._deaths[0] <= GIVE_UP_WITHIN_S:
            return None
        delay = self._delay_s
        self._delay_s = min(2 * delay, LONGEST_DELAY_S)
        return delay
