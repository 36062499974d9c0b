"""The fields of a configuration under the names that most types have, with a type's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvtool.config import check_bool, check_int
from kvtool.core.plan.architectures import Architecture
from kvtool.errors import UsageError
from kvtool.reading import quoted


class Fields:
    """What a configuration says, or else its type's default. Raises UsageError, naming the field.

    null is not the default: it says that a thing is derived, or that it is not there.
    """

    def __init__(self, data: Mapping[str, Any], architecture: Architecture) -> None:
        self.data = data
        self.architecture = architecture

    def name(self, known: str) -> str:
        """What the file calls a field."""
        own = self.architecture.names.get(known, known)
        return known if known in self.data and own not in self.data else own

    def get(self, known: str, default: Any = None) -> Any:
        """The value as it is."""
        name = self.name(known)
        if name in self.data:
            return self.data[name]
        return self.architecture.defaults.get(known, default)

    def size(self, known: str, default: int | None = None, low: int = 1) -> int:
        """A whole number; `default` stands for null, and for what nobody says."""
        value = self.get(known)
        if value is None:
            value = default
        if value is None:
            raise UsageError(f"{self.name(known)} is missing")
        check_int(self.name(known), value, low)
        return int(value)

    def maybe(self, known: str) -> int:
        """A whole number; 0 where it is null, negative, or not there."""
        value = self.get(known)
        if value is None:
            return 0
        check_int(self.name(known), value, -1)
        return max(int(value), 0)

    def flag(self, known: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(known)
        if value is None:
            return default
        check_bool(self.name(known), value)
        return bool(value)

    def by_layer(self, known: str, n_layers: int) -> list[Any] | None:
        """A list with an entry for each layer; None if there is none."""
        value = self.get(known)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != n_layers:
            raise UsageError(
                f"{self.name(known)}: expected a list of {n_layers}, one for each layer"
            )
        return value

    def within(self, known: str) -> Fields:
        """The fields of an object that is a field; none if it is not there."""
        value = self.get(known) or {}
        if not isinstance(value, Mapping):
            raise UsageError(f"{self.name(known)}: {quoted(value)} is not an object")
        return Fields(value, Architecture(known))


def divided(f: Fields, width: str, heads: str) -> int:
    """The quotient of two sizes. Raises UsageError if there is a remainder."""
    a, b = f.size(width), f.size(heads)
    if a % b:
        raise UsageError(f"{f.name(heads)}: {b} heads do not divide {f.name(width)} {a}")
    return a // b
