"""Settings that layers read besides their inputs; the caller sets them around its work.

with context.within(training=True, first_row=rows.start):
    loss = ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Context:
    """The settings of the whole process; threads share them."""

    no_native: str = ""  # why native code is off; empty: it is used where possible
    training: bool = False  # a training step, with first derivatives and no second ones
    coded: bool = False  # a step with a cache of codes
    first_row: int = 0  # of this rank's part of the batch, which all ranks share


_current = Context()


def current() -> Context:
    """The context in force."""
    return _current


@contextmanager
def within(**changes: Any) -> Iterator[None]:
    """Change fields of the Context inside a `with` block. Raises TypeError for an unknown field."""
    global _current
    before, _current = _current, replace(_current, **changes)
    try:
        yield
    finally:
        _current = before
