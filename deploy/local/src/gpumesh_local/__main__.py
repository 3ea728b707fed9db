"""`gpumesh-local up` and `gpumesh-local down`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from gpumesh_local.errors import EXIT_FAILED, LocalError
from gpumesh_local.home import Home, Lock
from gpumesh_local.options import Options, parse
from gpumesh_local.orphans import end_orphans, is_ours
from gpumesh_local.report import Json, Pipe, Report, Terminal
from gpumesh_local.texts import how_to_use
from gpumesh_local.up import up

_DOWN_S: Final = 240.0
_LOOK_S: Final = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    terminal = Terminal()
    given = sys.argv[1:] if arguments is None else list(arguments)
    report: Report = terminal
    try:
        command, options = parse(given, os.environ)
        if options.status_fd >= 0:
            report = Pipe(options.status_fd)
        elif options.json:
            report = Json()
        if command == "down":
            sys.exit(down(options, report))
        sys.exit(_up_detached(given, options, report) if options.detach else _up(options, report))
    except LocalError as err:
        report.failed(str(err), err.exit_code)
        sys.exit(err.exit_code)


def _up(options: Options, report: Report) -> int:
    home = Home(options.home)
    home.create()
    lock = Lock(home)
    if not lock.acquire():
        return _already_running(home, report)
    asyncio.run(up(options, report, lock))
    return 0


def _already_running(home: Home, report: Report) -> int:
    report.note(f"gpumesh runs already (pid {home.read_pid('launcher')}, {home.path}); `make down` ends it")
    client = home.read_json(home.client_file)
    if client:
        report.ready(how_to_use(client, home, detached=True), client)
    return 0


def _up_detached(arguments: Sequence[str], options: Options, report: Report) -> int:
    """Starts ourselves in a session of our own and waits for what it says: ready, or why not."""
    home = Home(options.home)
    home.create()
    if Lock(home).held():
        return _already_running(home, report)
    reader, writer = os.pipe()
    command = [
        sys.executable,
        "-m",
        "gpumesh_local",
        *(a for a in arguments if a != "--detach"),
        "--status-fd",
        str(writer),
    ]
    with home.log("launcher").open("ab") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[writer]
        )
    os.close(writer)
    with os.fdopen(reader) as lines:
        try:
            for line in lines:
                code = _relay(json.loads(line), report)
                if code is not None:
                    return code
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            child.wait()
            raise LocalError("stopped before it was ready") from None
    child.wait()
    raise LocalError(f"the launcher ended without a word (exit code {child.returncode}), see {home.log('launcher')}")


def _relay(message: dict[str, Any], report: Report) -> int | None:
    """Prints a message of the detached launcher. An exit code when it is the last one."""
    what, text = message["what"], message["text"]
    if what == "step":
        report.step(text)
    elif what == "note":
        report.note(text)
    elif what == "ready":
        report.ready(text, message["client"])
        return 0
    else:
        report.failed(text, EXIT_FAILED)
        return int(message.get("exit_code", EXIT_FAILED))
    return None


def down(options: Options, report: Report) -> int:
    """Tells the launcher to end, waits for it, and ends what a killed launcher left. Nothing to do is not an error."""
    home = Home(options.home)
    if not home.path.is_dir():
        report.note(f"nothing runs: {home.path} does not exist")
        return 0
    lock = Lock(home)
    pid = home.read_pid("launcher")
    if lock.held() and pid:
        report.note(f"stopping gpumesh (pid {pid}); requests that run may finish")
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _DOWN_S
        # The lock goes first, the process a moment later.
        while lock.held() or is_ours(home, pid):
            if time.monotonic() >= deadline:
                raise LocalError(f"gpumesh (pid {pid}) did not end within {_DOWN_S:g} s, see {home.logs}")
            time.sleep(_LOOK_S)
        report.step("stopped")
        return 0
    ended = end_orphans(home)
    report.step(f"ended what an earlier launcher left: {', '.join(ended)}") if ended else report.note("nothing runs")
    return 0


if __name__ == "__main__":
    main()
