"""Processes that outlived their launcher (it was killed with SIGKILL): found by their pid files, ended in order."""

import os
import signal
import time
from pathlib import Path
from typing import Final

from gpumesh_local.home import Home
from gpumesh_local.plan import STOP_ORDER
from gpumesh_local.postgres import command_of

_GRACE_S: Final = 15.0
_LOOK_S: Final = 0.05


def is_ours(home: Home, pid: int) -> bool:
    """Whether a pid is still a process of this home, not an unrelated one that got the number since."""
    mark = str(home.path)
    if mark in command_of(pid):
        return True
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        # No /proc (macOS): the program's name must do.
        return not Path("/proc/self").exists() and "gpumesh_" in command_of(pid)


def end_orphans(home: Home) -> list[str]:
    """Ends what an earlier launcher left, and removes its pid files. Gives the names of those that still ran."""
    found = {path.stem: home.read_pid(path.stem) for path in home.pids.glob("*.pid")} if home.pids.is_dir() else {}
    found.pop("launcher", None)
    ended = []
    for kind in STOP_ORDER:
        pids = {name: pid for name, pid in found.items() if name == kind or name.startswith(f"{kind}-")}
        running = {name: pid for name, pid in pids.items() if pid and is_ours(home, pid)}
        for pid in running.values():
            _signal(pid, signal.SIGINT if kind == "postgres" else signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while any(is_ours(home, pid) for pid in running.values()) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        for pid in running.values():
            if is_ours(home, pid):
                _signal(pid, signal.SIGKILL)
        for name in pids:
            home.pid(name).unlink(missing_ok=True)
        ended += sorted(running)
    return ended


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
