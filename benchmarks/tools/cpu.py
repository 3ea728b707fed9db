"""CPU time and memory of processes, from /proc (Linux)."""

from pathlib import Path


def cpu_seconds(pid: int) -> float:
    """Time that all threads of a process have spent on a CPU so far, seconds. Raises OSError when it is gone."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total_ns += int((task / "schedstat").read_text().split()[0])
        except FileNotFoundError:  # the thread ended between the listing and the read
            continue
    return total_ns / 1e9


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except FileNotFoundError:
            continue
        for child in children:
            pids += family(int(child))
    return pids


def rss_mb(pid: int) -> float:
    """Resident memory, MB (10^6 bytes)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProcessLookupError(pid)
