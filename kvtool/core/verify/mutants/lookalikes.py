"""Right caches that look suspicious: none of them may be reported."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.quantized import Int4Cache, Int8Cache
from kvtool.core.cache.sliding import SlidingCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.kernels.exact import EXACT
from kvtool.core.kernels.masks import LazyMask, mask_tensor
from kvtool.core.verify.model_subject import ModelSession
from kvtool.core.verify.mutants.mutant import LayerwiseCache, Lookalike, moved, stepping
from kvtool.core.verify.mutants.windows import Ring
from kvtool.core.verify.subject import Start


class BackToFront(DynamicCache):
    """Hands out its columns from the last to the first."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        keys, values = (t.flip(2) for t in self.write(layer, k, v, step))
        mask = mask_tensor(step.mask)
        if step.causal:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()[None, None]
        return step.kernels.attention(
            q, keys, values, None if mask is None else mask.flip(3), False
        )


class Unmasked(StaticCache):
    """Reads as far as it is filled, without a mask at steps of one token."""

    compilable = False

    def _reach(self, length: int) -> int:
        return length


class Garbage(StaticCache):
    """Large numbers stand in the slots that nothing was written to."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(spec, left_padding)
        for buffer in (*self._keys, *self._values):
            buffer.fill_(1e4)


class StoresHigher(DynamicCache):
    """Stores float32 under a model in bfloat16."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        higher = torch.promote_types(spec.dtype, torch.float32)
        super().__init__(replace(spec, dtype=higher), left_padding)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, k.to(self.spec.dtype), v.to(self.spec.dtype), step)
        return keys.to(k.dtype), values.to(v.dtype)


class SourceTwice(ModelSession):
    """Every key of the source is there twice, which changes no weighted mean."""

    def encode(self, start: Start) -> CrossCache | None:
        source = super().encode(start)
        if source is None:
            return None
        layers = [(k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)) for k, v in source.layers]
        return CrossCache(layers, source.mask.repeat(1, 2))


class LowSoftmax(DefaultKernels):
    """Attention with a softmax in float32, whatever the model computes in."""

    name = "float32 softmax"

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        mask = mask_tensor(mask)
        n = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
        scores = q @ k.mT * q.shape[3] ** -0.5
        if causal:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.float().softmax(-1).to(v.dtype) @ v


def padding_sees_more(step: Step, held: int) -> Step:
    """Padding tokens see more keys, which is no bug: their logits mean nothing."""
    mask = mask_tensor(step.mask)
    if mask is None:
        return step
    return replace(step, mask=mask | (step.q_pos < 0)[:, None, :, None])


LOOKALIKES = (
    Lookalike(
        "rotary positions shifted", moved(lambda pos, held: pos + 5), spare=5,
        why="rotary attention depends on differences of positions only",
    ),
    Lookalike(
        "rotary positions that count padding",
        stepping(lambda step, held: replace(step, q_pos=step.slots.expand_as(step.q_pos))),
        model="rotary, one KV head", why="padding shifts all positions of a row alike",
    ),
    Lookalike(
        "slots of a ring", Ring, model="learned", why="attention does not depend on their order",
    ),
    Lookalike(
        "columns from back to front", BackToFront, model="seq2seq",
        why="attention does not depend on their order",
    ),
    Lookalike(
        "no mask at one-token steps", Unmasked, why="the newest token sees all that is held",
    ),
    Lookalike(
        "a sliding window", partial(SlidingCache, window=6, sinks=2),
        why="it is compared under the same window",
    ),
    Lookalike(
        "a sliding window that can crop", partial(SlidingCache, window=5, sinks=0, slack=3),
        model="sinusoidal", why="it is compared under the same window",
    ),
    Lookalike(
        "keys and values in 4 bits", partial(Int4Cache, group=4, residual=2),
        why="it is compared with a pass that rounds the same way",
    ),
    Lookalike(
        "8 bits in bfloat16", partial(Int8Cache, group=4, residual=0, slack=4),
        model="seq2seq", dtype=torch.bfloat16,
        why="where a value lies between two codes, rounding chooses",
    ),
    Lookalike(
        "float32 softmax in bfloat16", kernels=LowSoftmax(), dtype=torch.bfloat16,
        why="both arms compute it so",
    ),
    Lookalike(
        "float32 softmax in float32", kernels=LowSoftmax(), model="sinusoidal",
        verdict="precision", why="both arms compute it so, in the float64 run too",
    ),
    Lookalike(
        "float32 storage in bfloat16", StoresHigher, dtype=torch.bfloat16,
        why="it loses nothing",
    ),
    Lookalike(
        "exact kernels", StaticCache, kernels=EXACT, verdict="identical",
        why="both arms round alike",
    ),
    Lookalike(
        "another block size", partial(StaticCache, block=5), model="learned",
        why="columns that hold nothing are masked",
    ),
    Lookalike(
        "large numbers in unwritten slots", Garbage, model="sinusoidal",
        why="columns that hold nothing are masked",
    ),
    Lookalike(
        "keys concatenated by layer", LayerwiseCache, model="seq2seq, rotary",
        why="each layer knows its own length",
    ),
    Lookalike(
        "padding tokens that see more", stepping(padding_sees_more), model="learned",
        why="nobody reads what padding answers",
    ),
    Lookalike(
        "every source key twice", session=SourceTwice, model="seq2seq",
        why="a weighted mean stays the same",
    ),
)  # fmt: skip
