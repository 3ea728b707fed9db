"""A value that must not be printed: prompts, keys, tokens. Its repr, str and format are redacted, and it does not
pickle.
"""

from typing import Any, Final, Generic, NoReturn, TypeVar

T = TypeVar("T", bound=bytes | str)

REDACTED: Final = "<redacted>"


class Secret(Generic[T]):
    """Holds bytes or text that only `reveal()` gives out. Compared by value; not hashable by its content."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """The value. Call it as late as possible and never inside a log call or an error text."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    __hash__ = None  # type: ignore[assignment]  # a secret as a dictionary key would outlive its use

    def __repr__(self) -> str:
        return REDACTED

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return REDACTED

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Secret is not serialised")
