"""Kernels whose results do not depend on shapes: cached equals uncached, bit for bit.

Floating point adds in an order that PyTorch chooses by the shape of the whole call, so a token gets
other bits alone than among others. Here the model and a token's own position decide how it is
computed:

- `per_token`: each token goes through its layers by itself, in native code, or where that cannot
  be used (core/native/arrays.py) in calls of its own and in fresh memory.
- `attention`: each query attends to the keys that it sees, and to no masked ones, whether they were
  computed just now or come from a cache.

So a token's logits are the same in every split of its sequence into steps, after any padding and
beside any other rows, by construction, on one machine with one number of threads. A cache must hand
out its columns in the order of their positions; docs/exact.md says what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kvtool.core.kernels.default import Layer, attention_by_blocks
from kvtool.core.kernels.masks import LazyMask
from kvtool.core.native import arrays as native

# Bytes: fresh memory begins at such addresses; elsewhere vector code may take another path.
ALIGNMENT = 64
COLUMNS = 16  # of at least 4 bytes fill whole units of ALIGNMENT, however wide a head is


class ExactKernels:
    """One token and one query at a time; attention in float32 or above."""

    name = "exact"

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """Each token through all layers by itself, (B,T,in) -> (B,T,out)."""
        batch, n, width = x.shape
        if batch * n == 1:
            x = x.clone(memory_format=torch.contiguous_format)
            for layer in layers:
                x = layer(x)
            return x
        few = native.FEW if _by_token(layers) and native.can_read(x) else 1
        found = []
        for tokens in x.reshape(batch * n, 1, width).split(few):
            tokens = tokens.clone()
            for layer in layers:
                tokens = layer(tokens)
            found.append(tokens)
        return torch.cat(found).view(batch, n, -1)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        """As Kernels.attention, each query by itself over the keys that it sees."""
        if isinstance(mask, LazyMask):
            return attention_by_blocks(partial(self.attention, cap=cap), q, k, v, mask)
        batch, n_heads, n_queries, head_dim = q.shape
        n_kv_heads, n_keys = k.shape[1:3]
        if causal and n_queries != n_keys:
            raise ValueError(f"causal needs as many queries as keys ({n_queries}, {n_keys})")
        if not cap and native.can_attend(q, k, v, mask):  # compiled code bounds no scores
            return native.attention(q, k, v, mask, causal)
        queries = q.to(torch.promote_types(q.dtype, torch.float32)) * head_dim**-0.5
        found = []
        for row in range(batch):
            stored = aligned(k[row], queries.dtype), aligned(v[row], queries.dtype)
            for i in range(n_queries):
                query = queries[row, :, i].clone(memory_format=torch.contiguous_format)
                query = query.view(n_kv_heads, -1, head_dim)
                keys, values = stored
                if mask is not None:
                    seen = mask[row % mask.shape[0], 0, i % mask.shape[2]].nonzero()[:, 0]
                    keys, values = (_columns(x, seen) for x in stored)
                elif causal:
                    keys, values = keys[:, : i + 1], values[:, : i + 1]
                found.append(_attend(query, keys, values, cap))
        y = found[0] if len(found) == 1 else torch.stack(found)
        return y.view(batch, n_queries, n_heads, head_dim).transpose(1, 2).to(q.dtype)


def _by_token(layers: Sequence[Layer]) -> bool:
    """Whether all modules, and those within them, are ours and unchanged: those leave
    few tokens to native code, which treats each row by itself."""
    owners = (getattr(layer, "__self__", layer) for layer in layers)
    return not torch.is_grad_enabled() and all(
        isinstance(owner, nn.Module) and all(map(_is_ours, owner.modules())) for owner in owners
    )


def _is_ours(module: nn.Module) -> bool:
    """A subclass may do something else, as may a method that was put in."""
    return bool(vars(type(module)).get("by_token")) and "forward" not in vars(module)


def _attend(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """One query of each head, (Hkv,G,D) and scaled, over keys and values (Hkv,S,D) -> as q."""
    if not k.shape[1]:
        return q * float("nan")  # as the default kernels
    scores = torch.bmm(q, k.mT)
    if cap:
        scores = cap * (scores / cap).tanh()
    return torch.bmm(scores.softmax(-1), v)


def _columns(x: Tensor, seen: Tensor) -> Tensor:
    """Those columns of (H,S,D) whose numbers are `seen`, in ascending order, without a copy if they
    are the first ones."""
    n = len(seen)
    if not n or int(seen[-1]) == n - 1:
        return x[:, :n]
    return aligned(x[:, seen], x.dtype)


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(H,S,D) in `dtype` with dense matrices (S,D) that begin where fresh ones might, so that where
    keys stand in memory changes nothing; a copy only if need be."""
    x = x.to(dtype)
    matrix, row, column = x.stride()
    begins = (x.storage_offset() * x.itemsize, matrix * x.itemsize)
    if (row, column) == (x.shape[2], 1) and not any(at % ALIGNMENT for at in begins):
        return x
    n_heads, n, head_dim = x.shape
    return x.new_empty(n_heads, -(-n // COLUMNS) * COLUMNS, head_dim)[:, :n].copy_(x)


EXACT = ExactKernels()
