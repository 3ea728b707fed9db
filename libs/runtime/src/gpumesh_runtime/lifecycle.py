"""The life of a process: uvloop, signals, ready, drain, loud death.

    async def main(life: Life) -> None:          # the composition root, top to bottom
        server = Server(...)
        await server.start()
        life.spawn(link.run(), "registry link")
        life.ready(port=server.port)
        await life.until_stopped()               # SIGTERM, SIGINT or life.stop()
        await server.stop(10)

    run(main, settings, "router")

Exit codes: 0 after a drain; 1 when a task died or the drain took too long; 69 when an address cannot be bound or a file not be
used; 78 for a wrong configuration; 128 + n on a second signal n.
"""

import asyncio
import ctypes
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NoReturn

import uvloop

from gpumesh_runtime import logs, tracing
from gpumesh_runtime.config import ConfigError, Settings, exit_config
from gpumesh_runtime.files import write_private
from gpumesh_runtime.health import Health
from gpumesh_runtime.monitor import Monitor, add_process_metrics, watch_loop_lag

EXIT_UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h
_DRAIN_SPARE_S: Final = 2.0  # what main may take beyond drain_s before the process ends anyway
# After the start the heap is frozen; what comes then is short-lived, and the default of 700 allocations costs 3-5 %
# of the CPU.
_GC_THRESHOLDS: Final = (20_000, 20, 50)


def _trim_heap() -> None:
    """Gives back what importing left free: 3 MB a process (measured). Only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class StartError(Exception):
    """The process cannot start, for a reason that the operator can mend. The text says what to do; there is no
    traceback.
    """


class TaskDiedError(Exception):
    """A task of the process raised; it was logged when it did."""


class Life:
    """What `main` is given. One per process."""

    def __init__(self, settings: Settings, service: str) -> None:
        self.settings = settings
        self.service = service
        self.health = Health()
        self._stop = asyncio.Event()
        self._died = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._log = logs.get_logger("gpumesh.life")

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> "asyncio.Task[Any]":
        """Runs something for as long as the process lives. If it raises, the process logs it and ends with 1 (loud
        death).
        """
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (err := task.exception()) is not None:
            self.die(err, task.get_name())

    def die(self, err: BaseException, name: str) -> None:
        """Ends the process because of an error that nobody handles. The first one counts."""
        self._log.error("task died", task=name, exc_info=err)
        if not self._died.done():
            self._died.set_exception(TaskDiedError(name))
            self._died.exception()  # read it now: run() may leave by another way, and asyncio would complain about an unread one

    def ready(self, **fields: Any) -> None:
        """The start is over: answers /ready, writes the ready file, freezes the heap. Extra fields go to the log and
        the file.
        """
        gc.collect()
        _trim_heap()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self.health.started = True
        if self.settings.ready_file is not None:
            write_private(
                self.settings.ready_file, json.dumps({"pid": os.getpid(), "service": self.service, **fields}).encode()
            )
        self._log.info("ready", pid=os.getpid(), **fields)

    def stop(self, reason: str = "asked") -> None:
        """Begins the drain, as SIGTERM does."""
        if not self._stop.is_set():
            self.health.draining = True
            self._log.info("draining", reason=reason)
            self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether the drain has begun."""
        return self._stop.is_set()

    async def until_stopped(self) -> None:
        """Returns when the drain begins."""
        await self._stop.wait()

    def on_signal(self, number: int) -> None:
        """First signal: drain. Second: end at once."""
        if self._stop.is_set():
            self._log.warning("second signal: leaving at once", signal=number)
            self.remove_ready_file()
            os._exit(128 + number)
        self.stop(signal.Signals(number).name)

    def remove_ready_file(self) -> None:
        """So that a launcher does not take an old file for a running process."""
        if self.settings.ready_file is not None:
            Path(self.settings.ready_file).unlink(missing_ok=True)

    async def supervise(self, main: Callable[["Life"], Awaitable[None]]) -> None:
        """Runs main to its end. Raises what it raises, what a spawned task raised, or TimeoutError when the drain
        takes too long.
        """
        work = asyncio.ensure_future(main(self))
        limit = asyncio.ensure_future(self._drain_limit())
        try:
            await asyncio.wait({work, self._died, limit}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            if self._died.done():
                await self._died
            if not work.done():
                raise TimeoutError(f"the drain took longer than {self.settings.drain_s:g} s")
        finally:
            await _cancel([work, limit, *self._tasks])

    async def _drain_limit(self) -> None:
        await self._stop.wait()
        await asyncio.sleep(self.settings.drain_s + _DRAIN_SPARE_S)


async def _cancel(tasks: "list[asyncio.Future[Any]]") -> None:
    """Cancels and waits, 2 s at most: whoever ignores a cancellation does not keep the process alive."""
    pending = [task for task in tasks if not task.done()]
    for task in pending:
        task.cancel()
    if pending:
        done, _ = await asyncio.wait(pending, timeout=2.0)
        for task in done:
            if not task.cancelled():
                task.exception()  # read, so that asyncio does not report it again


def _on_loop_error(life: Life, context: dict[str, Any]) -> None:
    """What nobody awaited. A task of ours that died unseen is a loud death; grpc.aio's own noise is a line in the
    log.
    """
    err = context.get("exception")
    task = context.get("task") or context.get("future")
    code = getattr(task.get_coro(), "cr_code", None) if isinstance(task, asyncio.Task) else None
    ours = code is not None and "gpumesh_" in code.co_filename
    if err is not None and ours:
        life.die(err, task.get_name() if isinstance(task, asyncio.Task) else "task")
        return
    if isinstance(err, BlockingIOError):
        return  # grpc.aio's poller reads its wake-up socket empty now and then; harmless and frequent
    log = logs.get_logger("gpumesh.loop")
    log.error("error outside any task of ours", cause=str(context.get("message", ""))[:200], exc_info=err)


async def _run(main: Callable[[Life], Awaitable[None]], settings: Settings, service: str) -> None:
    loop = asyncio.get_running_loop()
    life = Life(settings, service)
    loop.set_exception_handler(lambda _loop, context: _on_loop_error(life, context))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, life.on_signal, number)
    monitor = Monitor(settings.metrics_address, life.health) if settings.metrics_address else None
    add_process_metrics()
    try:
        if monitor is not None:
            try:
                await monitor.start()
            except OSError as err:
                raise StartError(f"cannot listen on {settings.metrics_address} for metrics: {err.strerror}") from err
        life.spawn(watch_loop_lag(), "loop lag")
        await life.supervise(main)
    finally:
        life.remove_ready_file()
        if monitor is not None:
            await monitor.stop()


def run(main: Callable[[Life], Awaitable[None]], settings: Settings, service: str) -> NoReturn:
    """Runs a process from start to exit code. Never returns."""
    logs.setup(settings, service)
    tracing.setup(settings, service)
    log = logs.get_logger("gpumesh.life")
    if not settings.development:
        # A core dump would hold prompts.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(main, settings, service))
    except ConfigError as err:
        exit_config(err)
    except Exception as err:
        code = _exit_code(err, service)
        if code == 1 and not isinstance(err, TaskDiedError):
            log.error("the process ends because of an error", exc_info=err, exit_code=code)
    tracing.shutdown()
    if code == 0:
        log.info("stopped", exit_code=0)
    sys.stderr.flush()
    sys.stdout.flush()
    # Not sys.exit: grpc.aio's poller thread can hang the interpreter's own shutdown.
    os._exit(code)


def _exit_code(err: Exception, service: str) -> int:
    """69 with one clear line for what an operator can mend, else 1."""
    # Imported here: a process that serves no RPC (a tool, the edge) does not load the server.
    from gpumesh_runtime.rpc.server import AddressInUseError  # noqa: PLC0415 -- see above

    if isinstance(err, StartError | AddressInUseError):
        sys.stderr.write(f"{service}: {err}\n")
        return EXIT_UNAVAILABLE
    return 1
