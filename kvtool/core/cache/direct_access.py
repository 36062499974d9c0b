"""Direct access to a cache's memory, for code that does not call its `write` and `attend`.

This code is compiled code on a CPU, and CUDA graphs. Without direct access a cache gives the same
results, but decodes more slowly.
"""

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

# The methods by which a cache stores and reads.
STORAGE_METHODS = (
    "begin", "_make_step", "_positions", "_at", "step_at", "write", "attend", "commit",
)  # fmt: skip


class StepAddresses(NamedTuple):
    """The memory that a step of compiled/decoder.py uses, with columns in order of arrival."""

    start: int  # how many tokens come before the first new one
    padding: Array  # (B,) padding tokens at the start of each row
    addresses: Array  # (2,layers) of keys and values, (B,Hkv,columns,D) in the spec's dtype
    columns: int
    slot: int  # the column of the first new token
    window: int  # how many positions a token sees, with its own; 0: all before it
    sinks: Array  # (B,2) the first column of each row's sinks, and the one after the last
    # (2,layers,9) of keys and of values: where codes are, as compiled/codes.py has it; 0: none.
    coded: Array = np.zeros((2, 1, 9), np.int64)


class GraphStep(NamedTuple):
    """A step of one token a row, for the replay of a CUDA graph."""

    start: int  # how many tokens come before it
    tables: tuple[Tensor, ...]  # other inputs that may change from step to step
    form: tuple[int | None, ...]  # numbers that are constant in a capture
    memory: list[Tensor]  # keys and values: all other memory that `write` and `attend` use


class MethodSnapshot(NamedTuple):
    """The methods by which a kind stores and reads, as its author wrote them."""

    names: frozenset[str]
    get: attrgetter[tuple[Any, ...]]
    found: tuple[Any, ...]


class DirectAccess:
    """A mixin for caches that give direct access to their memory; name it before Cache as a base.

    Direct access does not call the cache's methods, so it would ignore a subclass or a patch. So a
    kind calls `freeze_methods` after its class, and allows no direct access once a method differs.
    """

    spec: CacheSpec
    batch: int
    left_padding: Tensor | None
    _frozen: ClassVar[MethodSnapshot]
    _known: tuple[Any, Array] | None = None  # layout of the last step's buffers, their addresses

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """As `begin`, for compiled code.

        None if the memory or methods are not as that code expects; then call `begin`. Raises
        CapacityError.
        """
        return None

    def graph_step(self) -> GraphStep | None:
        """As `begin(1)`, for the replay of a captured `step_at` and the work after it.

        None if the kind is not compilable, if its methods have been replaced, or if the step is not
        like others, as the first one. Raises CapacityError.
        """
        return None

    def step_at(
        self, start: Tensor, tables: tuple[Tensor, ...], form: tuple[int | None, ...]
    ) -> Step:
        """The step of `begin(1)` after `start` (1,) tokens, made on the device alone.

        tables and form: as in GraphStep. Raises NotImplementedError for a kind that is not
        compilable.
        """
        raise NotImplementedError(f"{type(self).__name__} is not compilable")

    @classmethod
    def freeze_methods(cls, *more: str) -> None:
        """Record this kind's STORAGE_METHODS, and `more` methods, as its author wrote them."""
        names = frozenset({*STORAGE_METHODS, *more})
        get = attrgetter(*names)
        cls._frozen = MethodSnapshot(names, get, get(cls))

    def _is_unpatched(self) -> bool:
        """Whether all frozen methods are unchanged; False for a subclass that froze none."""
        kind = type(self)
        frozen: MethodSnapshot | None = vars(kind).get("_frozen")
        if frozen is None:
            return False
        return frozen.get(kind) == frozen.found and frozen.names.isdisjoint(vars(self))

    def _addresses_of(self, keys: list[Tensor], values: list[Tensor]) -> Array | None:
        """The addresses (2,layers) of all buffers, computed again when a buffer has moved.

        None unless all have the same shape, the spec's dtype, and readable memory.
        """
        layout = [(x.data_ptr(), x.dtype) for x in (*keys, *values)]
        found = keys[0].shape, self.spec.dtype, layout
        if self._known is None or found != self._known[0]:
            addresses = buffer_addresses(keys, values, found[0], self.spec.dtype)
            if addresses is None:
                return None
            self._known = found, addresses
        return self._known[1]

    def _padding(self) -> Array | None:
        """The padding tokens of each row, (B,); None if compiled code cannot read them."""
        padded = self.left_padding
        if padded is None:
            return no_padding(self.batch)
        if (padded.shape, padded.dtype) != ((self.batch,), torch.long) or not padded.is_cpu:
            return None
        padding = padded.numpy()
        return None if (padding < 0).any() else padding

    def _padding_table(self) -> tuple[Tensor, ...]:
        """The padding as tables of a GraphStep; () without padding."""
        return () if self.left_padding is None else (self.left_padding,)


@cache
def no_padding(batch: int) -> Array:
    """Zeros (B,), shared and read-only by convention: no row has padding."""
    return np.zeros(batch, np.int64)


@cache
def no_sinks(batch: int) -> Array:
    """Zeros (B,2), shared and read-only by convention: no row has sinks."""
    return np.zeros((batch, 2), np.int64)


def is_readable(x: Tensor) -> bool:
    """Whether compiled code can read a tensor: it is plain, contiguous and on the CPU."""
    return type(x) is Tensor and x.is_cpu and x.is_contiguous() and x.data_ptr() != 0


def buffer_addresses(
    keys: Sequence[Tensor], values: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Array | None:
    """The addresses (2,layers) of keys and values for compiled code; None unless all are readable
    and have that shape and dtype."""
    for x in (*keys, *values):
        if x.shape != shape or x.dtype is not dtype or not is_readable(x):
            return None
    return np.array([[x.data_ptr() for x in each] for each in (keys, values)])
