"""What the node needs of an engine, whatever it is. To add one, write a file beside this and name it in factory.py."""

from collections.abc import Callable, Sequence
from typing import Protocol

from gpumesh_node.domain.deltas import Delta, Usage
from gpumesh_node.domain.models import ServedModel
from gpumesh_node.domain.request import EngineRequest

OnChange = Callable[[], None]


class Answer(Protocol):
    """One answer of an engine, read piece by piece. Not reading holds the engine back: nothing is buffered without bound."""

    @property
    def usage(self) -> Usage:
        """Tokens so far; the engine's own count after the end, where it gives one."""

    @property
    def tokens(self) -> int:
        """Output tokens so far, cumulative; never goes back."""

    @property
    def seed(self) -> int | None:
        """The seed that was used, None where unknown."""

    async def read(self) -> Sequence[Delta]:
        """What the engine produced since the last read, all of it; empty at the end. Raises EngineFailure."""

    async def release(self) -> None:
        """After the end: gives the connection back. Never raises; takes 1 s at most."""

    def abort(self) -> None:
        """Stops the engine's work now, by closing the connection. Harmless after the end."""


class Engine(Protocol):
    """One engine with its models.

    name: unique on the node, for logs and metrics. on_change: set by the node; call it when models() would answer differently.
    """

    name: str
    on_change: OnChange

    def models(self) -> Sequence[ServedModel]:
        """What it serves, with each model's state. Cheap: called for every heartbeat."""

    async def run(self) -> None:
        """Starts the engine and keeps it well, until cancelled. A failure is a state of its models, never an exception."""

    async def generate(self, request: EngineRequest) -> Answer:
        """Begins one answer. Raises EngineFailure. Cancelling it stops the work."""
