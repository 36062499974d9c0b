"""The two kinds of work whose rounding depends on shapes: layers that see one token, and attention.

Models and caches reach both through one `Kernels` object that travels in the `Step`, so the same
model can run with PyTorch's kernels or with others whose results do not depend on shapes. Adding,
multiplying and casting elements need no kernels: IEEE 754 fixes their every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import registry
from kvtool.core.kernels.cudnn import CUDNN
from kvtool.core.kernels.masks import LazyMask
from kvtool.core.kernels.query_blocks import QueryBlock
from kvtool.core.native import arrays as native
from kvtool.core.native import fused

Layer = Callable[[Tensor], Tensor]

PRODUCTS_UP_TO = 96  # keys; the scores of more, all at once, do not fit into a processor's cache
SERIAL_FROM = 1024  # keys; on a GPU, fused attention in float32 takes longer than two products


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention from its formula in float64 (Vaswani 2017, eq. 1), for tests to compare with.

    Shapes as `Kernels.attention`; the result is float64.
    """
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return reference_weights(q, k, mask, causal) @ v


def reference_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The weights of that attention, how much each query takes of each key: (B,H,T,S), float64."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.mT / q.shape[-1] ** 0.5  # (B,H,T,S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


class Kernels(Protocol):
    """How layers are applied to tokens, and how an attention is computed."""

    name: str

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """Apply layers that look at one token each, one after another: (B,T,in) -> (B,T,out)"""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | LazyMask | None, causal: bool
    ) -> Tensor:
        """(B,H,T,D), (B,Hkv,S,D), (B,Hkv,S,D), (B,1,T,S) bool or None -> (B,H,T,D)

        A LazyMask stands for a mask that would be large: `attention_by_blocks` makes it for a few
        queries at a time.
        """


class DefaultKernels:
    """PyTorch's own kernels: fast, and rounded in an order that depends on the shapes."""

    name = "default"

    def per_token(self, x: Tensor, *layers: Layer) -> Tensor:
        """Each layer over all tokens at once, (B,T,in) -> (B,T,out)."""
        for layer in layers:
            x = layer(x)
        return x

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | LazyMask | None, causal: bool
    ) -> Tensor:
        """As `Kernels.attention`, by the first of these routes that applies:

        1. blocks: a LazyMask, some queries at a time
        2. native: few queries on a CPU, without gradients, in compiled code
        3. fused: training on a CPU, forward and backward in compiled code
        4. one query by products: on a GPU, with a mask or many float32 keys
        5. SDPA without cuDNN: all else on a GPU, without gradients
        6. products: training in bfloat16 on a CPU with few keys
        7. float32: the same with more keys, by these routes again
        8. one query in float32: in a half format on a CPU where native code cannot be used
        9. SDPA: everything else
        """
        few = q.shape[2] == 1 or q.shape[0] * q.shape[2] <= native.FEW
        if k.dtype is not q.dtype and not (few and native.can_attend(q, k, v, None)):
            # Codes stand for numbers of float32, also where the model is of a half format.
            return self.attention(q.to(k.dtype), k, v, mask, causal).to(q.dtype)
        if isinstance(mask, LazyMask):
            return attention_by_blocks(self.attention, q, k, v, mask, merges=_can_merge(q))
        # is_causal aligns the mask at the top left: right only when T == S (pytorch #144858).
        if causal and q.shape[2] != k.shape[2]:
            raise ValueError(f"causal needs as many queries as keys ({q.shape[2]}, {k.shape[2]})")
        if few and native.can_attend(q, k, v, mask):
            return native.attention(q, k, v, mask, causal)
        if fused.attends(q, k, v):
            return fused.attention(q, k, v, mask, causal)
        if q.is_cuda and not (torch.is_grad_enabled() or native.watched()):
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
        """bfloat16 in and out; many keys by products take 3 times as long (docs/training.md)."""
        with torch.autocast("cpu", enabled=False):  # or they become bfloat16 again
            return self.attention(q.float(), k.float(), v.float(), mask, causal).bfloat16()

    def _one_query(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Half formats in and out; PyTorch's own kernel takes 2 to 4 times as long for one query.

        Row by row: copies of all rows would soon be too large for memory that is used again.
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
    """Whether PyTorch would read a head's keys one after another on a GPU, and `attention_of_one`
    can do it."""
    serial = mask is not None or (q.dtype.itemsize >= 4 and k.shape[2] >= SERIAL_FROM)
    return q.shape[2] == 1 and serial and not torch.is_autocast_enabled("cuda")


def attention_of_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query, on a GPU, by products that share its keys among all processors.

    Shapes as `Kernels.attention`; scores are float32 at least. With a mask, or in float32, PyTorch
    has a kernel in which a head's keys are read one after another: at 384 and 8,192 keys of 12
    heads, 51 and 969 µs in float32 on an H200, where this takes 14 and 37 (docs/performance.md).
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
        # A row that sees nothing gives zeros, as it does in PyTorch's attention.
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
    weights = weights.to(v.dtype).view(len(keys), -1, k.shape[2])
    return (weights @ values).view(batch, n_heads, 1, width)


def attention_by_products(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention as two batched products with a float32 softmax between (Vaswani 2017, eq. 1).

    Shapes as `Kernels.attention`. To train in bfloat16 on a CPU with few keys: the backward pass of
    PyTorch's fused attention takes 2 to 8 times as long there (docs/training.md).
    """
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B,H,T,S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool], Tensor]


def attention_by_blocks(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, merges: bool = False
) -> Tensor:
    """`Kernels.attention` where the mask would be large, a block of queries at a time.

    merges: the columns that a whole block sees are read apart from the others, without a mask.
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
    """Those columns of (B,H,S,D), a view if they are a slice."""
    return x[:, :, columns] if isinstance(columns, slice) else x.index_select(2, columns)


# PyTorch's attention on a CPU, which also gives the log-sum-exp of each softmax.
FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _can_merge(q: Tensor) -> bool:
    """Whether `_merge` can attend with these queries."""
    return FLASH is not None and q.is_cpu and not (torch.is_grad_enabled() and q.requires_grad)


def _merge(q: Tensor, k: Tensor, v: Tensor, mask: LazyMask, block: QueryBlock, y: Tensor) -> None:
    """Attention of a block over the columns that all of it sees, and over the others, each weighted
    by its share in the softmax's sum (Dao 2022, arXiv 2205.14135, 3.1) -> y (B,H,T,D)"""
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
    """The registered kernels of that name. Raises UsageError for an unknown one."""
    registry.choose(name, tuple(registry.KERNELS), "--kernels")
    return registry.load(registry.KERNELS, name)()
