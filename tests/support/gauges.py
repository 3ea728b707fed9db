"""What the processes of a mesh say of themselves at /metrics, for tests that look for leaks."""

import asyncio
from typing import Final

import aiohttp

from tests.support.mesh import Mesh

_FIRST: Final = 20  # offset of the first /metrics from the HTTP port, for a mesh with one scheduler
# Gauges that are 0 in a mesh where nothing runs and everything is settled, by process.
AT_REST: Final[dict[str, tuple[str, ...]]] = {
    "edge-http": ("gpumesh_dispatch_running_jobs", "gpumesh_dispatch_unacknowledged_deliveries"),
    "router": ("gpumesh_dispatch_running_jobs", "gpumesh_dispatch_unacknowledged_deliveries"),
    "scheduler": (
        "gpumesh_scheduler_jobs",
        "gpumesh_scheduler_queued_jobs",
        "gpumesh_scheduler_unsettled_jobs",
        "gpumesh_scheduler_payload_bytes",
    ),
    "metering": ("gpumesh_metering_queued_items",),
    "node": ("gpumesh_node_jobs_running", "gpumesh_node_jobs_waiting", "gpumesh_node_receipts_unacknowledged"),
}


class Gauges:
    """Reads metrics of a mesh's processes. http: stays the caller's."""

    def __init__(self, mesh: Mesh, http: aiohttp.ClientSession) -> None:
        self._mesh = mesh
        self._http = http

    def _url(self, process: str) -> str:
        """As the launcher hands ports out: services in this order, then nodes."""
        kind, _, number = process.partition("-") if process.startswith("node") else (process, "", "")
        order = ("registry", "metering", "router", "edge-http", "scheduler", "node").index(kind)
        return f"http://127.0.0.1:{self._mesh.port + _FIRST + order + int(number or 1) - 1}/metrics"

    async def text(self, process: str) -> str:
        """The whole exposition."""
        async with self._http.get(self._url(process)) as answer:
            assert answer.status == 200
            return await answer.text()

    async def all_of(self, process: str) -> dict[str, float]:
        """Every value by name with labels, and sums over all labels by bare name."""
        values: dict[str, float] = {}
        for line in (await self.text(process)).splitlines():
            if line.startswith("#"):
                continue
            name, _, number = line.rpartition(" ")
            values[name] = float(number)
            bare = name.partition("{")[0]
            if bare != name:
                values[bare] = values.get(bare, 0.0) + float(number)
        return values

    async def value(self, process: str, name: str) -> float:
        """One metric, 0 when it does not exist yet: labels appear with their first count."""
        return (await self.all_of(process)).get(name, 0.0)

    async def reaches(self, process: str, name: str, wanted: float, timeout_s: float = 10.0) -> None:
        """Waits until a metric has a value. Fails the test when it does not in time."""
        seen = -1.0
        try:
            async with asyncio.timeout(timeout_s):
                while (seen := await self.value(process, name)) != wanted:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{name} of {process} is {seen}, not {wanted}, after {timeout_s} s") from None

    async def at_rest(self, timeout_s: float = 20.0) -> None:
        """Waits until nothing runs, waits, is held or is unsettled anywhere. Fails the test with what is left."""
        left: dict[str, float] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while left := await self._left():
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"still there after {timeout_s} s: {left}") from None

    async def _left(self) -> dict[str, float]:
        left: dict[str, float] = {}
        nodes = [path.stem for path in (self._mesh.home / "pids").glob("node*.pid")]
        for process, names in [*AT_REST.items(), *((node, AT_REST["node"]) for node in nodes if node != "node")]:
            values = await self.all_of(process)
            left |= {f"{process} {name}": values[name] for name in names if values.get(name)}
        return left
