"""What the router does on the clock: ends holds that nobody released, and tells its gauges."""

import asyncio
from typing import Final

from gpumesh_router.domain.admission import Desk
from gpumesh_runtime.clock import Clock
from gpumesh_runtime.metrics import counter, gauge

_EVERY_S: Final = 5.0
_EXPIRED: Final = counter("gpumesh_router_holds_expired_total", "Holds that no caller released").cell
_HOLDS: Final = gauge("gpumesh_router_holds", "Holds alive").cell


async def upkeep(desk: Desk, clock: Clock) -> None:
    """Runs until cancelled."""
    while True:
        await asyncio.sleep(_EVERY_S)
        _EXPIRED.add(desk.balances.expire(clock.monotonic()))
        _HOLDS.set(desk.balances.holds)
