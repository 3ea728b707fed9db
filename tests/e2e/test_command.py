"""The gpumesh command against a whole mesh: from a new account to a revoked key, a model and node of one's own, a conversation."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.mesh import Mesh

GPUMESH = Path(sys.executable).parent / "gpumesh"


def run(mesh: Mesh, *arguments: str) -> Any:
    """The JSON that a command prints. Fails the test when it does not end well."""
    done = mesh.cli(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def client_file(mesh: Mesh, folder: Path, api_key: str) -> str:
    path = folder / "client.json"
    path.write_text(json.dumps({**mesh.client, "api_key": api_key}))
    return str(path)


def eventually(attempt: Callable[[], bool], within_s: float) -> float:
    """Seconds until the attempt succeeded. Fails the test when it never does."""
    began = time.monotonic()
    while not attempt():
        assert time.monotonic() - began < within_s
        time.sleep(0.05)
    return time.monotonic() - began


def test_a_new_account_buys_until_its_key_is_revoked(mock_mesh: Mesh, tmp_path: Path) -> None:
    account = run(mock_mesh, "account", "create", "Ann")["account_id"]
    key = run(mock_mesh, "key", "create", account, "--name", "laptop")
    file = client_file(mock_mesh, tmp_path, key["api_key"])
    broke = mock_mesh.cli("chat", "--client", file, "Hello")
    assert (broke.returncode, "INSUFFICIENT_BALANCE" in broke.stderr) == (4, True)

    for _ in range(2):  # the same id credits once
        credit = run(mock_mesh, "credit", account, "0.50", "--id", f"test-{account}")
    assert credit["available_nano_usd"] == 500_000_000
    eventually(lambda: mock_mesh.cli("chat", "--client", file, "Hello").returncode == 0, 5)

    assert [row["key_id"] for row in run(mock_mesh, "key", "list", account)] == [key["key_id"]]
    run(mock_mesh, "key", "revoke", key["api_key"])

    def refused() -> bool:
        done = mock_mesh.cli("chat", "--client", file, "Hello")
        return done.returncode == 4 and "REVOKED_API_KEY" in done.stderr

    assert eventually(refused, 5) < 5


@pytest.fixture
def own_node(mock_mesh: Mesh, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`gpumesh node run` of a provider of its own, with a model of its own."""
    arguments = ["--context", "4096", "--input-price", "1", "--output-price", "2", "--alias", "mine"]
    run(mock_mesh, "model", "add", "own-model", *arguments)
    provider = run(mock_mesh, "provider", "create", "Pat", "--id", "prov_pat")["provider_id"]
    token = run(mock_mesh, "node", "token", provider)["enrolment_token"]
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen(
            [GPUMESH, "node", "run", "--engine", "mock", "--model", "own-model", "--state", tmp_path / "node"],
            env={**mock_mesh.env, "GPUMESH_ENROLMENT_TOKEN": token},
            stdout=log,
            stderr=log,
        )
    try:
        yield node
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(30)
        run(mock_mesh, "model", "remove", "own-model")


def test_a_provider_runs_a_node_with_a_model_of_its_own(
    mock_mesh: Mesh, own_node: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    def connected() -> bool:
        assert own_node.poll() is None, (tmp_path / "node.log").read_text()
        return bool(run(mock_mesh, "node", "status", "--provider", "prov_pat"))

    eventually(connected, 20)
    eventually(lambda: mock_mesh.cli("chat", "-m", "mine", "Hello").returncode == 0, 10)
    (row,) = run(mock_mesh, "node", "status", "--provider", "prov_pat")
    assert row["state"] == "ready"
    eventually(lambda: bool(run(mock_mesh, "balance", "prov_pat")), 10)
    assert "own-model" in {model["model"] for model in run(mock_mesh, "models")}


def test_chat_holds_a_conversation_in_a_terminal(mock_mesh: Mesh) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(GPUMESH, [str(GPUMESH), "chat"], {**mock_mesh.env, "TERM": "dumb"})
    said = ""

    def until_said(text: str, times: int) -> None:
        nonlocal said
        while said.count(text) < times:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # the terminal closed
                piece = b""
            assert piece, said
            said += piece.decode(errors="replace")

    until_said("> ", 1)
    for turn in (1, 2):
        os.write(terminal, b"Hello!\n")
        until_said(" tokens, $", turn)
        until_said("> ", turn + 1)
    os.write(terminal, b"\x04")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, said
    # The second turn carries the first: more prompt tokens.
    first, second = (int(line.split(" + ")[0].split()[-1]) for line in said.splitlines() if " tokens, $" in line)
    assert second > first


def test_logs_and_status_of_the_whole_mesh(mock_mesh: Mesh) -> None:
    nodes = run(mock_mesh, "node", "status")
    assert {node["provider_id"] for node in nodes} >= {"prov_local"}
    lines = [json.loads(line) for line in mock_mesh.cli("logs", "-n", "1", "--json").stdout.splitlines()]
    assert {line["process"] for line in lines} >= {"router", "scheduler", "edge-http", "node", "node-2", "postgres"}
