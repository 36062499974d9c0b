"""Copies of a decoder with moved weights, which the second look at each bug asks for again."""

from __future__ import annotations

from typing import Any

from kvtool.core.verify.copies import moved
from kvtool.core.verify.subject import Same
from kvtool.core.verify.target.attributes import owned_modules

MAX_BYTES = 64 * 2**20  # bytes of weights that are kept


class MovedCopies:
    """Copies with moved weights, each kept as long as all are small together."""

    def __init__(self, most: int = MAX_BYTES) -> None:
        self.left = most  # bytes that may still be kept
        self._kept: dict[tuple[Same, float, int, bool], Any] = {}

    def of(self, decoder: Any, by: float, seed: int, tables: bool) -> Any:
        """A copy as `copies.moved` makes it, which callers must not change.

        Raises NotImplementedError as that does.
        """
        key = (Same(decoder), by, seed, tables)
        if key in self._kept:
            return self._kept[key]
        made, nbytes = moved(decoder, by, seed, tables), _weight_bytes(decoder)
        if 0 < nbytes <= self.left:
            self.left -= nbytes
            self._kept[key] = made
        return made


def _weight_bytes(decoder: Any) -> int:
    """The bytes of all parameters that a decoder holds, 0 for one without modules."""
    modules = owned_modules(decoder).values()
    return sum({id(p): p.nbytes for module in modules for p in module.parameters()}.values())
