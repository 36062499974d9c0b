"""Kernels whose results do not depend on shapes: cached equals uncached, bit for bit.

Floating point adds in an order that PyTorch chooses by the shape of the whole call, so a token gets
other bits alone than among others. Here every call has one shape, whatever the sequence:

- `rows`: each token goes through its layers alone, as a fresh (1,1,in).
- `attention`: each query stands alone before blocks of KEY_BLOCK keys, counted from column 0; the
  last block is padded and masked. First the maximum over all blocks (exact in any order), then sums
  of exponentials and of values, added in the order of the blocks. A block that is masked as a whole
  adds zeros, so it does not matter how many of them follow.

By construction, then, a token's logits are those of any other split of the same batch into steps,
on one machine with one number of threads, for every cache whose columns stand in the order of
positions from one start. What is measured (tests/test_exact.py) and not constructed: attention
takes all rows of a batch in one call, and a row does not depend on how many there are.
docs/exact.md has what it costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.kernels import Layer

KEY_BLOCK = 256  # columns; 128 costs more from 300 tokens on, 512 more below
ALIGNMENT = 64  # bytes, of a fresh tensor on the CPU; vector code may take another path elsewhere


class ExactKernels:
    """One token, one query, one block of keys at a time; computes below float32 in float32."""

    name = "exact"

    def rows(self, x: Tensor, *layers: Layer) -> Tensor:
        batch, n, width = x.shape
        found = []
        for token in x.reshape(batch * n, 1, 1, width).unbind():
            token = token.clone()  # fresh memory, or it might be aligned in another way
            for layer in layers:
                token = layer(token)
            found.append(token)
        return found[0] if len(found) == 1 else torch.cat(found).view(batch, n, -1)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        n_queries, n_keys = q.shape[2], k.shape[2]
        if causal and n_queries != n_keys:
            raise ValueError(f"causal needs as many queries as keys ({n_queries}, {n_keys})")
        work = torch.promote_types(q.dtype, torch.float32)
        keys, values = _blocks(k, work), _blocks(v, work)
        if mask is not None:
            mask = F.pad(mask, (0, len(keys) * KEY_BLOCK - n_keys))  # with False
        scale = q.shape[3] ** -0.5
        found = []
        for i in range(n_queries):
            query = (q[:, :, i].to(work) * scale).reshape(*keys[0].shape[:1], -1, q.shape[3])
            seen = i + 1 if causal else n_keys  # columns; blocks behind them would add zeros
            row = None if mask is None else mask[:, 0, min(i, mask.shape[2] - 1)]
            found.append(_attend(query, keys, values, seen, row))
        return torch.stack(found, dim=2).view(q.shape).to(q.dtype)


def _blocks(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(B,Hkv,S,D) -> blocks (B*Hkv,KEY_BLOCK,D), each laid out as a fresh tensor; zeros behind."""
    blocks = []
    for block in x.split(KEY_BLOCK, dim=2):
        block = block.to(dtype)
        if missing := KEY_BLOCK - block.shape[2]:
            block = F.pad(block, (0, 0, 0, missing))
        block = block.flatten(0, 1)
        blocks.append(
            block if _aligned(block) else block.clone(memory_format=torch.contiguous_format)
        )
    return blocks


def _aligned(block: Tensor) -> bool:
    """Whether each matrix of (N,KEY_BLOCK,D) is dense and begins where a fresh one might."""
    matrix, row, column = block.stride()
    begins = (block.storage_offset() * block.itemsize, matrix * block.itemsize)
    return (row, column) == (block.shape[2], 1) and not any(b % ALIGNMENT for b in begins)


def _attend(
    q: Tensor, keys: list[Tensor], values: list[Tensor], seen: int, mask: Tensor | None
) -> Tensor:
    """One query of each head, (B*Hkv,G,D) and already scaled, over the first `seen` columns.

    mask (B,columns) bool or None -> (B*Hkv,G,D)
    """
    scores = []
    for block, key in enumerate(keys[: -(-seen // KEY_BLOCK)]):
        start = block * KEY_BLOCK
        score = torch.bmm(q, key.mT)
        if mask is not None:
            hidden = ~mask[:, start : start + KEY_BLOCK]
            score.view(mask.shape[0], -1, KEY_BLOCK).masked_fill_(hidden[:, None], float("-inf"))
        if seen < start + KEY_BLOCK:
            score[..., seen - start :] = float("-inf")
        scores.append(score)
    highest = scores[0].amax(-1, keepdim=True)
    for score in scores[1:]:
        highest = torch.maximum(highest, score.amax(-1, keepdim=True))
    total, weight = torch.zeros_like(q), torch.zeros_like(highest)
    for score, value in zip(scores, values, strict=False):
        shares = score.sub_(highest).exp_()
        total.baddbmm_(shares, value)
        weight += shares.sum(-1, keepdim=True)
    return total.div_(weight)


EXACT = ExactKernels()
