"""Kernels whose results do not depend on shapes: cached equals uncached, bit for bit.

PyTorch chooses the order of floating-point sums by the shape of the whole call. So a token gets
different bits alone than among others. Here only the model and the token's position decide how the
token is computed:

- `per_token`: each token goes through its layers alone, in native code. Where that cannot be used
  (core/native/arrays.py), it gets calls of its own in fresh memory.
- `attention`: each query attends to the keys that it sees, without masked ones. It does not matter
  whether the keys were just computed or come from a cache.

So by construction a token's logits are the same for every split of its sequence into steps, after
any padding and beside any other rows. This holds on one machine with one number of threads. A cache
must return its columns in the order of their positions. docs/exact.md gives the costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kvtool.core.kernels.default import Layer, attention_by_blocks
from kvtool.core.kernels.masks import LazyMask
from kvtool.core.native import arrays as native
from kvtool.core.native import few_queries

# Bytes. Fresh memory begins at multiples of it; elsewhere vector code may add in another order.
ALIGNMENT = 64
COLUMNS = 16  # of 4-byte numbers or wider fill whole units of ALIGNMENT, for any width of a head


class ExactKernels:
    """Kernels that compute one token and one query at a time; attention is float32 or wider."""

    name = "exact"

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """Apply all layers to each token alone: (B,T,in) -> (B,T,out)."""
        batch, n, width = x.shape
        if batch * n == 1:
            x = x.clone(memory_format=torch.contiguous_format)
            for layer in layers:
                x = layer(x)
            return x
        few = native.most_rows(x.dtype) if _by_token(layers) and native.can_read(x) else 1
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
        """`Kernels.attention`, computed for each query alone, over the keys that it sees."""
        if isinstance(mask, LazyMask):
            return attention_by_blocks(partial(self.attention, cap=cap), q, k, v, mask)
        batch, n_heads, n_queries, head_dim = q.shape
        n_kv_heads, n_keys = k.shape[1:3]
        if causal and n_queries != n_keys:
            raise ValueError(f"causal needs as many queries as keys ({n_queries}, {n_keys})")
        if not cap and few_queries.can_attend(q, k, v, mask):  # compiled code bounds no scores
            return few_queries.attention(q, k, v, mask, causal)
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
    """Whether all layers are kvtool's modules, unchanged: these pass a few tokens to native code,
    which computes each row alone."""
    owners = (getattr(layer, "__self__", layer) for layer in layers)
    return not torch.is_grad_enabled() and all(
        isinstance(owner, nn.Module) and all(map(_is_ours, owner.modules())) for owner in owners
    )


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is of a class with `by_token` and has its own forward: a subclass or a
    replaced method may compute something else."""
    return bool(vars(type(module)).get("by_token")) and "forward" not in vars(module)


def _attend(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """Attention of one scaled query for each head, q (Hkv,G,D), over k and v (Hkv,S,D) -> as q."""
    if not k.shape[1]:
        return q * float("nan")  # as the default kernels
    scores = torch.bmm(q, k.mT)
    if cap:
        scores = cap * (scores / cap).tanh()
    return torch.bmm(scores.softmax(-1), v)


def _columns(x: Tensor, seen: Tensor) -> Tensor:
    """The columns `seen` (n,), ascending, of x (H,S,D) -> (H,n,D); a view if they are the first."""
    n = len(seen)
    if not n or int(seen[-1]) == n - 1:
        return x[:, :n]
    return aligned(x[:, seen], x.dtype)


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (H,S,D) in `dtype`, with contiguous matrices (S,D) at multiples of ALIGNMENT.

    So the place of keys in memory does not change the bits. It copies only if it must.
    """
    x = x.to(dtype)
    matrix, row, column = x.stride()
    begins = (x.storage_offset() * x.itemsize, matrix * x.itemsize)
    if (row, column) == (x.shape[2], 1) and not any(at % ALIGNMENT for at in begins):
        return x
    n_heads, n, head_dim = x.shape
    return x.new_empty(n_heads, -(-n // COLUMNS) * COLUMNS, head_dim)[:, :n].copy_(x)


EXACT = ExactKernels()
