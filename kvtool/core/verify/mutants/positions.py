"""Planted bugs of classes 1 to 4: tokens that stand at wrong positions."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.models.rope import Rotary
from kvtool.core.verify.diagnosis.hypotheses import contents, positions
from kvtool.core.verify.mutants.mutant import SIZES, Mutant, moved, stepping

EMBEDDED, ROTATED = "attention input", "queries"  # where added and rotary positions first show


class CountsSteps(DynamicCache):
    """Counts the steps after the prompt where it should count their tokens."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        if not start:
            self._next = n_new
            return step
        self._next += 1
        return replace(step, q_pos=step.q_pos - start + self._next - 1)


def late(step: Step, held: int) -> Step:
    """The length is read when the cache has advanced it already."""
    return replace(step, q_pos=step.q_pos + step.q_pos.shape[1])


def from_length(step: Step, held: int) -> Step:
    """The prompt's positions come from the mask, those of later tokens from the length."""
    return replace(step, q_pos=step.slots.expand_as(step.q_pos)) if held else step


class Rotating(DynamicCache):
    """A cache that rotates keys, although it is given rotated ones."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(spec, left_padding)
        self.rotary = Rotary(SIZES["context"], spec.head_dim, 10_000.0)


class RotatesOnRead(Rotating):
    """Rotates all keys again whenever they are read."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        return (self.rotary(keys, step.k_pos) if self.length else keys), values


class RotatesThePast(Rotating):
    """Rotates the keys of earlier steps again whenever they are read."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        n = self.length
        past = self.rotary(keys[:, :, :n], step.k_pos[:, :n])
        return torch.cat([past, keys[:, :, n:]], dim=2), values


class RotatesInPlace(Rotating):
    """What was rotated for reading is stored: each step turns it further."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        past = self._keys[layer][:, :, : self.length]
        past.copy_(self.rotary(past, step.k_pos[:, : self.length]))
        return super().write(layer, k, v, step)


POSITIONS = (
    Mutant(
        "positions restart in each step", moved(lambda pos, held: pos - held),
        bug_class=1, seen_in="nanoVLM #71", layer=0, part=ROTATED,
        hint=positions.NotAdvanced.hint,
    ),
    Mutant(
        "positions restart, added ones", moved(lambda pos, held: pos - held, StaticCache),
        model="learned", bug_class=1, seen_in="executorch #2010", scenario="token-by-token",
        layer=0, part=EMBEDDED, hint=positions.NotAdvanced.hint,
    ),
    Mutant(
        "position counts steps", CountsSteps,
        model="sinusoidal", bug_class=1, seen_in="executorch #2010", scenario="chunks", step=2,
        layer=0, part=EMBEDDED, hint=positions.ByStep.hint,
    ),
    Mutant(
        "a chunk stands at one position",
        moved(lambda pos, held: pos[:, :1].expand_as(pos) if held else pos),
        model="rotary, one KV head", bug_class=1, scenario="one-then-chunks",
        layer=0, part=ROTATED, hint=positions.StepAtOnePlace.hint,
    ),
    Mutant(
        "position one too high", moved(lambda pos, held: pos + int(held > 0), StaticCache),
        bug_class=2, scenario="chunks", layer=0, part=ROTATED, hint=positions.OneTooFar.hint,
    ),
    Mutant(
        "position one too low", moved(lambda pos, held: pos - int(held > 0)),
        model="sinusoidal", bug_class=2, scenario="token-by-token",
        layer=0, part=EMBEDDED, hint=positions.OneTooNear.hint,
    ),
    Mutant(
        "length read after the step", stepping(late),
        bug_class=2, seen_in="mlx-lm #1396", scenario="chunks", layer=0, part=ROTATED,
        hint=positions.AfterAdvance.hint,
    ),
    Mutant(
        "length read late, seq2seq", stepping(late, StaticCache),
        model="seq2seq", bug_class=2, seen_in="mlx-lm #1396", scenario="chunks", step=0,
        layer=0, part=EMBEDDED, hint=positions.AfterAdvance.hint,
    ),
    Mutant(
        "all keys rotated on read", RotatesOnRead,
        bug_class=3, seen_in="gemma #368", layer=0, part="stored K",
        hint=contents.RotatedAgainAll.hint,
    ),
    Mutant(
        "past keys rotated on read", RotatesThePast,
        model="seq2seq, rotary", bug_class=3, seen_in="gemma #368", scenario="token-by-token",
        step=2, layer=0, part="stored K", hint=contents.RotatedAgain.hint,
    ),
    Mutant(
        "keys rotated in place", RotatesInPlace,
        model="rotary, one KV head", bug_class=3, seen_in="gpt-neox #363", scenario="chunks",
        layer=0, part="stored K", hint=contents.RotatedEachStep.hint,
    ),
    Mutant(
        "padding ignored by positions", stepping(from_length, StaticCache),
        bug_class=4, seen_in="unsloth #3795", scenario="padded", layer=0, part=ROTATED,
        hint=positions.PaddingIgnored.hint,
    ),
    Mutant(
        "padding ignored, added positions", stepping(from_length),
        model="learned", bug_class=4, seen_in="unsloth #3795", scenario="padded",
        layer=0, part=EMBEDDED, hint=positions.PaddingIgnored.hint,
    ),
    Mutant(
        "padding ignored from the start on", moved(lambda pos, held: pos - pos[:, :1] + held),
        model="sinusoidal", bug_class=4, scenario="padded", step=0, layer=0, part=EMBEDDED,
        hint=positions.PaddingIgnoredAlways.hint,
    ),
)  # fmt: skip
