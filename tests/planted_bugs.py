"""Caches with a bug planted in each, of kinds that happened in other projects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from kvtool.core.cache import EMPTY, Cache, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache


class LostValue(DynamicCache):
    """The value of the third token never arrives."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        values = values.clone()
        if self.length > 2:
            values[:, :, 2] = 0.0
        return keys, values


class OtherLayer(DynamicCache):
    """Past values are read from layer 0 in every layer."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        mixed = values.clone()
        mixed[:, :, : self.length] = self._values[0][:, :, : self.length]
        return keys, mixed


class LastLayerNotStored(DynamicCache):
    """Only the prompt is ever stored in the last layer."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if layer == self.spec.n_layers - 1 and self.length > 0:
            self._keys[layer][:, :, step.slots] = 0.0
        return keys, values


class HeadsMixed(DynamicCache):
    """The width of a head is rolled by one in the stored keys."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        return (keys.roll(1, dims=-1) if self.length else keys), values


class LowStorage(DynamicCache):
    """Stores bfloat16 whatever the model computes in (a loss that nobody asked for)."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if not self.length:
            return keys, values
        return keys.bfloat16().to(k.dtype), values.bfloat16().to(v.dtype)


def moved(shift: Callable[[Cache, int], int]) -> type[Cache]:
    """A cache whose tokens stand `shift` places further than they should."""

    class Moved(DynamicCache):
        def _place(self, start: int, n_new: int) -> Step:
            step = super()._place(start, n_new)
            return dataclasses.replace(step, q_pos=step.q_pos + shift(self, start))

    return Moved


def masked(rule: Callable[[Step], Tensor]) -> type[Cache]:
    """A cache whose decoding steps use another mask."""

    class Masked(DynamicCache):
        def _place(self, start: int, n_new: int) -> Step:
            step = super()._place(start, n_new)
            return dataclasses.replace(step, mask=rule(step), causal=False) if start else step

    return Masked


class WholeBuffer(StaticCache):
    """Slots that nothing was written to are attended."""

    def _place(self, start: int, n_new: int) -> Step:
        step = super()._place(start, n_new)
        if not start or step.mask is None:
            return step
        return dataclasses.replace(step, mask=torch.ones_like(step.mask))


class WrongSlot(StaticCache):
    """Every new token overwrites the last of the prompt."""

    def _place(self, start: int, n_new: int) -> Step:
        step = super()._place(start, n_new)
        return dataclasses.replace(step, slots=step.slots - 1) if start else step


class WrapsSilently(StaticCache):
    """Stores from the start again when it is full, and says nothing."""

    def _place(self, start: int, n_new: int) -> Step:
        step = super()._place(start, n_new)
        return dataclasses.replace(step, slots=step.slots % 12)


class NaNBehind(StaticCache):
    """Unwritten slots hold NaN, which a mask does not keep out of a product."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        values = values.clone()
        values[:, :, -1] = torch.where(step.k_pos[0, -1] == EMPTY, float("nan"), values[:, :, -1])
        return keys, values


def see(rule: Callable[[Tensor, Tensor], Tensor]) -> type[Cache]:
    return masked(lambda step: rule(step.q_pos[:, None, :, None], step.k_pos[:, None, None, :]))


# With each: how many tokens must be held before the cache is wrong.
MUTANTS: dict[str, tuple[type[Cache], int]] = {
    "a lost value": (LostValue, 3),
    "values of another layer": (OtherLayer, 1),
    "a layer that is not stored": (LastLayerNotStored, 1),
    "keys rolled within a head": (HeadsMixed, 1),
    "bfloat16 storage": (LowStorage, 1),
    "position off by one": (moved(lambda cache, start: int(start > 0)), 1),
    "position not advanced": (moved(lambda cache, start: -start), 1),
    "causal mask aligned at the top left": (see(lambda q, k: k <= 0), 1),
    "the newest token does not see itself": (see(lambda q, k: k < q), 1),
    "a window on the fast path only": (see(lambda q, k: q - k < 4), 4),
    "unwritten slots are attended": (WholeBuffer, 1),
    "the wrong slot": (WrongSlot, 1),
    "NaN behind the end": (NaNBehind, 0),
}


class WrongBelowFloat64(DynamicCache):
    """What `wrong` says, in formats other than float64."""

    factor = 0.0

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if self.length > 9 and k.dtype != torch.float64:
            return keys * self.factor, values
        return keys, values


class NaNBelowFloat64(WrongBelowFloat64):
    factor = float("nan")
