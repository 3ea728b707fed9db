"""A whole node in this process: real settings, real session, real journal."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gpumesh_node.__main__ import serve
from gpumesh_node.config import NodeSettings
from gpumesh_runtime.lifecycle import Life
from gpumesh_runtime.tls import TlsIdentity

_START_S = 30.0


def node_settings(
    folder: Path, tls: TlsIdentity, schedulers: list[str], engines: list[dict[str, Any]], **more: Any
) -> NodeSettings:
    """Settings of a node with a ready certificate that reconnects quickly."""
    return NodeSettings.read(
        state_dir=folder / "state",
        tls_cert=tls.cert_file,
        tls_key=tls.key_file,
        tls_ca=tls.ca_file,
        scheduler_addresses=tuple(schedulers),
        engines=json.dumps(engines),
        ready_file=folder / "node.ready",
        **{"reconnect_min_s": 0.05, "reconnect_max_s": 0.2, "drain_s": 5.0, **more},
    )


@asynccontextmanager
async def running_node(settings: NodeSettings) -> AsyncIterator[Life]:
    """Starts a node and drains it afterwards, as SIGTERM does."""
    life = Life(settings, "node")
    process = asyncio.create_task(serve(life, settings), name="node")
    assert settings.ready_file is not None
    try:
        async with asyncio.timeout(_START_S):
            while not settings.ready_file.exists():
                if process.done():
                    await process
                await asyncio.sleep(0.01)
        yield life
    finally:
        life.stop("test")
        await process
        life.remove_ready_file()
        await life.supervise(_nothing)


async def _nothing(_life: Life) -> None:
    """Lets Life cancel what it spawned, as at the end of a process."""
