"""What can go wrong on the way up, each with one sentence for a person and an exit code."""

from typing import Final

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2


class LocalError(Exception):
    """The mesh cannot start or go on. text: one clear message, possibly with the tail of a log below it."""

    def __init__(self, text: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.exit_code = exit_code
