"""What the launcher says: one line per step, to the terminal or, detached, through a pipe to the one who waits."""

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol

_GREEN, _RED, _YELLOW, _BOLD, _PLAIN = "\033[32m", "\033[31m", "\033[33m", "\033[1m", "\033[0m"
_PREFIX: Final = "gpumesh: "


class Report(Protocol):
    """Where progress goes."""

    def step(self, text: str) -> None:
        """Something is done."""

    def note(self, text: str) -> None:
        """Something that a person should know."""

    def ready(self, text: str, client: Mapping[str, str]) -> None:
        """The mesh answers: how to use it, and client.json."""

    def failed(self, text: str, exit_code: int) -> None:
        """It cannot start or go on: why."""


class Terminal:
    """Lines for a person."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._began = time.monotonic()

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour else text

    def _print(self, text: str) -> None:
        # A closed terminal must not end the mesh in the middle of its drain.
        try:
            print(text, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 -- takes the place of stdout until the process ends

    def step(self, text: str) -> None:
        """With the seconds since the start."""
        self._print(
            f"{self._paint(_GREEN, '✓')} {text} {self._paint(_BOLD, f'({time.monotonic() - self._began:.1f} s)')}"
        )

    def note(self, text: str) -> None:
        """As it is."""
        self._print(f"{self._paint(_YELLOW, '!')} {text}")

    def ready(self, text: str, client: Mapping[str, str]) -> None:
        """The text as it is."""
        self._print(text)

    def failed(self, text: str, exit_code: int) -> None:
        """On stderr."""
        print(self._paint(_RED, _PREFIX + text), file=sys.stderr, flush=True)


class Json:
    """For programs (--json): progress as JSON lines on stderr, the result as one JSON object on stdout."""

    @staticmethod
    def _progress(what: str, text: str) -> None:
        print(json.dumps({what: text}), file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """On stderr."""
        self._progress("step", text)

    def note(self, text: str) -> None:
        """On stderr."""
        self._progress("note", text)

    def ready(self, text: str, client: Mapping[str, str]) -> None:
        """client.json on stdout."""
        print(json.dumps(dict(client)), flush=True)

    def failed(self, text: str, exit_code: int) -> None:
        """On stderr, in the form that the gpumesh command gives errors."""
        print(json.dumps({"error": {"message": text, "exit_code": exit_code}}), file=sys.stderr, flush=True)


class Pipe:
    """JSON lines for the process that waits in `up --detach`, until it has gone; every line also to our own log."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._terminal = Terminal()

    def _send(self, what: str, **fields: Any) -> None:
        if self._descriptor < 0:
            return
        try:
            os.write(self._descriptor, (json.dumps({"what": what, **fields}) + "\n").encode())
        except OSError:
            self._descriptor = -1

    def step(self, text: str) -> None:
        """Sent and logged."""
        self._terminal.step(text)
        self._send("step", text=text)

    def note(self, text: str) -> None:
        """Sent and logged."""
        self._terminal.note(text)
        self._send("note", text=text)

    def ready(self, text: str, client: Mapping[str, str]) -> None:
        """Sent; then nobody listens any more. Not logged: it holds the API key."""
        self._terminal.step("ready")
        self._send("ready", text=text, client=dict(client))
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def failed(self, text: str, exit_code: int) -> None:
        """Sent and logged."""
        self._terminal.failed(text, exit_code)
        self._send("failed", text=text, exit_code=exit_code)
