"""What every command shares: --json, errors and exit codes, tables."""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC
from typing import Annotated, Any, Final, NoReturn, ParamSpec

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich import markup
from rich.console import Console
from rich.table import Table

from gpumesh_client.files import ConfigurationError
from gpumesh_client.money import parse_usd
from gpumesh_runtime.error_types import (
    AlreadyExists,
    Conflict,
    DeadlineExceeded,
    InsufficientBalance,
    InvalidArgument,
    MeshError,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_REFUSED: Final = 4
EXIT_NOT_FOUND: Final = 5
EXIT_CONFLICT: Final = 6
EXIT_INTERRUPTED: Final = 130
EXIT_CODES_HELP: Final = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or arguments, 3 the mesh cannot be reached, "
    "4 refused (key, certificate or balance), 5 not found, 6 exists already, 130 interrupted."
)
_CODES: Final[tuple[tuple[type[Exception], int], ...]] = (
    (Unavailable, EXIT_UNREACHABLE),
    (DeadlineExceeded, EXIT_UNREACHABLE),
    (Unauthenticated, EXIT_REFUSED),
    (PermissionDenied, EXIT_REFUSED),
    (InsufficientBalance, EXIT_REFUSED),
    (NotFound, EXIT_NOT_FOUND),
    (AlreadyExists, EXIT_CONFLICT),
    (Conflict, EXIT_CONFLICT),
    (InvalidArgument, EXIT_USAGE),
    (ConfigurationError, EXIT_UNREACHABLE),
)
_HINTS: Final = {
    EXIT_UNREACHABLE: "Is it running? `gpumesh up` starts it, `gpumesh logs` shows what happened.",
}

console: Final = Console(highlight=False)
stderr: Final = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
P = ParamSpec("P")


def exit_code_of(err: Exception) -> int:
    """The exit code that belongs to an error."""
    return next((code for kind, code in _CODES if isinstance(err, kind)), EXIT_FAILED)


def fail(err: Exception, *, as_json: bool) -> NoReturn:
    """Says what went wrong on stderr and ends with the code that belongs to it."""
    code = exit_code_of(err)
    if as_json:
        content: dict[str, Any] = {"message": str(err), "exit_code": code}
        if isinstance(err, MeshError):
            content |= {"message": err.message, "reason": err.reason.value, "metadata": err.metadata}
        print(json.dumps({"error": content}), file=sys.stderr)
    else:
        text = f"{err.message} [{err.reason.value}]" if isinstance(err, MeshError) else str(err)
        stderr.print(f"[red]gpumesh:[/red] {escape(text)}")
        if isinstance(err, MeshError) and err.metadata.get("near"):
            stderr.print(f"  did you mean: {escape(err.metadata['near'])}")
        if code in _HINTS and isinstance(err, MeshError):
            stderr.print(f"  {_HINTS[code]}")
    raise typer.Exit(code)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turns errors of a command into a message and an exit code. The command's `as_json` says which form."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            function(*args, **kwargs)
        except (MeshError, ConfigurationError, OSError) as err:
            fail(err, as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapped


def escape(text: str) -> str:
    """Text from elsewhere as it is: no markup, and no control characters that could steer the terminal."""
    return markup.escape("".join(char for char in text if char.isprintable() or char in "\n\t"))


def show(as_json: bool, content: Mapping[str, Any], text: str) -> None:
    """The result of a command that made or changed one thing."""
    if as_json:
        print(json.dumps(content))
    else:
        console.print(text)


def show_rows(as_json: bool, rows: Sequence[Mapping[str, Any]], columns: Iterable[str], empty: str) -> None:
    """The result of a command that lists: JSON gets all fields, people the columns."""
    if as_json:
        print(json.dumps(list(rows)))
        return
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(columns)
    for number, name in enumerate(names):
        # Ids are for copying: the first column stays whole, the others fold rather than lose their end.
        table.add_column(name.replace("_", " "), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(escape(_cell(row[name])) for name in names))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def time_text(timestamp: Timestamp) -> str:
    """RFC 3339, UTC, to the second."""
    return timestamp.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def usd(text: str) -> int:
    """A typer parser: US dollars as nano-USD."""
    try:
        return parse_usd(text)
    except ValueError as err:
        raise typer.BadParameter(str(err)) from None
