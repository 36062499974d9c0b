"""Planted bugs: where each is planted, where it must show, and the expected report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.cache import Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.kernels.masks import mask_tensor
from kvtool.core.models import Model, build_model
from kvtool.core.verify.diagnosis.doctor import examine
from kvtool.core.verify.judge import Doctor
from kvtool.core.verify.model_subject import Make, ModelSession, ModelSubject
from kvtool.core.verify.schedules import BRIEF
from kvtool.core.verify.subject import Session, Start
from kvtool.core.verify.target.doctor import Examiner
from kvtool.core.verify.target.subject import TargetSubject

# Kinds of bugs that happened in caches of other projects; `Mutant.seen_in` names where.
BUG_CLASSES = {
    1: "the position is not advanced after a step",
    2: "positions are off by one, or by a step",
    3: "stored keys are rotated again",
    4: "positions ignore left padding",
    5: "the padding mask is forgotten after the prompt",
    6: "the causal mask is aligned top-left where there are more keys than queries",
    7: "a step of several tokens has no causal mask once there is a past",
    8: "the window is off by one, or dropped in some steps",
    9: "a ring overwrites keys that are still needed",
    10: "after eviction the position is the number of keys held",
    11: "a wrapped ring is cropped wrongly",
    12: "a crop takes a wrong number of tokens, or acts on some layers only",
    13: "reset leaves something behind",
    14: "slots that hold nothing, or something old, are attended",
    15: "a token beyond the capacity is accepted",
    16: "forks share their storage",
    17: "rows are reordered not at all, on the wrong axis, or in part",
    18: "a source's keys and values outlive it, or its padding is attended",
    19: "rows of a batch read each other",
    20: "what is saved and loaded is not all that was held",
    21: "a request takes what an earlier one left",
    22: "an id, a repeat or a run is treated in another way",
    23: "steps or prompts of some sizes alone are wrong",
    24: "wrong from some length on, or at some boundary alone",
}
SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "d_ff": 24,
    "context": 256,
}
SOURCE: dict[str, Any] = {"n_encoder_layers": 1, "source_vocab_size": 19}
MODELS: dict[str, dict[str, Any]] = {
    "sinusoidal": {},  # as many key-value heads as heads
    "learned": {"positions": "learned", "n_kv_heads": 1, "tied": False, "bias": False},
    "rotary": {"positions": "rotary", "n_kv_heads": 2, "norm": "rmsnorm"},
    "rotary, one KV head": {"positions": "rotary", "n_kv_heads": 1, "activation": "swiglu"},
    "rotary, three KV heads": {"positions": "rotary", "d_model": 24, "n_heads": 6, "n_kv_heads": 3},
    "seq2seq": SOURCE,
    "seq2seq, rotary": {**SOURCE, "positions": "rotary", "n_kv_heads": 2},
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Model:
    """The small model of that name, with the same random weights each time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build_model(ModelConfig(**{**SIZES, **MODELS[name]})).to(dtype).eval()


@dataclass(frozen=True)
class Planted:
    """A cache, kernels or a way of decoding, and the small model that it is tried on."""

    name: str
    make: Make = DynamicCache
    session: Callable[[ModelSubject, Start], Session] = ModelSession
    kernels: Kernels = DEFAULT
    model: str = "rotary"
    dtype: torch.dtype = torch.float32
    decoder: Callable[[], Any] | None = None  # a user's, in place of the model and its cache

    def subject(self) -> Any:
        """The small model, or the user's decoder, with what is planted."""
        if self.decoder is not None:
            found = TargetSubject(self.decoder(), self.name)
            found.reach, found.level = found.context, BRIEF  # whatever time that takes
            return found
        model = build(self.model, self.dtype)
        return ModelSubject(model, self.make, self.name, self.kernels, self.session)

    @property
    def doctor(self) -> Doctor:
        """The doctor that diagnoses the bug."""
        return examine if self.decoder is None else Examiner()


@dataclass(frozen=True)
class Mutant(Planted):
    """A bug, planted the way that it happened, and what the check must say of it."""

    bug_class: int = 0  # of BUG_CLASSES; 0: none of them
    seen_in: str = ""
    scenario: str = "decode"
    verdict: str = "bug"
    step: int | None = 1  # the first that is wrong
    layer: int | None = None
    part: str = ""
    hint: str | None = None  # a bug that it must name; "": it knows none; None: no hint is due

    @property
    def due_doctor(self) -> Doctor | None:
        """The doctor for the expected diagnosis; None: no diagnosis is expected."""
        return self.doctor if self.part or self.hint is not None else None


@dataclass(frozen=True)
class Lookalike(Planted):
    """Right, although it looks suspicious: the check must not report it.

    scenarios: those that it is tried in; none: all.
    """

    why: str = ""
    verdict: str = ""  # that some scenario must give; "": any that is right
    scenarios: tuple[str, ...] = ()
    spare: int = 0  # positions of the model that it needs beside those of the tokens

    def subject(self) -> ModelSubject:
        """The small model with what is planted."""
        found = super().subject()
        found.context -= self.spare
        found.reach = min(found.reach, found.context)
        return found


# The ways in which most of them are planted


Change = Callable[[Step, int], Step]


def stepping(change: Change, base: type[BufferedCache] = DynamicCache) -> type[BufferedCache]:
    """A cache whose steps are changed; `change` gets the step and the number of held tokens."""

    class Changed(base):  # type: ignore[misc, valid-type]
        def _make_step(self, start: int, n_new: int) -> Step:
            return change(super()._make_step(start, n_new), start)

    return Changed


def moved(places: Callable[[Tensor, int], Tensor], base: type[BufferedCache] = DynamicCache) -> Any:
    """A cache whose tokens stand at other positions: places(q_pos (B,T), tokens held)."""
    return stepping(lambda step, held: replace(step, q_pos=places(step.q_pos, held)), base)


def masked(rule: Callable[[Step], Tensor | None], base: type[BufferedCache] = DynamicCache) -> Any:
    """A cache whose steps after the first use another mask."""

    def change(step: Step, held: int) -> Step:
        return replace(step, mask=rule(step), causal=False) if held else step

    return stepping(change, base)


def seeing(
    rule: Callable[[Tensor, Tensor], Tensor], base: type[BufferedCache] = DynamicCache
) -> Any:
    """The same by positions: rule(q (B,1,T,1), k (B,1,1,S)) -> bool."""
    return masked(lambda step: rule(*sides(step)), base)


def sides(step: Step) -> tuple[Tensor, Tensor]:
    """The positions of a step's queries and keys, as (B,1,T,1) and (B,1,1,S)."""
    return step.q_pos[:, None, :, None], step.k_pos[:, None, None, :]


class DirectSession(ModelSession):
    """A decode loop that trusts the length of its cache."""

    def feed(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        step = self.cache.begin(n)
        logits = self.subject.model(ids, step, self.cache, self.source)
        self.cache.commit(n)
        return logits

    def crop(self, length: int) -> None:
        self.cache.crop(length)

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)


class LayerwiseCache(DynamicCache):
    """Each layer concatenates its own keys and values, and knows how many it has: right by itself,
    and made for being wrong in some layers only."""

    def reset(self, left_padding: Tensor | None = None) -> None:
        super().reset(left_padding)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if layer in self._held:
            keys, values = self._held[layer]
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        self._held[layer] = k, v
        return k, v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        keys, values = self.write(layer, k, v, step)
        n, extra, mask = k.shape[2], keys.shape[2] - step.k_pos.shape[1], mask_tensor(step.mask)
        if step.causal and extra:
            mask = torch.ones(n, n, dtype=torch.bool, device=k.device).tril()[None, None]
        if mask is not None and extra:  # what a layer has too much of comes first, and is seen
            ones = mask.new_ones(*mask.shape[:3], extra)
            mask = torch.cat([ones, mask], dim=3)
        return step.kernels.attention(q, keys, values, mask, step.causal and not extra)

    def crop(self, length: int) -> None:
        n_lost = self.length - length
        super().crop(length)
        for layer, pair in self._held.items():
            self._held[layer] = self.crop_layer(layer, pair, n_lost)

    def crop_layer(self, layer: int, pair: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
        """A layer without its last n tokens."""
        keys, values = (t[:, :, : t.shape[2] - n] for t in pair)
        return keys, values

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        for layer, (keys, values) in self._held.items():
            self._held[layer] = self.select_layer(layer, keys, values, rows)

    def select_layer(
        self, layer: int, keys: Tensor, values: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The histories of `rows` in a layer."""
        return keys[rows], values[rows]
