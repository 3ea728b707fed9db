"""Free ports on loopback."""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Locks of the blocks that this process has taken; kept to its end, so that test runs side by side take others.
_taken: list[int] = []


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_port_block(size: int) -> int:
    """The first of `size` ports in a row, none of which anything listens on; below the range from which the kernel takes client ports."""
    blocks = list(range(20_000, 31_000, size))
    random.shuffle(blocks)
    for first in blocks:
        if not _lock(first):
            continue
        try:
            for port in range(first, first + size):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            os.close(_taken.pop())
            continue
        return first
    raise RuntimeError("no free ports on loopback")


def _lock(first: int) -> bool:
    """Whether no other process, nor an earlier call, has chosen the block that begins here."""
    path = Path(tempfile.gettempdir()) / f"gpumesh-test-ports-{first}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return False
    _taken.append(handle)
    return True
