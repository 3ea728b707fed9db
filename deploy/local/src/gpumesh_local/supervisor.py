"""Runs processes: logs and pids in files, restarts with back-off, an orderly end. Its decisions are in policy.py."""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from gpumesh_local.errors import LocalError
from gpumesh_local.home import Home, disk_error
from gpumesh_local.plan import STOP_ORDER, Process
from gpumesh_local.policy import GIVE_UP_DEATHS, GIVE_UP_WITHIN_S, RestartPolicy
from gpumesh_local.report import Report

_LOOK_S: Final = 0.05
_TAIL_LINES: Final = 12
ROTATE_BYTES: Final = 64 * 1024 * 1024
_ROTATE_EVERY_S: Final = 10.0
_FULL_DISK: Final = ("No space left on device", "could not extend file", "ENOSPC")


class _Child:
    """One process and its restarts."""

    def __init__(self, spec: Process) -> None:
        self.spec = spec
        self.process: asyncio.subprocess.Process | None = None
        self.policy = RestartPolicy()
        self.was_ready = False
        self.monitor: asyncio.Task[None] | None = None


class Supervisor:
    """All children of the launcher. failed: set to a LocalError when one is beyond help; the mesh ends then."""

    def __init__(self, home: Home, report: Report) -> None:
        self.failed: asyncio.Future[LocalError] = asyncio.get_running_loop().create_future()
        self._home = home
        self._report = report
        self._children: dict[str, _Child] = {}
        self._stopping = False

    @property
    def stopping(self) -> bool:
        """Whether the end has begun."""
        return self._stopping

    async def start(self, spec: Process) -> None:
        """Starts a process and keeps it running. Raises LocalError when it cannot be started at all."""
        child = self._children[spec.name] = _Child(spec)
        await self._spawn(child)
        child.monitor = asyncio.get_running_loop().create_task(self._watch(child), name=f"watch {spec.name}")

    async def until_ready(self, name: str, within_s: float, ready: Callable[[], Awaitable[bool]] | None = None) -> None:
        """Waits until a process says that it is ready, or until `ready()` is true. Raises LocalError."""
        child = self._children[name]
        deadline = time.monotonic() + within_s
        while True:
            if self.failed.done():
                raise self.failed.result()
            if await ready() if ready else self._home.ready(name).exists():
                child.was_ready = True
                return
            if time.monotonic() >= deadline:
                raise LocalError(f"{name} was not ready within {within_s:g} s.\n{self._tail(name)}")
            await asyncio.sleep(_LOOK_S)

    async def stop(self, hurry: asyncio.Event) -> None:
        """SIGTERM in order, each given its time, then SIGKILL. hurry: set it to kill at once."""
        self._stopping = True
        for kind in STOP_ORDER:
            children = [child for child in self._children.values() if child.spec.kind == kind]
            await asyncio.gather(*(self._stop_one(child, hurry) for child in children))

    # --- one child --------------------------------------------------------------------------------------------------

    async def _spawn(self, child: _Child) -> None:
        spec = child.spec
        self._home.ready(spec.name).unlink(missing_ok=True)
        try:
            with self._home.log(spec.name).open("ab") as log:
                child.process = await asyncio.create_subprocess_exec(
                    *spec.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=dict(spec.environment),
                    cwd="/",
                    # A group of its own: Ctrl-C reaches the launcher alone, which then stops everything in order.
                    start_new_session=True,
                    **spec.popen,
                )
            self._home.pid(spec.name).write_text(f"{child.process.pid}\n")
        except OSError as err:
            raise disk_error(err, Path(err.filename or self._home.log(spec.name))) from err

    async def _watch(self, child: _Child) -> None:
        name = child.spec.name
        while child.process is not None:
            code = await child.process.wait()
            self._home.pid(name).unlink(missing_ok=True)
            if self._stopping:
                return
            if not child.was_ready:
                self._fail(f"{name} could not start ({_how(code)}).\n{self._tail(name)}")
                return
            delay = child.policy.died(time.monotonic())
            if delay is None:
                self._fail(
                    f"{name} died {GIVE_UP_DEATHS} times within {GIVE_UP_WITHIN_S:g} s (last: {_how(code)}).\n{self._tail(name)}"
                )
                return
            self._report.note(f"{name} ended unexpectedly ({_how(code)}); starting it again in {delay:g} s")
            await asyncio.sleep(delay)
            if self._stopping:
                return
            try:
                await self._spawn(child)
            except LocalError as err:
                self._fail(str(err))
                return

    async def _stop_one(self, child: _Child, hurry: asyncio.Event) -> None:
        process = child.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT if child.spec.interrupt else signal.SIGTERM)
        ended = asyncio.ensure_future(process.wait())
        hurried = asyncio.ensure_future(hurry.wait())
        await asyncio.wait({ended, hurried}, timeout=child.spec.grace_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not ended.done():
            if not hurry.is_set():
                self._report.note(f"{child.spec.name} did not end within {child.spec.grace_s:g} s and was killed")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await ended
        self._home.pid(child.spec.name).unlink(missing_ok=True)
        if child.monitor is not None:
            child.monitor.cancel()
            await asyncio.wait([child.monitor])

    # --- messages ---------------------------------------------------------------------------------------------------

    def _fail(self, text: str) -> None:
        if not self.failed.done():
            self.failed.set_result(LocalError(text))

    def _tail(self, name: str) -> str:
        """The last lines of a log, and what they mean when that is plain."""
        path = self._home.log(name)
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 8192))
                lines = file.read().decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        hint = ""
        if any(sign in line for line in lines for sign in _FULL_DISK):
            hint = f"The disk of {self._home.path} is full: free some space, or set GPUMESH_HOME to a folder on another disk.\n"
        return f"{hint}Last lines of {path}:\n" + "\n".join(f"  {line}" for line in lines or ["(nothing)"])

    async def keep_logs_small(self) -> None:
        """For as long as the mesh runs: puts aside logs that grew large, one generation of each."""
        while True:
            for name in self._children:
                with contextlib.suppress(OSError):  # a full disk must not end the mesh; the next look tries again
                    await asyncio.to_thread(self._rotate, name)
            await asyncio.sleep(_ROTATE_EVERY_S)

    def _rotate(self, name: str) -> None:
        """Copied and emptied, not renamed: the process has it open and goes on writing at its end."""
        path = self._home.log(name)
        if path.exists() and path.stat().st_size > ROTATE_BYTES:
            shutil.copyfile(path, path.with_suffix(".log.1"))
            os.truncate(path, 0)


def _how(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"
