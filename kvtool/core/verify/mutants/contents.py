"""Planted bugs of no listed class: contents, formats, failures, checks that show nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvtool.core.cache import Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.none import NoCache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.kernels.masks import LazyMask
from kvtool.core.verify.diagnosis.hypotheses import contents
from kvtool.core.verify.mutants.mutant import Mutant

SEEN, KEYS, VALUES = "visible keys", "stored K", "stored V"
ALL = 256  # tokens: more than any scenario feeds


class LosesValue(DynamicCache):
    """The value of the third token never arrives."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        values = values.clone()
        if self.length > 2:
            values[:, :, 2] = 0.0
        return keys, values


class RollsWithinHead(DynamicCache):
    """The width of a head is rolled by one in the stored keys."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        return (keys.roll(1, dims=-1) if self.length else keys), values


class ReadsLayerZero(DynamicCache):
    """Past values are read from layer 0 in every layer."""

    part = "_values"

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = (t.clone() for t in super().write(layer, k, v, step))
        mixed = values if self.part == "_values" else keys
        mixed[:, :, : self.length] = getattr(self, self.part)[0][:, :, : self.length]
        return keys, values


class ReadsKeysOfLayerZero(ReadsLayerZero):
    """Every layer reads the past keys of layer 0."""

    part = "_keys"


class LastLayerNotStored(DynamicCache):
    """Only the prompt is ever stored in the last layer."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if layer == self.spec.n_layers - 1 and self.length > 0:
            keys, values = keys.clone(), values.clone()
            self._keys[layer][:, :, step.slots] = 0.0
            self._values[layer][:, :, step.slots] = 0.0
        return keys, values


class PromptOnly(DynamicCache):
    """Later tokens are read once, and are not there for those after them."""

    prompt = 0

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        self.prompt = n_new if start == 0 else self.prompt
        columns = torch.arange(start + n_new)
        lost = (columns >= self.prompt) & (columns < start)
        if not bool(lost.any()):
            return step
        mask = step.k_pos[:, None, None] <= step.q_pos[:, None, :, None]
        return replace(step, mask=mask & ~lost)


class TilesHeads(DynamicCache):
    """Expands grouped heads by tiling, where each should stand beside itself."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        keys, values = self.write(layer, k, v, step)
        n = q.shape[1] // k.shape[1] if self.length else 1
        keys, values = keys.repeat(1, n, 1, 1), values.repeat(1, n, 1, 1)
        return step.kernels.attention(q, keys, values, step.mask, step.causal)


class StoresLower(DynamicCache):
    """Stores bfloat16 whatever the model computes in: an undeclared loss."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if not self.length:
            return keys, values
        return keys.bfloat16().to(k.dtype), values.bfloat16().to(v.dtype)


class WrongBelowFloat64(DynamicCache):
    """Is wrong in formats other than float64, as a kernel that serves them may be."""

    factor = 0.0

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k, v, step)
        if self.length > 11 and k.dtype != torch.float64:
            return keys * self.factor, values
        return keys, values


class NaNBelowFloat64(WrongBelowFloat64):
    """Gives NaN in formats other than float64."""

    factor = float("nan")


class Raises(DynamicCache):
    """Fails in the middle of a forward pass."""

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        if self.length == 13 and layer == 1:
            raise RuntimeError("expected a tensor of 4 dimensions")
        return super().write(layer, k, v, step)


class NeverUsed(NoCache):
    """A cache by its name: the whole sequence is computed again in each step."""

    stores = True  # says its user


class SeesAll(DefaultKernels):
    """A model whose attention is not causal, so that nothing may be cached."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        return super().attention(q, k, v, None, False, cap)


CONTENTS = (
    Mutant(
        "values of layer 0 in every layer", ReadsLayerZero,
        model="learned", layer=1, part=VALUES, hint=contents.FirstLayerValues.hint,
    ),
    Mutant(
        "keys of layer 0 in every layer", ReadsKeysOfLayerZero,
        model="sinusoidal", layer=1, part=KEYS, hint=contents.FirstLayerKeys.hint,
    ),
    Mutant(
        "the last layer is not stored", LastLayerNotStored,
        step=2, layer=1, part=KEYS, hint=contents.NotStoredLastLayer.hint,
    ),
    Mutant(
        "only the prompt is stored", PromptOnly, model="rotary, one KV head",
        step=2, layer=0, part=SEEN, hint=contents.NotStored.hint,
    ),
    Mutant(
        "grouped heads are tiled", TilesHeads, layer=0, part=KEYS, hint=contents.HeadsTiled.hint,
    ),
    Mutant("a value is lost", LosesValue, layer=0, part=VALUES, hint=""),
    Mutant("keys rolled within a head", RollsWithinHead, layer=0, part=KEYS, hint=""),
    Mutant("wrong in float32 alone", WrongBelowFloat64, step=2),
    Mutant("NaN in float32 alone", NaNBelowFloat64, step=2),
    Mutant("bfloat16 in a float32 model", StoresLower, verdict="precision"),
    Mutant("a step that raises", Raises, verdict="error", step=3),
    Mutant("a model that is not causal", kernels=SeesAll(), verdict="not-causal", step=0),
    Mutant("a cache that is never used", NeverUsed, verdict="vacuous", step=None),
    Mutant(
        "a window that never evicts", partial(SlidingCache, window=6, slack=ALL),
        verdict="vacuous", step=None,
    ),
)  # fmt: skip
