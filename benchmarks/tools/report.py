"""Writes benchmarks/out/<name>.json: a flat object, figure name to number, with commit, command and seed."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

OUT: Final = Path(__file__).parents[1] / "out"


def commit() -> str:
    """The commit that is checked out, with "+" when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return (head.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")


def write(name: str, figures: Mapping[str, float], *, command: str, seed: int) -> Path:
    """Writes the report and returns its path."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps({**figures, "commit": commit(), "command": command, "seed": seed}, indent=1) + "\n")
    return path
