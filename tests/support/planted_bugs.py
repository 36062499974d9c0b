"""Caches with a bug planted in each, of kinds that happened in other projects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kvtool.core.cache import Cache, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.verify.mutants.contents import (
    LastLayerNotStored,
    LosesValue,
    ReadsLayerZero,
    RollsWithinHead,
    StoresLower,
)
from kvtool.core.verify.mutants.slots import NaNBehind


def moved(shift: Callable[[Cache, int], int]) -> type[Cache]:
    """A cache whose tokens stand `shift` places further than they should."""

    class Moved(DynamicCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            step = super()._make_step(start, n_new)
            return dataclasses.replace(step, q_pos=step.q_pos + shift(self, start))

    return Moved


def masked(rule: Callable[[Step], Tensor]) -> type[Cache]:
    """A cache whose decoding steps use another mask."""

    class Masked(DynamicCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            step = super()._make_step(start, n_new)
            return dataclasses.replace(step, mask=rule(step), causal=False) if start else step

    return Masked


class WholeBuffer(StaticCache):
    """Slots that nothing was written to are attended."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        if not start or step.mask is None:
            return step
        return dataclasses.replace(step, mask=torch.ones_like(step.mask))


class WrongSlot(StaticCache):
    """Every new token overwrites the last of the prompt."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        return dataclasses.replace(step, slots=step.slots - 1) if start else step


def see(rule: Callable[[Tensor, Tensor], Tensor]) -> type[Cache]:
    return masked(lambda step: rule(step.q_pos[:, None, :, None], step.k_pos[:, None, None, :]))


# With each: how many tokens must be held before the cache is wrong.
MUTANTS: dict[str, tuple[type[Cache], int]] = {
    "a lost value": (LosesValue, 3),
    "values of another layer": (ReadsLayerZero, 1),
    "a layer that is not stored": (LastLayerNotStored, 1),
    "keys rolled within a head": (RollsWithinHead, 1),
    "bfloat16 storage": (StoresLower, 1),
    "position off by one": (moved(lambda cache, start: int(start > 0)), 1),
    "position not advanced": (moved(lambda cache, start: -start), 1),
    "causal mask aligned at the top left": (see(lambda q, k: k <= 0), 1),
    "the newest token does not see itself": (see(lambda q, k: k < q), 1),
    "a window on the fast path only": (see(lambda q, k: q - k < 4), 4),
    "unwritten slots are attended": (WholeBuffer, 1),
    "the wrong slot": (WrongSlot, 1),
    "NaN behind the end": (NaNBehind, 0),
}
