"""Planted bugs of classes 14 and 15: slots that hold nothing, or that do not exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtool.core.cache import EMPTY, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.kernels.masks import mask_tensor
from kvtool.core.verify.diagnosis.hypotheses import NOT_A_NUMBER, contents
from kvtool.core.verify.mutants.mutant import Mutant, masked

SEEN, KEYS = "visible keys", "stored K"
ALL = 256  # tokens: more than any scenario feeds


def whole_buffer(step: Step) -> Tensor | None:
    """Every slot is seen, and later ones of the step by earlier ones are not."""
    mask = mask_tensor(step.mask)
    assert mask is not None
    return mask | (step.k_pos == EMPTY)[:, None, None]


def one_more(step: Step) -> Tensor | None:
    """The first empty slot is seen too."""
    mask = mask_tensor(step.mask)
    assert mask is not None
    n_filled = int((step.k_pos[0] != EMPTY).sum())
    mask = mask.clone()
    mask[..., n_filled : n_filled + 1] = True
    return mask


class NaNBehind(StaticCache):
    """Unwritten slots hold NaN, which a mask does not keep out of a product."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        values = values.clone()
        values[:, :, -1] = torch.where(step.k_pos[0, -1] == EMPTY, float("nan"), values[:, :, -1])
        return keys, values


class GrowsEmpty(DynamicCache):
    """Does not copy what it held when it grows."""

    def _reserve(self, length: int) -> None:
        columns = self._columns
        super()._reserve(length)
        if self._columns != columns:
            for buffer in (*self._keys, *self._values):
                buffer.zero_()


class SlotBefore(StaticCache):
    """New tokens are stored one slot too low."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        return replace(step, slots=step.slots - 1) if start else step


class LastSlotShared(StaticCache):
    """Its last slot is never used, as if slots were counted from 1."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        return replace(step, slots=step.slots.clamp(max=self.spec.capacity - 2))


class FullTooEarly(DynamicCache):
    """Refuses the last token that there is room for."""

    def begin(self, n_new: int) -> Step:
        if self.length + n_new >= self.spec.capacity:
            raise IndexError("cache is full")
        return super().begin(n_new)


def full_silently(slot: Callable[[int, int], int]) -> type[StaticCache]:
    """A static cache that stores a token too many in slot(its number, capacity)."""

    class Silent(StaticCache):
        def begin(self, n_new: int) -> Step:
            capacity = self.spec.capacity
            if self.length < capacity:
                return super().begin(n_new)
            self._begun = n_new
            step = self._make_step(capacity - n_new, n_new)
            slots = [slot(self.length + i, capacity) for i in range(n_new)]
            return replace(step, slots=torch.tensor(slots), q_pos=step.q_pos + 1)

    return Silent


class DropsSilently(full_silently(lambda number, capacity: capacity - 1)):  # type: ignore[misc]
    """Assigns to a slice after the end, which stores nothing."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if self.length < self.spec.capacity:
            return super().write(layer, k, v, step)
        return self._keys[layer], self._values[layer]


def overflow(name: str, make: Any, model: str, seen_in: str = "") -> Mutant:
    """A planted bug that no error stops at the token beyond the capacity."""
    return Mutant(
        f"a token too many {name}", make, model=model, bug_class=15, seen_in=seen_in,
        scenario="overflow", step=3,
    )  # fmt: skip


SLOTS = (
    Mutant(
        "the whole buffer is attended", partial(masked(whole_buffer, StaticCache), block=ALL),
        bug_class=14, seen_in="transformers #30400", layer=0, part=SEEN,
        hint=contents.EmptySlots.hint,
    ),
    Mutant(
        "the whole block is attended", masked(whole_buffer, StaticCache),
        model="seq2seq", bug_class=14, seen_in="transformers #30400", scenario="chunks", layer=0,
        part=SEEN, hint=contents.EmptyBlock.hint,
    ),
    Mutant(
        "one empty slot is attended", masked(one_more, StaticCache),
        model="sinusoidal", bug_class=14, layer=0, part=SEEN, hint=contents.OneEmptySlot.hint,
    ),
    Mutant(
        "NaN in unwritten slots", NaNBehind,
        model="learned", bug_class=14, scenario="growth", layer=0, part="attention output",
        hint=NOT_A_NUMBER,
    ),
    Mutant(
        "growing copies nothing", GrowsEmpty,
        bug_class=14, scenario="growth", step=4, layer=0, part=KEYS,
        hint=contents.LostInGrowth.hint,
    ),
    Mutant(
        "the last slot is shared", LastSlotShared,
        model="rotary, one KV head", bug_class=14, scenario="capacity", step=6, layer=0, part=KEYS,
        hint="",
    ),
    overflow("wraps", full_silently(lambda n, capacity: n % capacity), "rotary",
             "transformers #1749"),
    overflow("is clamped", full_silently(lambda n, capacity: capacity - 1), "learned",
             "transformers #39593"),
    overflow("is dropped", DropsSilently, "seq2seq"),
    Mutant(
        "full one token too early", FullTooEarly,
        bug_class=15, scenario="capacity", verdict="error", step=6,
    ),
    Mutant(
        "stored one slot too low", SlotBefore, layer=0, part=KEYS, hint=contents.SlotBefore.hint,
    ),
)  # fmt: skip
