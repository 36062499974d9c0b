"""What contenders of one run may differ in, beside the kind of cache. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple, Protocol


class Setup(NamedTuple):
    """How a contender computes; the default is as the process stands."""

    dtype: str = ""
    batch_size: int = 1  # sequences side by side
    threads: int = 0  # of the processor


AS_IT_IS = Setup()


class Named(Protocol):
    """What has a kind of cache, an implementation and a setup: a row, a cell, a contender."""

    @property
    def cache(self) -> str:
        """The kind of cache."""

    @property
    def impl(self) -> str:
        """Whose code runs the model."""

    @property
    def setup(self) -> Setup:
        """The number format, the batch and the threads."""


AXES = ("impl", *Setup._fields)


def axes_of(items: Iterable[Named]) -> tuple[str, ...]:
    """The axes on which the items differ.

    >>> from types import SimpleNamespace as Item
    >>> axes_of([Item(impl="kvtool", setup=Setup(threads=n)) for n in (1, 2)])
    ('threads',)
    """
    values = [{"impl": item.impl, **item.setup._asdict()} for item in items]
    return tuple(axis for axis in AXES if len({value[axis] for value in values}) > 1)


def words_of(impl: str, setup: Setup, axes: Container[str]) -> list[str]:
    """An implementation and a setup in words, of the axes alone.

    >>> words_of("kvtool", Setup("bfloat16", 8, 1), ("dtype", "batch_size", "threads"))
    ['bfloat16', 'batch-8', '1-thread']
    """
    said = {
        "impl": impl,
        "dtype": setup.dtype,
        "batch_size": f"batch-{setup.batch_size}",
        "threads": f"{setup.threads}-thread",
    }
    return [said[axis] for axis in AXES if axis in axes]


def name_of(item: Named, axes: Container[str]) -> str:
    """Its kind of cache behind what tells it from others of that kind: "bfloat16 static"."""
    return " ".join([*words_of(item.impl, item.setup, axes), item.cache])
