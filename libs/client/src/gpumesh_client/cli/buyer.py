"""chat, models: what a buyer does, with the API key of client.json."""

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from gpumesh_client.cli.common import AsJson, command, console, escape, show_rows
from gpumesh_client.client import Answer, Client
from gpumesh_client.money import format_usd
from gpumesh_runtime.error_types import MeshError

ClientFileOption = Annotated[
    str | None, typer.Option("--client", help="A client.json. Default: $GPUMESH_HOME/client.json.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("chat")(chat)
    app.command("models")(models)


@command
def chat(
    prompt: Annotated[list[str] | None, typer.Argument(help="Ask this once. Empty: a conversation.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Default: the one in client.json.")] = "",
    system: Annotated[str, typer.Option("--system", "-s", help="System prompt.")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of each answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    seed: Annotated[int | None, typer.Option(help="For answers that can be repeated.")] = None,
    client: ClientFileOption = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model, with the answer as it grows. Ctrl-C stops an answer, Ctrl-D ends the conversation."""
    messages = [("system", system)] if system else []
    options: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    with Client.from_file(client) as mesh:
        text = " ".join(prompt) if prompt else ("" if sys.stdin.isatty() else sys.stdin.read().strip())
        if text:
            answer = _answer(mesh, [*messages, ("user", text)], options, quiet=as_json)
            if as_json:
                print(json.dumps(dataclasses.asdict(answer)))
            return
        _converse(mesh, messages, options, model or mesh.model)


def _converse(mesh: Client, messages: list[tuple[str, str]], options: dict[str, Any], model: str) -> None:
    console.print(f"[dim]{escape(model)} - Ctrl-C stops an answer, Ctrl-D ends[/dim]")
    while True:
        try:
            text = console.input("[bold green]>[/bold green] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not text:
            continue
        try:
            answer = _answer(mesh, [*messages, ("user", text)], options, quiet=False)
        except KeyboardInterrupt:
            console.print("[dim](stopped; this turn is forgotten)[/dim]")
            continue
        except MeshError as err:
            # One refused turn does not end a conversation.
            console.print(f"[red]{escape(err.message)}[/red] [dim]{err.reason.value}[/dim]")
            continue
        messages += [("user", text), ("assistant", answer.text)]


def _answer(mesh: Client, messages: list[tuple[str, str]], options: dict[str, Any], *, quiet: bool) -> Answer:
    """Asks; prints the answer as it grows unless quiet."""
    for chunk in mesh.stream(messages, **options):
        if chunk.answer is not None:
            if not quiet:
                used = f"{chunk.answer.prompt_tokens} + {chunk.answer.completion_tokens} tokens"
                console.print(f"\n[dim]{used}, {format_usd(chunk.answer.charge_nano_usd)}[/dim]")
            return chunk.answer
        if not quiet:
            if chunk.reasoning:
                console.print(f"[dim]{escape(chunk.reasoning)}[/dim]", end="", soft_wrap=True)
            console.print(escape(chunk.text), end="", soft_wrap=True)
    raise AssertionError("stream() ends with an answer or raises")


@command
def models(client: ClientFileOption = None, as_json: AsJson = False) -> None:
    """List the models that the key may use, with prices per million tokens."""
    with Client.from_file(client) as mesh:
        answer = mesh.models()
    rows = []
    for model in answer.models:
        price = answer.prices.get(model.model_id)
        rows.append(
            {
                "model": model.model_id,
                "aliases": list(model.aliases),
                "context_tokens": model.context_tokens,
                "revision": model.revision,
                "quantisation": model.quantisation,
                "licence": model.licence,
                "input_usd": format_usd(price.input_nano_usd_per_mtok) if price else None,
                "output_usd": format_usd(price.output_nano_usd_per_mtok) if price else None,
                "input_nano_usd_per_mtok": price.input_nano_usd_per_mtok if price else None,
                "output_nano_usd_per_mtok": price.output_nano_usd_per_mtok if price else None,
            }
        )
    columns = ("model", "aliases", "context_tokens", "quantisation", "licence", "input_usd", "output_usd")
    show_rows(as_json, rows, columns, "No models yet: `gpumesh model add` puts one into the catalogue.")
