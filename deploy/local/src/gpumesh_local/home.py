"""The state folder: what lies where, the lock that says the mesh runs, and disk space."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from gpumesh_local.errors import LocalError
from gpumesh_runtime.files import write_private

# A new PostgreSQL cluster takes 40 MB, its write-ahead log up to 256 MB more; below this it would stop in the middle.
MIN_FREE_BYTES: Final = 512 * 1024 * 1024
_LONGEST_SOCKET_PATH: Final = 100  # the kernel allows 107 on Linux, 103 on macOS


@dataclass(frozen=True)
class Home:
    """GPUMESH_HOME. Secrets are in files that only the owner reads; the folder itself can be passed through, because
    PostgreSQL may run as another user when we are root.
    """

    path: Path

    @property
    def postgres(self) -> Path:
        """Data of PostgreSQL."""
        return self.path / "pg"

    @property
    def logs(self) -> Path:
        """<name>.log of each process."""
        return self.path / "logs"

    @property
    def pids(self) -> Path:
        """<name>.pid of each process that runs."""
        return self.path / "pids"

    @property
    def tls(self) -> Path:
        """The CA, and a certificate per process."""
        return self.path / "tls"

    @property
    def secrets(self) -> Path:
        """The ticket key ring and PostgreSQL's password."""
        return self.path / "secrets"

    @property
    def run(self) -> Path:
        """Files by which processes say that they are ready."""
        return self.path / "run"

    @property
    def client_file(self) -> Path:
        """client.json: what a buyer's program needs."""
        return self.path / "client.json"

    @property
    def operator_file(self) -> Path:
        """operator.json: what the gpumesh command needs for operator calls."""
        return self.path / "operator.json"

    @property
    def state_file(self) -> Path:
        """What earlier starts did, so that it is not done again."""
        return self.path / "state.json"

    def node(self, name: str) -> Path:
        """Key, certificate and journal of a node."""
        return self.path / "nodes" / name

    def log(self, name: str) -> Path:
        """A process's log."""
        return self.logs / f"{name}.log"

    def pid(self, name: str) -> Path:
        """A process's pid file."""
        return self.pids / f"{name}.pid"

    def ready(self, name: str) -> Path:
        """A process's ready file."""
        return self.run / f"{name}.ready"

    def socket_folder(self) -> Path:
        """Where PostgreSQL's socket is: in the home, or in the temporary folder when that path would be too long."""
        inside = self.path / "socket"
        if len(str(inside)) + len("/.s.PGSQL.65535") <= _LONGEST_SOCKET_PATH:
            return inside
        digest = sha256(str(self.path).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"gpumesh-{os.getuid()}-{digest}"

    def create(self) -> None:
        """Makes the folders. Raises LocalError when the disk is full or the place is not writable."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o755)
            for folder in (self.logs, self.tls, self.secrets, self.path / "nodes"):
                folder.mkdir(mode=0o700, exist_ok=True)
            for folder in (self.pids, self.run):
                folder.mkdir(mode=0o755, exist_ok=True)
        except OSError as err:
            raise disk_error(err, self.path) from err

    def check_space(self) -> None:
        """Raises LocalError when too little disk is free."""
        free = shutil.disk_usage(self.path).free
        if free < MIN_FREE_BYTES:
            raise LocalError(
                f"The disk of {self.path} is full: {free // 2**20} MB free, at least {MIN_FREE_BYTES // 2**20} MB are "
                "needed. Free some space, or set GPUMESH_HOME to a folder on another disk."
            )

    def write_json(self, path: Path, content: Mapping[str, Any]) -> None:
        """Writes a file that only the owner reads, whole or not at all."""
        write_private(path, (json.dumps(content, indent=2) + "\n").encode())

    @staticmethod
    def read_json(path: Path) -> dict[str, Any]:
        """The file's content; empty when it does not exist or is damaged (it is made anew then)."""
        try:
            content = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return content if isinstance(content, dict) else {}

    def read_pid(self, name: str) -> int:
        """The pid that a file names; 0 when there is none."""
        try:
            return int(self.pid(name).read_text())
        except (FileNotFoundError, ValueError):
            return 0


class Lock:
    """Held by the launcher for as long as it runs. The kernel drops it when the process dies, however it dies."""

    def __init__(self, home: Home) -> None:
        self._path = home.path / "launcher.lock"
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """Whether it was free. Raises LocalError when the file cannot be made."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as err:
            raise disk_error(err, self._path) from err
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Lets the next one in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def held(self) -> bool:
        """Whether a launcher runs. Must not be asked by the holder itself."""
        if not self._path.exists() or not self.acquire():
            return self._path.exists()
        self.release()
        return False


def disk_error(err: OSError, path: Path) -> LocalError:
    """An error of the file system as a message that says what to do."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return LocalError(
            f"The disk of {path} is full ({err.strerror}). Free some space, or set GPUMESH_HOME to a folder on another disk."
        )
    return LocalError(
        f"Cannot write {err.filename or path}: {err.strerror}. Set GPUMESH_HOME to a folder that you can write."
    )
