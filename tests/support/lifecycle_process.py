"""A process for tests of the lifecycle: `python -m tests.support.lifecycle_process <what>`, where <what> says how it behaves."""

import asyncio
import os
import resource
import sys
from pathlib import Path

from gpumesh_runtime.config import Settings, settings_config
from gpumesh_runtime.health import Health
from gpumesh_runtime.lifecycle import Life, StartError, run
from gpumesh_runtime.monitor import Monitor, rss_bytes
from gpumesh_runtime.rpc.server import Server


class ProbeSettings(Settings):
    """Settings of the probe."""

    model_config = settings_config("GPUMESH_PROBE_")

    address: str = ""


async def main(life: Life) -> None:
    """Does what its argument says, then lives until it is stopped."""
    settings = life.settings
    what = sys.argv[1]
    if what == "busy":
        assert isinstance(settings, ProbeSettings)
        await Server("probe", settings.address, settings.tls()).start()
    if what == "unstartable":
        raise StartError("the cellar is full; make room in /cellar")
    if what == "bug":
        raise ValueError("the prompt")
    if what == "spawned":
        life.spawn(fail(), "stock taking")
    if what == "unwatched":
        asyncio.get_running_loop().create_task(fail(), name="forgotten")
    if what == "unwatched_ours":
        # A coroutine of our own package; the address is of TEST-NET-3 (RFC 5737), which no machine has.
        asyncio.get_running_loop().create_task(Monitor("203.0.113.1:1", Health()).start(), name="forgotten")
    if what == "core":
        life.ready(core=resource.getrlimit(resource.RLIMIT_CORE)[0])
    elif what == "rss":
        life.ready(rss_bytes=rss_bytes())
    else:
        life.ready()
    await life.until_stopped()
    if what == "slow":
        await asyncio.Event().wait()
    Path(os.environ["PROBE_TRACE"]).write_text("drained")  # noqa: ASYNC240 -- the last act of the process


async def fail() -> None:
    """Raises at once."""
    raise ValueError("the prompt")


if __name__ == "__main__":
    run(main, ProbeSettings.load(), "probe")
