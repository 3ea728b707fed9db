"""The gpumesh command: what it prints and how it exits."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gpumesh_client.__main__ import app
from gpumesh_runtime.errors import InsufficientBalance, MeshError, Reason
from tests.support.front_door import FrontDoor, front_door, pieces

GPUMESH = Path(sys.executable).parent / "gpumesh"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[FrontDoor]:
    async with front_door(tmp_path) as served:
        served.client_file()
        yield served


async def gpumesh(folder: Path, *arguments: str, text: str = "") -> Result:
    """Runs the command in this process, with a home of its own."""
    environment = {"GPUMESH_HOME": str(folder)}
    return await asyncio.to_thread(lambda: CliRunner().invoke(app, list(arguments), input=text, env=environment))


async def test_chat_prints_the_answer_and_what_it_cost(door: FrontDoor) -> None:
    door.script = pieces("Hel", "lo [b]world[/b]")
    done = await gpumesh(door.folder, "chat", "Hi", "there")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "Hello [b]world[/b]\n7 + 2 tokens, $0.000001234\n"
    assert door.requests[0].chat.messages[0].content == "Hi there"


async def test_chat_reads_a_prompt_from_a_pipe(door: FrontDoor) -> None:
    door.script = pieces("ok")
    done = await gpumesh(door.folder, "chat", "--json", "--system", "Be brief.", text="From a pipe\n")
    assert json.loads(done.stdout)["text"] == "ok"
    assert [message.content for message in door.requests[0].chat.messages] == ["Be brief.", "From a pipe"]


async def test_an_answer_cannot_steer_the_terminal(door: FrontDoor) -> None:
    door.script = pieces("a\x1b[2Jb\x07")
    done = await gpumesh(door.folder, "chat", "Hi")
    assert done.stdout.startswith("a[2Jb\n")


async def test_models_are_listed_with_prices(door: FrontDoor) -> None:
    done = await gpumesh(door.folder, "models")
    assert "test-model" in done.stdout
    assert "$0.05" in done.stdout
    rows = json.loads((await gpumesh(door.folder, "models", "--json")).stdout)
    assert [(row["model"], row["output_nano_usd_per_mtok"]) for row in rows] == [
        ("test-model", 200_000_000),
        ("unpriced", None),
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MeshError.of(Reason.UNAVAILABLE, "Nobody can answer."), 3),
        (MeshError.of(Reason.REVOKED_API_KEY, "Nobody can answer."), 4),
        (InsufficientBalance(Reason.INSUFFICIENT_BALANCE, "Nobody can answer."), 4),
        (MeshError.of(Reason.UNKNOWN_MODEL, "Nobody can answer.", metadata={"near": "test-model"}), 5),
        (MeshError.of(Reason.INVALID_ARGUMENT, "Nobody can answer."), 2),
        (MeshError.of(Reason.INTERNAL, "Nobody can answer."), 1),
    ],
)
async def test_errors_have_a_sentence_a_reason_and_an_exit_code(door: FrontDoor, error: MeshError, code: int) -> None:
    door.script = [error]
    done = await gpumesh(door.folder, "chat", "Hi")
    assert done.exit_code == code
    assert f"Nobody can answer. [{error.reason.value}]" in done.stderr
    assert "Traceback" not in done.stderr
    said = json.loads((await gpumesh(door.folder, "chat", "--json", "Hi")).stderr)
    assert (said["error"]["reason"], said["error"]["exit_code"]) == (error.reason.value, code)


async def test_near_names_are_suggested_for_an_unknown_model(door: FrontDoor) -> None:
    door.script = [MeshError.of(Reason.UNKNOWN_MODEL, "No such model.", metadata={"near": "test-model"})]
    assert "did you mean: test-model" in (await gpumesh(door.folder, "chat", "Hi")).stderr


async def test_without_a_mesh_the_message_says_what_to_do(tmp_path: Path) -> None:
    for arguments in (["models"], ["account", "list"], ["node", "status"], ["logs"]):
        done = await gpumesh(tmp_path, *arguments)
        assert done.exit_code == 3, done.stderr
        assert str(tmp_path) in done.stderr.replace("\n", "")
    done = await gpumesh(tmp_path, "models", "--json")
    assert json.loads(done.stderr)["error"]["exit_code"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["credit", "acct_a", "1e3"],
        ["credit", "acct_a", "0.0000000001"],
        ["credit", "acct_a", "-1"],
        ["chat", "--temperature", "3", "Hi"],
        ["model", "add", "m"],
        ["model", "add", "m", "--context", "10", "--feature", "telepathy"],
        ["model", "add", "m", "--context", "10", "--input-price", "1"],
        ["node", "token", "prov_p", "--lifetime", "5"],
        ["nonsense"],
    ],
)
async def test_wrong_usage_exits_with_2(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "operator.json").write_text("{}")
    assert (await gpumesh(tmp_path, *arguments)).exit_code == 2


async def test_logs_shows_the_last_lines_of_each_process(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("router", "edge-http"):
        (tmp_path / "logs" / f"{name}.log").write_text("".join(f"{name} line {n}\n" for n in range(100)))
    done = await gpumesh(tmp_path, "logs", "router", "-n", "2")
    assert done.stdout == "router line 98\nrouter line 99\n"
    rows = [json.loads(line) for line in (await gpumesh(tmp_path, "logs", "-n", "1", "--json")).stdout.splitlines()]
    assert rows == [
        {"process": "edge-http", "line": "edge-http line 99"},
        {"process": "router", "line": "router line 99"},
    ]


def test_the_installed_command_helps_and_lists_its_exit_codes() -> None:
    done = subprocess.run([GPUMESH, "--help"], capture_output=True, text=True, timeout=30, check=True)
    assert "3 the mesh cannot be reached" in " ".join(done.stdout.split())
