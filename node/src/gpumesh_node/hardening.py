"""No core dumps: they would hold prompts; no secrets for children. Children that exec call forbid_core_dumps again for themselves."""

import ctypes
import os
import resource
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def forbid_core_dumps() -> None:
    """RLIMIT_CORE 0 (inherited by children) and, on Linux, PR_SET_DUMPABLE 0, which also keeps others from reading our memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when its parent dies. parent: the pid that it should have; another means that it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def environment_for_children() -> dict[str, str]:
    """The node's environment without its settings, which hold secrets (an enrolment token, an engine's key)."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GPUMESH_")}
