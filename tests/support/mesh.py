"""A whole mesh for a test: `gpumesh-local up --detach` in a folder and on ports of its own.

Its processes are killed by pid, its money is read from PostgreSQL.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import asyncpg

from gpumesh_client.operator import Operator
from gpumesh_runtime.error_types import MeshError
from gpumesh_runtime.tls import TlsIdentity
from tests.support.ports import free_port_block

_BIN: Final = Path(sys.executable).parent
_PORTS: Final = 48
_START_S: Final = 120


class Mesh:
    """One running mesh. Not thread-safe; make it with `start`, end it with `stop`."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.port = port
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("GPUMESH_")}
        self.env |= {"GPUMESH_HOME": str(home), "GPUMESH_HTTP_PORT": str(port)}
        self.cwd: Path | None = None  # of the launcher and so of every process
        self.client: dict[str, str] = {}
        self.operator: dict[str, Any] = {}

    @classmethod
    def start(cls, *args: str, env: dict[str, str] | None = None) -> "Mesh":
        """Starts a mesh with further arguments of `gpumesh-local up`; ready when this returns. Raises AssertionError with its output."""
        mesh = cls(Path(tempfile.mkdtemp(prefix="gpumesh-test-")), free_port_block(_PORTS))
        mesh.env |= env or {}
        mesh.up(*args)
        return mesh

    def up(self, *args: str) -> None:
        """`gpumesh-local up --detach`."""
        done = self.local("up", "--detach", *args)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.tails()}"
        self.client = json.loads((self.home / "client.json").read_text())
        self.operator = json.loads((self.home / "operator.json").read_text())
        asyncio.run(self._probe_settled())

    async def _probe_settled(self) -> None:
        """The launcher's own first request is settled in the background; tests count from after it."""
        async with asyncio.timeout(20):
            while not await self.settlements():
                await asyncio.sleep(0.02)

    def local(self, *args: str) -> "subprocess.CompletedProcess[str]":
        """Runs the launcher and returns when it does."""
        return subprocess.run(
            [_BIN / "gpumesh-local", *args],
            env=self.env,
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )

    def cli(self, *args: str) -> "subprocess.CompletedProcess[str]":
        """Runs the gpumesh command."""
        return subprocess.run(
            [_BIN / "gpumesh", *args], env=self.env, capture_output=True, text=True, timeout=60, check=False
        )

    def stop(self) -> None:
        """Ends everything and removes the folder."""
        try:
            self.local("down")
        finally:
            shutil.rmtree(self.home, ignore_errors=True)

    def tails(self) -> str:
        """The last lines of every log, for a failing test."""
        logs = sorted((self.home / "logs").glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs)

    # --- processes --------------------------------------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """Of a process that should run now."""
        return int((self.home / "pids" / f"{name}.pid").read_text())

    def signal(self, name: str, number: signal.Signals) -> int:
        """Signals a process; returns its pid."""
        pid = self.pid(name)
        os.kill(pid, number)
        return pid

    def kill(self, name: str) -> int:
        """kill -9; returns the pid that was killed."""
        return self.signal(name, signal.SIGKILL)

    async def restarted(self, name: str, old_pid: int, timeout_s: float = 20.0) -> int:
        """Waits until the supervisor has started the process anew; returns the new pid."""
        path = self.home / "pids" / f"{name}.pid"

        def new_pid() -> int:
            try:
                text = path.read_text()
            except FileNotFoundError:  # the supervisor is between the old one and the new
                return 0
            return int(text) if text.strip().isdigit() and int(text) != old_pid else 0

        await until(lambda: new_pid() != 0, timeout_s)
        return new_pid()

    def node_name(self, node_id: str) -> str:
        """The process that runs a node."""
        for folder in (self.home / "nodes").iterdir():
            identity = TlsIdentity(folder / "node.crt", folder / "node.key", folder / "ca.crt").identity
            if identity.node_id == node_id:
                return folder.name
        raise LookupError(node_id)

    # --- HTTP -------------------------------------------------------------------------------------------------------------

    def headers(self, key: str = "") -> dict[str, str]:
        """Authorization."""
        return {"Authorization": f"Bearer {key or self.client['api_key']}"}

    def body(self, text: str = "Hello! What is gpumesh?", **fields: Any) -> dict[str, Any]:
        """A chat request."""
        return {"model": self.client["model"], "messages": [{"role": "user", "content": text}], **fields}

    async def chat(
        self, http: aiohttp.ClientSession, text: str = "Hello! What is gpumesh?", *, key: str = "", **fields: Any
    ) -> tuple[int, dict[str, Any]]:
        """One request without streaming: status and body."""
        url = f"{self.client['base_url']}/chat/completions"
        async with http.post(url, json=self.body(text, **fields), headers=self.headers(key)) as answer:
            return answer.status, await answer.json()

    async def stream(
        self, http: aiohttp.ClientSession, text: str, **fields: Any
    ) -> AsyncIterator[dict[str, Any] | str]:
        """One streamed request: chunks as they come, "[DONE]" at the end. An error status raises AssertionError."""
        url = f"{self.client['base_url']}/chat/completions"
        async with http.post(url, json=self.body(text, stream=True, **fields), headers=self.headers()) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: "):
                    data = line[6:].strip().decode()
                    yield data if data == "[DONE]" else json.loads(data)

    # --- money ------------------------------------------------------------------------------------------------------------

    async def sql(self, query: str, *args: Any) -> list[dict[str, Any]]:
        """Rows of a query on the mesh's database."""
        connection = await asyncpg.connect(self.operator["database_url"])
        try:
            return [dict(row) for row in await connection.fetch(query, *args)]
        finally:
            await connection.close()

    async def settlements(self) -> list[dict[str, Any]]:
        """All settled jobs, oldest first."""
        return await self.sql("SELECT * FROM metering.settlements ORDER BY settlement_no")

    async def settled_after(self, count: int, more: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Waits until `more` jobs beyond the first `count` are settled; returns those. Fails when there are more."""
        deadline = time.monotonic() + timeout_s
        while len(rows := await self.settlements()) < count + more:
            assert time.monotonic() < deadline, (
                f"{len(rows) - count} of {more} settled in {timeout_s} s\n{self.tails()}"
            )
            await asyncio.sleep(0.05)
        assert len(rows) == count + more
        return rows[count:]

    def check_ledger(self) -> None:
        """The invariants hold."""
        done = subprocess.run(
            [_BIN / "gpumesh-metering", "check"],
            env={
                **self.env,
                "GPUMESH_METERING_DATABASE_URL": self.operator["database_url"],
                "GPUMESH_METERING_KEY_RING": str(next((self.home / "secrets").glob("tickets.json"))),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def text_of(chunks: list[dict[str, Any] | str]) -> str:
    """The text that a stream carried."""
    parts = [
        choice["delta"].get("content") or ""
        for chunk in chunks
        if isinstance(chunk, dict)
        for choice in chunk.get("choices", ())
    ]
    return "".join(parts)


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Waits for a condition. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


class Nodes:
    """What the scheduler says of its nodes, over the operator's RPCs."""

    def __init__(self, mesh: Mesh) -> None:
        self._operator = Operator.from_file(mesh.home / "operator.json", timeout_s=5.0)

    def close(self) -> None:
        """Ends the connection."""
        self._operator.close()

    async def ready(self, count: int, timeout_s: float = 30.0) -> None:
        """Waits until so many nodes are ready. A scheduler that is away counts as none."""
        async with asyncio.timeout(timeout_s):
            while len(await self.states("ready")) < count:
                await asyncio.sleep(0.05)

    async def states(self, state: str) -> list[str]:
        """Ids of the nodes in a state."""
        return [node.node_id for node in await self._list() if node.state == state]

    async def running(self) -> dict[str, int]:
        """Jobs by node id."""
        return {node.node_id: node.running_jobs for node in await self._list()}

    async def busy(self, jobs: int = 1, timeout_s: float = 10.0) -> str:
        """Waits until so many jobs run; returns the node with the most."""
        async with asyncio.timeout(timeout_s):
            while sum((running := await self.running()).values()) < jobs:
                await asyncio.sleep(0.01)
        return max(running, key=lambda node: running[node])

    async def idle(self, timeout_s: float = 10.0) -> None:
        """Waits until no job runs."""
        async with asyncio.timeout(timeout_s):
            while any((await self.running()).values()):
                await asyncio.sleep(0.01)

    async def _list(self) -> list[Any]:
        try:
            return list(await asyncio.to_thread(self._operator.list_nodes))
        except MeshError:
            return []
