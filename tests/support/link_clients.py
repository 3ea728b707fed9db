"""Connecting to a link's server in tests, with times that suit them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from gpumesh_runtime.link import SERVICE_LINK, LinkClient, LinkOptions
from gpumesh_runtime.tls import TlsIdentity
from tests.support.link_server import METHOD
from tests.support.links import Recorder

# Reconnects at once, so that tests of what comes after do not wait.
QUICK = replace(SERVICE_LINK, reconnect_min_s=0.02, reconnect_max_s=0.1)
# The times of links that fall silent, twenty-five times faster.
FAST = replace(QUICK, heartbeat_s=0.1, suspect_s=0.6, lost_s=1.0)


@asynccontextmanager
async def connecting(
    address: str,
    tls: TlsIdentity,
    receiver: Recorder,
    options: LinkOptions = SERVICE_LINK,
    channel_options: tuple[tuple[str, str | int], ...] = (),
) -> AsyncIterator[LinkClient]:
    """A client that runs within the block."""
    client = LinkClient(
        address,
        METHOD,
        credentials=tls,
        hello=lambda: b"hello",
        receiver=receiver,
        options=options,
        channel_options=channel_options,
    )
    running = asyncio.get_running_loop().create_task(client.run())
    try:
        yield client
    finally:
        await client.stop()
        await running


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for a condition. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
