"""up, down, logs: the mesh on this machine."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from gpumesh_client.cli.common import AsJson, command, console, escape
from gpumesh_client.files import ConfigurationError, home

_PASS_ON: Final = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_LOOK_S: Final = 0.2


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("up", context_settings=_PASS_ON)(up)
    app.command("down", context_settings=_PASS_ON)(down)
    app.command("logs")(logs)


def _launcher(name: str, arguments: list[str]) -> None:
    """Becomes the launcher: signals and exit code are its own."""
    try:
        import gpumesh_local  # noqa: F401, PLC0415 -- only asks whether it is there; the client works without it
    except ImportError:
        raise ConfigurationError("The launcher is not installed here: pip install 'gpumesh[all]'") from None
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "gpumesh_local", name, *arguments])  # noqa: S606 -- our own module


@command
def up(context: typer.Context) -> None:
    """Start a whole mesh on this machine (--detach: in the background; --help: all options)."""
    _launcher("up", context.args)


@command
def down(context: typer.Context) -> None:
    """Drain and end the mesh of this machine."""
    _launcher("down", context.args)


@command
def logs(
    name: Annotated[str, typer.Argument(help="Process, for example router. Empty: all.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the logs of the mesh on this machine."""
    folder = home() / "logs"
    files = sorted(folder.glob(f"{name or '*'}.log"))
    if not files:
        known = ", ".join(sorted(path.stem for path in folder.glob("*.log"))) or "none"
        raise ConfigurationError(f"There is no log {name or 'yet'} in {folder}. Known: {known}.")
    positions: dict[Path, int] = {}
    for path in files:
        positions[path] = _show(path, _tail_start(path, lines), len(files) > 1, as_json)
    while follow:
        time.sleep(_LOOK_S)
        for path, position in positions.items():
            positions[path] = _show(path, position, len(files) > 1, as_json)


def _tail_start(path: Path, lines: int) -> int:
    """Where the last `lines` lines begin, looking at 256 KiB at most."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 262_144))
        tail = file.read().splitlines(keepends=True)[-lines:] if lines else []
    return size - sum(map(len, tail))


def _show(path: Path, position: int, named: bool, as_json: bool) -> int:
    """Prints whole lines from a position on; gives the position after them."""
    if path.stat().st_size < position:
        position = 0  # it was put aside and begun anew
    with path.open("rb") as file:
        file.seek(position)
        for line in file:
            if not line.endswith(b"\n"):
                break
            position += len(line)
            text = line.decode(errors="replace").rstrip("\n")
            if as_json:
                print(json.dumps({"process": path.stem, "line": text}), flush=True)
                continue
            prefix = f"[bold]{path.stem}[/bold] " if named else ""
            console.print(prefix + escape(text), soft_wrap=True)
    return position
