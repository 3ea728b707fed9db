"""Entry point of the `gpumesh` command."""

from typing import Annotated

import typer

from gpumesh_client.cli import buyer, local, nodes, operators
from gpumesh_client.cli.common import EXIT_CODES_HELP

app = typer.Typer(
    name="gpumesh",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES_HELP,
    help="Inference from many people's GPUs. `gpumesh up` runs a whole mesh on this machine.",
)
for group in (local, buyer, operators, nodes):
    group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 -- reads the file system, only when asked

        print(version("gpumesh"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Runs the command."""
    app()


if __name__ == "__main__":
    main()
