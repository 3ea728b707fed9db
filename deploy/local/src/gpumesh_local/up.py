"""From nothing to a mesh that answers, and back to nothing."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import asyncpg

from gpumesh_local import certificates, postgres, probe
from gpumesh_local.bootstrap import Bootstrap, is_transient
from gpumesh_local.errors import LocalError
from gpumesh_local.home import Home, Lock, disk_error
from gpumesh_local.model import Shipped
from gpumesh_local.options import Options
from gpumesh_local.orphans import end_orphans
from gpumesh_local.plan import HOST, Plan, Process
from gpumesh_local.postgres import Postgres
from gpumesh_local.report import Report
from gpumesh_local.supervisor import Supervisor
from gpumesh_local.texts import how_to_use
from gpumesh_runtime.errors import MeshError

_POSTGRES_START_S: Final = 60.0
_SERVICE_START_S: Final = 60.0
_ANSWER_S: Final = 60.0
_BOOTSTRAP_TRIES: Final = 50
_HURRY_AFTER_S: Final = 1.0  # make passes Ctrl-C on as well: a second one counts only after this
Result = TypeVar("Result")


def check_ports(ports: dict[int, str]) -> None:
    """Raises LocalError for the first port that somebody else listens on."""
    for port, purpose in ports.items():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            # As servers do: a port whose old connections only linger is free.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
            except OSError as err:
                raise LocalError(
                    f"Port {port} (for the {purpose}) is taken by another program ({err.strerror}). "
                    "Set GPUMESH_HTTP_PORT to a free one; the other ports follow from it."
                ) from err


class Mesh:
    """One mesh on this machine, from `up` to its end."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options = options
        self.home = Home(options.home)
        self.report = report
        self.supervisor = Supervisor(self.home, report)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._stopped_at = 0.0
        # For threads, which cannot be cancelled: the process would wait for them at its end.
        self._give_up = threading.Event()

    async def run(self, lock: Lock) -> None:
        """Until a signal. Raises LocalError when it cannot start or a process is beyond help; everything is stopped then."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        self.home.pid("launcher").write_text(f"{os.getpid()}\n")
        logs = loop.create_task(self.supervisor.keep_logs_small(), name="logs")
        try:
            await self._until_stopped(self._bring_up)
            if not self._stop.is_set():
                await self._until_stopped(self._stop.wait)
        finally:
            self._give_up.set()
            logs.cancel()
            if not self.supervisor.failed.done():
                self.report.step("stopping: requests that run may finish")
            await self.supervisor.stop(self._hurry)
            self.home.pid("launcher").unlink(missing_ok=True)
            lock.release()
        self.report.step("stopped; the data stays in " + str(self.home.path))

    def _on_signal(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._stop.is_set():
            self._stopped_at = now
            self._stop.set()
        elif now - self._stopped_at > _HURRY_AFTER_S:
            self._hurry.set()

    async def _until_stopped(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Runs work to its end, or to a signal, or to a failure of a process, whichever comes first."""
        task = asyncio.get_running_loop().create_task(work())
        stop = asyncio.get_running_loop().create_task(self._stop.wait())
        try:
            waits: list[asyncio.Future[Any]] = [task, stop, self.supervisor.failed]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self.supervisor.failed.done():
                raise self.supervisor.failed.result()
            if task.done():
                await task
        finally:
            pair: list[asyncio.Task[Any]] = [task, stop]
            for left in pair:
                left.cancel()
            # A thread of the bootstrap may still run; the operator calls in it have deadlines.
            await asyncio.wait(pair)

    # --- the way up -------------------------------------------------------------------------------------------------

    async def _bring_up(self) -> None:
        self.home.check_space()
        for name in await asyncio.to_thread(end_orphans, self.home):
            self.report.note(f"{name} of an earlier start was still running and was ended")
        shipped = Shipped()
        database = Postgres(self.home, self.options.port(7), postgres.find(self.options.environment))
        check_ports(Plan(self.options, self.home, shipped, "").ports())
        await self._start_database(database)
        await asyncio.to_thread(_checked, lambda: certificates.make(self.home, self.options.schedulers), self.home)
        plan = Plan(self.options, self.home, shipped, database.url())
        self.report.step("certificates")
        services = plan.services()
        for service in services:
            await self.supervisor.start(service)
        for kind in ("registry", "metering"):
            await self.supervisor.until_ready(kind, _SERVICE_START_S)
        self.report.step("registry, metering")
        bootstrap = Bootstrap(self.home, self.options, plan, shipped)
        tokens = await self._bootstrap(bootstrap)
        self.report.step("account, key, credit, model and price")
        nodes = [plan.node(number, token) for number, token in enumerate(tokens)]
        for node in nodes:
            await self.supervisor.start(node)
        for process in [*services, *nodes]:
            await self.supervisor.until_ready(process.name, _SERVICE_START_S)
        self.report.step(
            ", ".join(process.name for process in [*services, *nodes] if process.kind not in ("registry", "metering"))
        )
        problem = await asyncio.to_thread(
            probe.until_answered, plan.base_url, bootstrap.api_key, self.options.model, _ANSWER_S, self._give_up
        )
        if problem:
            raise LocalError(
                f"The mesh runs but did not answer within {_ANSWER_S:g} s ({problem}). Logs: {self.home.logs}"
            )
        self.home.write_json(self.home.client_file, bootstrap.client_file())
        client = bootstrap.client_file()
        self.report.ready(how_to_use(client, self.home, detached=self.options.status_fd >= 0), client)

    async def _start_database(self, database: Postgres) -> None:
        for folder in database.opened_folders():
            self.report.note(
                f"PostgreSQL runs as {database.owner.pw_name if database.owner else '-'}: letting it pass through {folder}"
            )
        new = await asyncio.to_thread(database.prepare)
        if new:
            # What was remembered of another database would be wrong here.
            self.home.state_file.unlink(missing_ok=True)
            for folder in (self.home.path / "nodes").iterdir():
                certificates.forget_node(folder)
        process = Process(
            "postgres",
            "postgres",
            database.command(),
            database.environment(),
            interrupt=True,
            popen=database.user_arguments(),
        )
        await self.supervisor.start(process)

        async def answers() -> bool:
            try:
                await database.ping()
            except (OSError, asyncpg.PostgresError, TimeoutError):
                return False
            return True

        await self.supervisor.until_ready("postgres", _POSTGRES_START_S, answers)
        made = "new data" if new else "data of an earlier start"
        self.report.step(f"PostgreSQL {database.binaries.major} ({database.binaries.source}), {made}")

    async def _bootstrap(self, bootstrap: Bootstrap) -> list[str]:
        bootstrap.write_operator_file()
        for left in reversed(range(_BOOTSTRAP_TRIES)):
            try:
                return await asyncio.to_thread(_checked, bootstrap.run, self.home)
            except MeshError as err:
                if not left or not is_transient(err):
                    raise LocalError(
                        f"Setting up account, key and model failed: {err}. Logs: {self.home.logs}"
                    ) from err
            await asyncio.sleep(0.1)
        raise AssertionError("the last try returns or raises")


def _checked(work: Callable[[], Result], home: Home) -> Result:
    """Errors of the file system as LocalError."""
    try:
        return work()
    except OSError as err:
        raise disk_error(err, home.path) from err


async def up(options: Options, report: Report, lock: Lock) -> None:
    """Runs a mesh until it is told to stop. The lock is held and is released at the end. Raises LocalError."""
    with contextlib.suppress(FileNotFoundError):
        Home(options.home).client_file.unlink()  # it appears when the mesh answers
    await Mesh(options, report).run(lock)
