"""Time as an argument. Pure code takes instants; rims take a Clock, so that tests turn its hands."""

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Wall time for what is written down, monotonic time for what is measured. Never compare two machines' clocks."""

    def now(self) -> datetime:
        """Wall time, UTC, time-zone aware."""

    def now_ns(self) -> int:
        """Wall time, nanoseconds since 1970."""

    def monotonic(self) -> float:
        """Seconds since some moment of this process's machine; never goes back."""


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Wall time, UTC."""
        return datetime.now(UTC)

    def now_ns(self) -> int:
        """Wall time, nanoseconds since 1970."""
        return time.time_ns()

    def monotonic(self) -> float:
        """Seconds, same origin as the event loop's time()."""
        return time.monotonic()


class FakeClock:
    """A clock that moves only when told to. Starts at 2026-01-01 UTC, monotonic 1000.0."""

    def __init__(self, start: datetime | None = None, monotonic: float = 1000.0) -> None:
        self._now = start or datetime(2026, 1, 1, tzinfo=UTC)
        self._monotonic = monotonic

    def now(self) -> datetime:
        """Wall time, UTC."""
        return self._now

    def now_ns(self) -> int:
        """Wall time, nanoseconds since 1970; exact to the microsecond."""
        since = self._now - datetime(1970, 1, 1, tzinfo=UTC)
        return (since // timedelta(microseconds=1)) * 1000

    def monotonic(self) -> float:
        """Seconds."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Moves both hands forward."""
        if seconds < 0:
            raise ValueError("time does not go back; use step_wall to model a stepped wall clock")
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds

    def step_wall(self, seconds: float) -> None:
        """Moves the wall clock alone, as an operator or NTP does."""
        self._now += timedelta(seconds=seconds)
