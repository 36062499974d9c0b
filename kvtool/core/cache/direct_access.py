"""Direct access to a cache's memory, for code that passes over its `write` and `attend`: compiled
code on a CPU, and CUDA graphs. A cache without it is right as well, and slower."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvtool.core.native.arrays import Array

if TYPE_CHECKING:
    from kvtool.core.cache.base import CacheSpec, Step

# How a cache stores and reads.
STORAGE_METHODS = (
    "begin", "_make_step", "_positions", "_at", "step_at", "write", "attend", "commit",
)  # fmt: skip


class StepAddresses(NamedTuple):
    """Where the keys and values of a step are stored, and those before them, in columns by order of
    arrival: what compiled/decoder.py takes."""

    start: int  # how many tokens stand before the first new one
    padding: Array  # (B,) how many tokens at the start of each row are padding
    addresses: Array  # (2,layers) of keys and values, (B,Hkv,columns,D) in the spec's dtype
    columns: int
    slot: int  # the column of the first new token
    window: int  # how many positions a token sees, its own included; 0: all before it
    sinks: Array  # (B,2) and besides, the columns from one to another
    # Of keys and of values, (2,layers,9) where there are codes, as compiled/codes.py has it.
    coded: Array = np.zeros((2, 1, 9), np.int64)


class GraphStep(NamedTuple):
    """A step of one token a row, as a CUDA graph replays it."""

    start: int  # how many tokens stand before it
    tables: tuple[Tensor, ...]  # what else a step reads that another one may find changed
    form: tuple[int | None, ...]  # numbers that a capture fixes
    memory: list[Tensor]  # of keys and values: all else that `write` and `attend` reach


class MethodSnapshot(NamedTuple):
    """The methods by which a kind stores and reads, as they were when it was written."""

    names: frozenset[str]
    get: attrgetter[tuple[Any, ...]]
    found: tuple[Any, ...]


class DirectAccess:
    """For a Cache that tells where its keys and values are: put it before Cache among the bases.

    A kind answers once `freeze_methods` has been called on it, below its class: what is stored and
    read directly passes over its methods, and so over what a subclass or a patch makes of them.
    """

    spec: CacheSpec
    batch: int
    left_padding: Tensor | None
    _frozen: ClassVar[MethodSnapshot]
    _known: tuple[Any, Array] | None = None  # the buffers of the last step, and their addresses

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """As `begin`, for compiled code; None from a cache whose memory or methods are not as that
        code expects, whose step then takes `begin`. Raises CapacityError."""
        return None

    def graph_step(self) -> GraphStep | None:
        """As `begin(1)`, to replay a capture of `step_at` and what follows it; None from a kind
        that is not compilable, from a cache whose methods have been replaced, and for a step that
        is not like others. Raises CapacityError."""
        return None

    def step_at(
        self, start: Tensor, tables: tuple[Tensor, ...], form: tuple[int | None, ...]
    ) -> Step:
        """What `begin(1)` gives after `start` (1,) tokens, by device work alone; tables and form
        as in GraphStep. Raises NotImplementedError from a kind that is not compilable."""
        raise NotImplementedError(f"{type(self).__name__} is not compilable")

    @classmethod
    def freeze_methods(cls, *more: str) -> None:
        """Record that this kind is now as written: its STORAGE_METHODS, and `more` methods."""
        names = frozenset({*STORAGE_METHODS, *more})
        get = attrgetter(*names)
        cls._frozen = MethodSnapshot(names, get, get(cls))

    def _is_unpatched(self) -> bool:
        """Whether all frozen methods are still there; False for a subclass that froze none."""
        kind = type(self)
        frozen: MethodSnapshot | None = vars(kind).get("_frozen")
        if frozen is None:
            return False
        return frozen.get(kind) == frozen.found and frozen.names.isdisjoint(vars(self))

    def _addresses_of(self, keys: list[Tensor], values: list[Tensor]) -> Array | None:
        """The addresses (2,layers) of the buffers of all layers, kept until a buffer moves; None
        unless all are alike, and readable in the spec's dtype."""
        layout = [(x.data_ptr(), x.dtype) for x in (*keys, *values)]
        found = keys[0].shape, self.spec.dtype, layout
        if self._known is None or found != self._known[0]:
            addresses = buffer_addresses(keys, values, found[0], self.spec.dtype)
            if addresses is None:
                return None
            self._known = found, addresses
        return self._known[1]

    def _padding(self) -> Array | None:
        """The padding tokens of each row, (B,); None if compiled code cannot read their number."""
        padded = self.left_padding
        if padded is None:
            return no_padding(self.batch)
        if (padded.shape, padded.dtype) != ((self.batch,), torch.long) or not padded.is_cpu:
            return None
        padding = padded.numpy()
        return None if (padding < 0).any() else padding

    def _padding_table(self) -> tuple[Tensor, ...]:
        """The padding as one of the tables of a GraphStep, if there is any."""
        return () if self.left_padding is None else (self.left_padding,)


@cache
def no_padding(batch: int) -> Array:
    """Zeros (B,), which nobody writes to."""
    return np.zeros(batch, np.int64)


@cache
def no_sinks(batch: int) -> Array:
    """Zeros (B,2), which nobody writes to."""
    return np.zeros((batch, 2), np.int64)


def is_readable(x: Tensor) -> bool:
    """Whether a tensor is dense memory of the CPU, from its address on."""
    return type(x) is Tensor and x.is_cpu and x.is_contiguous() and x.data_ptr() != 0


def buffer_addresses(
    keys: Sequence[Tensor], values: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Array | None:
    """The addresses (2,layers) of keys and values, for compiled code; None unless all are readable
    and of that shape and type."""
    for x in (*keys, *values):
        if x.shape != shape or x.dtype is not dtype or not is_readable(x):
            return None
    return np.array([[x.data_ptr() for x in each] for each in (keys, values)])
