"""What layers need to know beside their inputs: the caller sets it around its work.

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
    """Of the process, not of a thread."""

    no_native: str = ""  # why decoding does without native code; empty: it uses it where it can
    training: bool = False  # this is a step that has first derivatives, and no second ones
    first_row: int = 0  # of this rank, in the batch that is shared by as many as the world size


_current = Context()


def current() -> Context:
    """The context of what runs now."""
    return _current


@contextmanager
def within(**changes: Any) -> Iterator[None]:
    """Change fields of the Context for what runs within."""
    global _current
    before, _current = _current, replace(_current, **changes)
    try:
        yield
    finally:
        _current = before
