"""Kernels whose results do not depend on shapes: cached equals uncached, bit for bit.

Floating point adds in an order that PyTorch chooses by the shape of the whole call, so a token gets
other bits alone than among others. Here every call has a shape that the model alone decides:

- `rows`: each token goes through its layers by itself, in fresh memory.
- `attention`: each query meets the keys that it sees, and no others, in blocks of `key_block`; the
  last block is padded and masked. First the maximum over all blocks (exact in any order), then the
  sums of the exponentials and of the values, block after block.

So a token's logits are the same in every split of its sequence into steps, behind any padding and
beside any other rows, by construction, on one machine with one number of threads. A cache must hand
out its columns in the order of their positions; docs/exact.md says what it costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.kernels import Layer

KEY_BLOCK = 256  # columns; docs/exact.md compares
ALIGNMENT = 64  # bytes; where fresh memory begins, and vector code may take another path elsewhere


class ExactKernels:
    """One token, one query and one block of keys at a time; attention in float32 or above."""

    name = "exact"

    def __init__(self, key_block: int = KEY_BLOCK) -> None:
        self.key_block = key_block

    def rows(self, x: Tensor, *layers: Layer) -> Tensor:
        batch, n, width = x.shape
        if batch * n == 1:
            x = x.clone(memory_format=torch.contiguous_format)
            for layer in layers:
                x = layer(x)
            return x
        found = []
        for token in x.reshape(batch * n, 1, 1, width).unbind():
            token = token.clone()
            for layer in layers:
                token = layer(token)
            found.append(token)
        return torch.cat(found).view(batch, n, -1)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        batch, n_heads, n_queries, head_dim = q.shape
        n_kv_heads, n_keys = k.shape[1:3]
        if causal and n_queries != n_keys:
            raise ValueError(f"causal needs as many queries as keys ({n_queries}, {n_keys})")
        queries = q.to(torch.promote_types(q.dtype, torch.float32)) * head_dim**-0.5
        found = []
        for row in range(batch):
            stored = self._blocks(k[row], queries.dtype), self._blocks(v[row], queries.dtype)
            for i in range(n_queries):
                query = queries[row, :, i].reshape(n_kv_heads, n_heads // n_kv_heads, head_dim)
                n_seen = i + 1 if causal else n_keys
                keys, values = stored
                if mask is not None:
                    seen = mask[row % mask.shape[0], 0, i % mask.shape[2]].nonzero()[:, 0]
                    n_seen = len(seen)
                    if n_seen and int(seen[-1]) >= n_seen:  # there are gaps
                        keys = self._blocks(k[row, :, seen], queries.dtype)
                        values = self._blocks(v[row, :, seen], queries.dtype)
                found.append(self._attend(query, keys, values, n_seen))
        y = torch.stack(found).view(batch, n_queries, n_heads, head_dim)
        return y.transpose(1, 2).to(q.dtype)

    def _blocks(self, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """(Hkv,S,D) -> blocks (Hkv,key_block,D), zeros at the end, laid out like fresh tensors."""
        blocks = []
        for block in x.split(self.key_block, dim=1):
            block = block.to(dtype)
            if missing := self.key_block - block.shape[1]:
                block = F.pad(block, (0, 0, 0, missing))
            if not _like_fresh(block):
                block = block.clone(memory_format=torch.contiguous_format)
            blocks.append(block)
        return blocks

    def _attend(self, q: Tensor, keys: list[Tensor], values: list[Tensor], n_seen: int) -> Tensor:
        """One query of each head, (Hkv,G,D) and scaled, over the first `n_seen` keys -> same."""
        if not n_seen:
            return q * float("nan")  # as the default kernels
        scores = []
        for start, key in zip(range(0, n_seen, self.key_block), keys, strict=False):
            score = torch.bmm(q, key.mT)  # (Hkv,G,key_block)
            if n_seen < start + self.key_block:
                score[..., n_seen - start :] = float("-inf")
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


def _like_fresh(block: Tensor) -> bool:
    """Whether each matrix of (N,S,D) is dense and begins where a fresh one might."""
    matrix, row, column = block.stride()
    begins = (block.storage_offset() * block.itemsize, matrix * block.itemsize)
    return (row, column) == (block.shape[2], 1) and not any(at % ALIGNMENT for at in begins)


EXACT = ExactKernels()
