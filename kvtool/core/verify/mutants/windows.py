"""Planted bugs of classes 8 to 11: windows, rings and eviction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.kernels.masks import mask_tensor, visible
from kvtool.core.verify.diagnosis.hypotheses import positions, rollback, windows
from kvtool.core.verify.mutants.mutant import DirectSession, Mutant
from kvtool.errors import CacheOpUnsupported

SEEN = "visible keys"


class Ring(DynamicCache):
    """The last `window` tokens, each in the slot number % window: right.

    A step of one token is written and then read, in the order of the slots; one of several is read
    beside what is held, and written then, for it may overwrite what its first tokens see.
    """

    def __init__(
        self, spec: CacheSpec, left_padding: Tensor | None = None, window: int = 6
    ) -> None:
        self.window = window
        super().__init__(spec, left_padding)

    def _first_columns(self) -> int:
        return self.window

    def _reserve(self, length: int) -> None:
        pass

    def _held(self, length: int) -> Tensor:
        """The position in each slot, in the order of slots, when `length` tokens were written."""
        slots = torch.arange(min(length, self.window), device=self.spec.device)
        return length - 1 - (length - 1 - slots) % self.window

    def _absolute(self, numbers: Tensor) -> Tensor:
        """Positions (B,n) of the tokens with these numbers."""
        padding = 0 if self.left_padding is None else self.left_padding[:, None]
        return numbers.expand(self.batch, -1) - padding

    def _make_step(self, start: int, n_new: int) -> Step:
        new = torch.arange(start, start + n_new, device=self.spec.device)
        held = self._held(start + 1) if n_new == 1 else torch.cat([self._held(start), new])
        q_pos, k_pos = self._absolute(new), self._absolute(held)
        free = n_new == 1 and self.left_padding is None
        mask = None if free else visible(q_pos, k_pos, self.window)
        return Step(q_pos, k_pos, new % self.window, mask, False, self.spec.kernels)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        held = min(self.length, self.window)
        pair = []
        for buffer, new in ((self._keys[layer], k), (self._values[layer], v)):
            whole = torch.cat([buffer[:, :, :held], new], dim=2)
            slots = self.slots(step)
            buffer[:, :, slots] = new[:, :, new.shape[2] - len(slots) :]
            pair.append(whole if k.shape[2] > 1 else buffer[:, :, : step.k_pos.shape[1]])
        return pair[0], pair[1]

    def crop(self, length: int) -> None:
        if length < self.length and self.length > self.window:
            raise CacheOpUnsupported("ring", f"crop to {length}", "it has overwritten older tokens")
        super().crop(length)

    def slots(self, step: Step) -> Tensor:
        """Where the last tokens of the step go, as many as fit."""
        return step.slots[-self.window :]

    def vacuous(self) -> str | None:
        return None if self.length > self.window else "the ring never wrapped"


class RingStoresFirst(Ring):
    """A step of several tokens is written before it is read, so early queries miss old keys."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        k_pos = self._absolute(self._held(start + n_new))
        return replace(step, k_pos=k_pos, mask=visible(step.q_pos, k_pos, self.window))

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        super().write(layer, k, v, step)
        n = step.k_pos.shape[1]
        return self._keys[layer][:, :, :n], self._values[layer][:, :, :n]


class RingPromptAtZero(Ring):
    """The end of a long prompt is stored from slot 0 on, whatever its positions."""

    def slots(self, step: Step) -> Tensor:
        slots = super().slots(step)
        return slots if self.length else torch.arange(len(slots), device=slots.device)


class RingCropsLength(Ring):
    """Takes tokens back by its length alone, although they have overwritten older ones."""

    def crop(self, length: int) -> None:
        Cache.crop(self, length)


class RingHeld(Ring):
    """The position of a token is the number of keys held."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        return replace(step, q_pos=step.q_pos - max(start - self.window, 0))


class RingSlot(Ring):
    """The position of a token is its slot."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        return replace(step, q_pos=step.q_pos % self.window)


class SlidingHeld(SlidingCache):
    """The position of a token is the number of columns handed out before it."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        excess = start - (step.k_pos.shape[1] - n_new)
        return replace(step, q_pos=step.q_pos - excess)


class KeepsTooFew(SlidingCache):
    """Has room for one token less than its window."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(spec, left_padding, window=5, sinks=0)
        self.window = 6


class CropsBlindly(SlidingCache):
    """Goes back although what the next token sees has been evicted."""

    def crop(self, length: int) -> None:
        BufferedCache.crop(self, length)
        self._first = min(self._first, length)


class CropsNothing(SlidingCache):
    """A method that is there because the interface has it."""

    def crop(self, length: int) -> None:
        pass


def windowed(rule: Callable[[SlidingCache, Step, int], Tensor | None], **sizes: int) -> Any:
    """A sliding cache with another mask: rule(cache, step, tokens held)."""

    class Windowed(SlidingCache):
        def _make_step(self, start: int, n_new: int) -> Step:
            step = super()._make_step(start, n_new)
            return replace(step, mask=rule(self, step, start), causal=False)

    return partial(Windowed, **{"window": 6, "sinks": 2, **sizes})  # type: ignore[arg-type]


def other(window: int, sinks: int) -> Callable[[SlidingCache, Step, int], Tensor]:
    """The mask of another window."""
    return lambda cache, step, held: visible(step.q_pos, step.k_pos, window, sinks)


def fast_path(cache: SlidingCache, step: Step, held: int) -> Tensor | None:
    """No mask in steps of one token."""
    return None if step.q_pos.shape[1] == 1 else mask_tensor(step.mask)


def behind_prompt(cache: SlidingCache, step: Step, held: int) -> Tensor | None:
    """No window after the prompt."""
    return visible(step.q_pos, step.k_pos) if held else mask_tensor(step.mask)


def in_chunks(cache: SlidingCache, step: Step, held: int) -> Tensor | None:
    """No window in steps of several tokens."""
    return visible(step.q_pos, step.k_pos) if step.q_pos.shape[1] > 1 else mask_tensor(step.mask)


ALL = 256  # tokens: nothing is evicted, so that the mask alone makes the window

WINDOWS = (
    Mutant(
        "window one too wide", windowed(other(7, 2), slack=1),
        bug_class=8, seen_in="executorch #21857", scenario="token-by-token", step=8, layer=0,
        part=SEEN, hint=windows.WiderWindow.hint,
    ),
    Mutant(
        "window one too narrow", windowed(other(5, 0), sinks=0),
        model="learned", bug_class=8, seen_in="executorch #21857", scenario="one-then-chunks",
        step=2, layer=0, part=SEEN, hint=windows.NarrowerWindow.hint,
    ),
    Mutant(
        "window dropped on the fast path", windowed(fast_path, slack=ALL),
        model="rotary, one KV head", bug_class=8, seen_in="mlx-lm #390", scenario="window",
        layer=0, part=SEEN, hint=windows.NoWindowSingly.hint,
    ),
    Mutant(
        "window dropped after the prompt", windowed(behind_prompt, slack=ALL),
        model="sinusoidal", bug_class=8, seen_in="mlx-lm #390", scenario="chunks", layer=0,
        part=SEEN, hint=windows.NoWindow.hint,
    ),
    Mutant(
        "window dropped in the prompt", windowed(in_chunks, slack=ALL),
        bug_class=8, step=0, layer=0, part=SEEN, hint=windows.NoWindowInPrompt.hint,
    ),
    Mutant(
        "sinks not seen", windowed(other(6, 0)),
        bug_class=8, step=0, layer=0, part=SEEN, hint=windows.SinksLost.hint,
    ),
    Mutant(
        "evicts one too many", KeepsTooFew,
        model="seq2seq", bug_class=8, scenario="window", layer=0, part=SEEN,
        hint=windows.KeptTooFew.hint,
    ),
    Mutant(
        "ring stores a chunk before reading", partial(RingStoresFirst, window=12),
        bug_class=9, seen_in="transformers #47708", scenario="chunks", layer=0, part=SEEN,
        hint=windows.StoredFirst.hint,
    ),
    Mutant(
        "ring puts a prompt at slot 0", RingPromptAtZero,
        model="learned", bug_class=9, seen_in="litgpt #2215", layer=0, part="stored K",
        hint=windows.PromptAtSlotZero.hint,
    ),
    Mutant(
        "position = number of keys held", RingHeld,
        model="learned", bug_class=10, seen_in="llama.cpp #4097", layer=0,
        part="attention input", hint=positions.HeldRows.hint,
    ),
    Mutant(
        "position = keys held, rotary", partial(SlidingHeld, window=6, sinks=2),
        bug_class=10, seen_in="llama.cpp #4097", layer=0, part="queries",
        hint=positions.HeldRowsBefore.hint,
    ),
    Mutant(
        "position = slot in the ring", RingSlot,
        model="sinusoidal", bug_class=10, scenario="token-by-token", step=6, layer=0,
        part="attention input", hint=positions.WithinWindow.hint,
    ),
    Mutant(
        "wrapped ring cropped by length", RingCropsLength,
        bug_class=11, seen_in="mlx-lm #1512", scenario="crop", step=5, layer=0, part="stored K",
        hint=rollback.RingCropped.hint,
    ),
    Mutant(
        "cropped to where keys are evicted", partial(CropsBlindly, window=6, sinks=0),
        model="rotary, one KV head", bug_class=11, seen_in="mlx-lm #1512", scenario="crop", step=5,
        layer=0, part=SEEN, hint=rollback.EvictedBeforeCrop.hint,
    ),
    Mutant(
        "crop of a window does nothing", partial(CropsNothing, window=6, sinks=0), DirectSession,
        model="learned", bug_class=11, seen_in="ollama #14912", scenario="crop", step=5, layer=0,
        part="attention input", hint=rollback.CropIgnored.hint,
    ),
)  # fmt: skip
