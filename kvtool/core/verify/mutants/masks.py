"""Planted bugs of classes 5 to 7: tokens that see too many keys or too few."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.cache import EMPTY, Step
from kvtool.core.cache.dynamic import DynamicCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.kernels.exact import EXACT
from kvtool.core.kernels.sight import whole
from kvtool.core.verify.diagnosis.hypotheses import masks
from kvtool.core.verify.mutants.mutant import Mutant, masked, seeing, sides, stepping

SEEN = "visible keys"


class IsCausal(DynamicCache):
    """Calls the kernel with is_causal=True in every step, which aligns at the top left."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        keys, values = self.write(layer, k, v, step)
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)


def not_causal(step: Step, held: int) -> Step:
    """No step has a mask, the prompt included."""
    return Step(step.q_pos, step.k_pos, step.slots, None, False, step.kernels)


def padding_lost_in_chunks(step: Step) -> Tensor | None:
    """The mask (B,1,n,S) of a step, without the padding if the step has several tokens."""
    q, k = sides(step)
    return whole(step.mask) if q.shape[2] == 1 else (k <= q) & (k > EMPTY)


MASKS = (
    Mutant(
        "padding mask dropped", seeing(lambda q, k: (k <= q) & (k > EMPTY)),
        model="sinusoidal", dtype=torch.bfloat16, bug_class=5, seen_in="mlx-lm #1384",
        scenario="padded", layer=0, part=SEEN, hint=masks.PaddingSeen.hint,
    ),
    Mutant(
        "padding mask dropped in chunks", masked(padding_lost_in_chunks, StaticCache),
        bug_class=5, seen_in="x-transformers #322", scenario="padded", step=4, layer=0, part=SEEN,
        hint=masks.PaddingSeenInChunks.hint,
    ),
    Mutant(
        "padding mask one column short", seeing(lambda q, k: (k <= q) & (k >= -1)),
        model="learned", bug_class=5, scenario="padded", layer=0, part=SEEN,
        hint=masks.OnePaddingSeen.hint,
    ),
    Mutant(
        "causal mask aligned top-left",
        seeing(lambda q, k: k <= q - q[:, :, :1]),
        bug_class=6, seen_in="pytorch #144858", layer=0, part=SEEN, hint=masks.TopLeft.hint,
    ),
    Mutant(
        "is_causal=True with a past", IsCausal,
        model="rotary, one KV head", bug_class=6, seen_in="llama #899", scenario="one-then-chunks",
        layer=0, part="attention output", hint=masks.TopLeft.hint,
    ),
    Mutant(
        "no causal mask with a past", masked(lambda step: None),
        model="rotary, one KV head", bug_class=7, seen_in="candle #3743",
        scenario="one-then-chunks", layer=0, part=SEEN, hint=masks.NoCausalMask.hint,
    ),
    Mutant(
        "no causal mask, seq2seq", seeing(lambda q, k: k > EMPTY, StaticCache),
        model="seq2seq", bug_class=7, seen_in="candle #3743", scenario="chunks", layer=0,
        part=SEEN, hint=masks.NoCausalMask.hint,
    ),
    Mutant(
        "no causal mask in the prompt", stepping(not_causal),
        model="learned", bug_class=7, step=0, layer=0, part=SEEN,
        hint=masks.NoCausalMaskAlways.hint,
    ),
    Mutant(
        "a token does not see itself", seeing(lambda q, k: (k < q) & (k > EMPTY)),
        layer=0, part=SEEN, hint=masks.NotItself.hint,
    ),
    Mutant(
        "a chunk does not see the past",
        seeing(lambda q, k: (k <= q) & (k >= q[:, :, :1]), StaticCache),
        model="sinusoidal", scenario="chunks", layer=0, part=SEEN, hint=masks.LastOnly.hint,
    ),
    Mutant(
        "the oldest key is not seen", seeing(lambda q, k: (k <= q) & (k > 0)), kernels=EXACT,
        layer=0, part=SEEN, hint=masks.OldestLost.hint,
    ),
)  # fmt: skip
