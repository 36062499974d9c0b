"""The default kernels, and the interface of all kernels: layers that see one token, and attention.

The rounding of these two depends on shapes. Models and caches call both through the `Kernels` of a
`Step`. So the same model can run with PyTorch's kernels, or with others whose results do not depend
on shapes. Elementwise operations need no kernels: IEEE 754 fixes their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import registry
from kvtool.core.kernels.cudnn import CUDNN
from kvtool.core.kernels.masks import LazyMask
from kvtool.core.kernels.query_blocks import QueryBlock
from kvtool.core.native import arrays as native
from kvtool.core.native import few_queries, fused, prompts

Layer = Callable[[Tensor], Tensor]

PRODUCTS_UP_TO = 96  # keys; the scores of more do not fit into a CPU's cache at once
SERIAL_FROM = 1024  # keys; from here on, two products are faster on a GPU than fused float32


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention by its formula in float64 (Vaswani 2017, eq. 1), as a reference for tests.

    Shapes as `Kernels.attention`; the result is float64.
    """
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return reference_weights(q, k, mask, causal) @ v


def reference_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, cap: float = 0.0
) -> Tensor:
    """The weights of `reference_attention`: (B,H,T,S) float64; shapes and cap as
    `Kernels.attention`."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5  # (B,H,T,S)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


class Kernels(Protocol):
    """How layers are applied to tokens, and how attention is computed."""

    @property
    def name(self) -> str:
        """What they are called in registry.KERNELS."""

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """Apply layers that compute each token alone, one after another: (B,T,in) -> (B,T,out)."""

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        """q (B,H,T,D), k and v (B,Hkv,S,D), mask (1 or B,1,T,S) bool, True = attend -> (B,H,T,D).

        A LazyMask stands for a large mask: `attention_by_blocks` makes it for a few queries at a
        time. With `causal`, query i sees keys 0 to i, and T must equal S. cap: scores s are bounded
        to cap tanh(s / cap); 0: they are not. Raises ValueError if T is not S.
        """


class DefaultKernels:
    """PyTorch's own kernels: fast, but the order of their sums depends on the shapes."""

    name = "default"

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """Apply each layer to all tokens at once: (B,T,in) -> (B,T,out)."""
        for layer in layers:
            x = layer(x)
        return x

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        """`Kernels.attention` by the first of these routes that applies:

        1. capped: scores that are bounded, by products
        2. blocks: a LazyMask, some queries at a time
        3. native: few queries on a CPU, without gradients, in compiled code
        4. prompt: whole prompts, causal, likewise
        5. fused: training on a CPU, forward and backward in compiled code
        6. one query by products: on a GPU, with a mask or many float32 keys
        7. SDPA without cuDNN: other calls on a GPU, without gradients
        8. products: training in bfloat16 on a CPU with few keys
        9. float32: the same with more keys, by these routes again
        10. one query in float32: a half format on a CPU where native code cannot be used
        11. SDPA: all other calls
        """
        few = q.shape[2] == 1 or q.shape[0] * q.shape[2] <= native.MAX_STEP_TOKENS
        if k.dtype is not q.dtype and (cap or not (few and few_queries.can_attend(q, k, v, None))):
            # Codes stand for numbers of float32, also where the model is of a half format.
            return self.attention(q.to(k.dtype), k, v, mask, causal, cap).to(q.dtype)
        if cap:
            return capped_attention(q, k, v, mask, causal, cap)
        if isinstance(mask, LazyMask):
            return attention_by_blocks(self.attention, q, k, v, mask, merges=_can_merge(q))
        # is_causal aligns the mask at the top left: right only when T == S (pytorch #144858).
        if causal and q.shape[2] != k.shape[2]:
            raise ValueError(f"causal needs as many queries as keys ({q.shape[2]}, {k.shape[2]})")
        if few and few_queries.can_attend(q, k, v, mask):
            return few_queries.attention(q, k, v, mask, causal)
        if causal and prompts.can_attend(q, k, v):
            return prompts.attention(q, k, v)
        if fused.can_fuse_attention(q, k, v):
            return fused.attention(q, k, v, mask, causal)
        if q.is_cuda and not (torch.is_grad_enabled() or native.is_intercepted()):
            if _is_serial(q, k, mask):
                return attention_of_one(q, k, v, mask)
            with CUDNN.off():
                return sdpa(q, k, v, mask, causal)
        if q.is_cpu and q.dtype.itemsize < 4:
            if q.requires_grad and q.dtype is torch.bfloat16:
                if k.shape[2] <= PRODUCTS_UP_TO:
                    return attention_by_products(q, k, v, mask, causal)
                return self._in_float32(q, k, v, mask, causal)
            if q.shape[2] == 1:
                return self._one_query(q, k, v, mask)
        return sdpa(q, k, v, mask, causal)

    def _in_float32(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """`attention` of bfloat16 computed in float32 -> bfloat16; for many keys `products` would
        take 3 times as long (docs/training.md)."""
        with torch.autocast("cpu", enabled=False):  # it would cast back to bfloat16
            return self.attention(q.float(), k.float(), v.float(), mask, causal).bfloat16()

    def _one_query(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`attention` of one query in a half format, computed in float32 -> the half format.

        PyTorch's own kernel takes 2 to 4 times as long for one query. It goes row by row, since
        float32 copies of all rows would be too large for the allocator to reuse their memory.
        """
        found = []
        for row in range(q.shape[0]):
            query, keys, values = (x[row : row + 1].float() for x in (q, k, v))
            seen = None if mask is None else mask[row % mask.shape[0]][None]
            found.append(self.attention(query, keys, values, seen, False))
        return torch.cat(found).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """PyTorch's scaled_dot_product_attention; shapes as `Kernels.attention`."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def _is_serial(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch would read the keys of a head one after another on a GPU, and
    `attention_of_one` can be used in its place."""
    serial = mask is not None or (q.dtype.itemsize >= 4 and k.shape[2] >= SERIAL_FROM)
    return q.shape[2] == 1 and serial and not torch.is_autocast_enabled("cuda")


def attention_of_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query on a GPU by two products, which divide the keys among all processors.

    Shapes as `Kernels.attention`; scores are float32 or wider. With a mask, or in float32, the
    kernel of PyTorch reads the keys of a head one after another. In float32 with 12 heads on an
    H200 it takes 51 µs for 384 keys and 969 µs for 8,192; this function takes 14 and 37 µs
    (docs/performance.md).
    """
    batch, n_heads, _, width = q.shape
    queries = q.reshape(batch * k.shape[1], -1, width)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (B*Hkv,S,D)
    if q.dtype.itemsize < 4 and q.is_cuda:
        scores = torch.bmm(queries, keys.mT, out_dtype=torch.float32)
    else:
        scores = queries @ keys.mT
    scores = (scores * width**-0.5).view(batch, n_heads, -1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        hidden = ~mask[:, 0]
        # A row that sees no key gives zeros, as in PyTorch's attention.
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    weights = weights.to(v.dtype).view(len(keys), -1, k.shape[2])
    return (weights @ values).view(batch, n_heads, 1, width)


def attention_by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention as two batched products with a float32 softmax between them (Vaswani 2017, eq. 1).

    Shapes as `Kernels.attention`. It serves training in bfloat16 on a CPU with few keys, where the
    backward pass of PyTorch's fused attention takes 2 to 8 times as long (docs/training.md).
    """
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B,H,T,S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


QUERIES = 256  # of a causal pass whose scores are held at once


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | LazyMask | None, causal: bool, cap: float
) -> Tensor:
    """Attention whose scores s are bounded to cap tanh(s / cap), by products, in float32 at least.

    Shapes as `Kernels.attention`; no fused attention of PyTorch bounds scores (Gemma 2, arXiv
    2408.00118).
    """
    if isinstance(mask, LazyMask):
        return attention_by_blocks(partial(_capped, cap=cap), q, k, v, mask)
    if not causal:
        return _capped(q, k, v, mask, False, cap)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"causal needs as many queries as keys ({q.shape[2]}, {k.shape[2]})")
    found = []
    for first in range(0, q.shape[2], QUERIES):
        queries = q[:, :, first : first + QUERIES]
        end = first + queries.shape[2]
        seen = torch.ones(queries.shape[2], end, dtype=torch.bool, device=q.device).tril(first)
        found.append(_capped(queries, k[:, :, :end], v[:, :, :end], seen, False, cap))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, cap: float
) -> Tensor:
    """`capped_attention` of queries whose scores can be held at once; `causal` is not asked for."""
    batch, n_heads, n_queries, width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(wide).reshape(batch, k.shape[1], -1, width) * width**-0.5
    scores = cap * (queries @ k.to(wide).mT / cap).tanh()
    scores = scores.view(batch, n_heads, n_queries, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).view(batch, k.shape[1], -1, k.shape[2])
    return (weights @ v.to(wide)).view(batch, n_heads, n_queries, -1).to(q.dtype)


@dataclass(frozen=True)
class CappedKernels:
    """Kernels that bound every score, for the layers of a model that asks for it."""

    kernels: Kernels
    cap: float

    @property
    def name(self) -> str:
        """That of the kernels within."""
        return self.kernels.name

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """As the kernels within."""
        return self.kernels.per_token(x, *layers)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | LazyMask | None,
        causal: bool,
        cap: float = 0.0,
    ) -> Tensor:
        """As the kernels within, with the cap."""
        return self.kernels.attention(q, k, v, mask, causal, self.cap)


def capped(kernels: Kernels, cap: float) -> Kernels:
    """The same kernels, where attention bounds scores s to cap tanh(s / cap)."""
    return CappedKernels(kernels, cap) if cap else kernels


Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool], Tensor]


def attention_by_blocks(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, merges: bool = False
) -> Tensor:
    """`Kernels.attention` with a large mask, for one block of queries at a time.

    attention: computes a block, with a tensor as its mask. merges: read the columns that a whole
    block sees without a mask, apart from the others.
    """
    batch, n_heads, n, width = q.shape
    y = q.new_empty(batch, n, n_heads, width).transpose(1, 2)
    for block in mask.blocks:
        queries, columns = block.queries, block.columns
        if merges and block.masked:
            _merge(q, k, v, mask, block, y)
            continue
        keys, values = (columns_of(x, columns) for x in (k, v))
        here = mask.mask(queries, columns)
        y[:, :, queries] = attention(q[:, :, queries], keys, values, here, False)
    return y


def columns_of(x: Tensor, columns: slice | Tensor) -> Tensor:
    """The given columns of x (B,H,S,D) -> (B,H,n,D); a view if they are a slice."""
    return x[:, :, columns] if isinstance(columns, slice) else x.index_select(2, columns)


# PyTorch's attention on a CPU; it also returns the log-sum-exp of each softmax.
FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _can_merge(q: Tensor) -> bool:
    """Whether `_merge` can attend with these queries."""
    return FLASH is not None and q.is_cpu and not (torch.is_grad_enabled() and q.requires_grad)


def _merge(q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, block: QueryBlock, y: Tensor) -> None:
    """Write the attention of a block to y (B,H,T,D).

    It attends to the columns that the whole block sees and to the others apart, and weights the two
    results by their shares of the softmax's sum (Dao 2022, arXiv 2205.14135, 3.1).
    """
    assert FLASH is not None
    common, total = FLASH(q[:, :, block.queries], k[:, :, block.shared], v[:, :, block.shared])
    for queries, columns in block.masked:
        hidden = ~mask.mask(queries, columns)
        bias = q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        keys, values = (columns_of(x, columns) for x in (k, v))
        own, total_own = FLASH(q[:, :, queries], keys, values, attn_mask=bias)
        first = block.queries.start
        here = slice(queries.start - first, queries.stop - first)
        weight = torch.sigmoid(total[:, :, here] - total_own)[..., None]
        shared = common[:, :, here].to(weight.dtype)
        y[:, :, queries] = torch.lerp(own.to(weight.dtype), shared, weight)


DEFAULT = DefaultKernels()


def make_kernels(name: str) -> Kernels:
    """The registered kernels called `name`. Raises UsageError for an unknown name."""
    registry.choose(name, tuple(registry.KERNELS), "--kernels")
    return registry.load(registry.KERNELS, name)()
