"""The two kinds of work whose rounding depends on shapes: layers that see one token, and attention.

Models and caches reach both through one `Kernels` object that travels in the `Step`, so the same
model can run with PyTorch's kernels or with others whose results do not depend on shapes. Adding,
multiplying and casting elements need no kernels: IEEE 754 fixes their every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import registry
from kvtool.core.kernels.sight import Part, Sight
from kvtool.core.native import arrays as native
from kvtool.core.native import fused

Layer = Callable[[Tensor], Tensor]

SHORT = 96  # keys; the scores of more, all at once, no longer fit into a processor's cache
LONG = 1024  # keys; on a GPU, fused attention in float32 takes longer than launching products


class Kernels(Protocol):
    """How layers are applied to tokens, and how an attention is computed."""

    name: str

    def rows(self, x: Tensor, *layers: Layer) -> Tensor:
        """Apply layers that look at one token each, one after another: (B,T,in) -> (B,T,out)"""

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Sight | None, causal: bool
    ) -> Tensor:
        """(B,H,T,D), (B,Hkv,S,D), (B,Hkv,S,D), (B,1,T,S) bool or None -> (B,H,T,D)

        A Sight stands for a mask that would be large: `by_parts` makes it for a few queries at a
        time.
        """


class DefaultKernels:
    """PyTorch's own kernels: fast, and rounded in an order that depends on the shapes."""

    name = "default"

    def rows(self, x: Tensor, *layers: Layer) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Sight | None, causal: bool
    ) -> Tensor:
        if isinstance(mask, Sight):
            return by_parts(self.attention, q, k, v, mask, merges=_merges(q))
        # is_causal aligns the mask at the top left: right only when T == S (pytorch #144858).
        if causal and q.shape[2] != k.shape[2]:
            raise ValueError(f"causal needs as many queries as keys ({q.shape[2]}, {k.shape[2]})")
        few = q.shape[2] == 1 or q.shape[0] * q.shape[2] <= native.FEW
        if few and native.can_attend(q, k, v, mask):
            return native.attention(q, k, v, mask, causal)
        if fused.attends(q, k, v):
            return fused.attention(q, k, v, mask, causal)
        on_gpu = q.is_cuda and not (torch.is_grad_enabled() or native.watched())
        if on_gpu and _reads_slowly(q, k, mask):
            return attention_of_one(q, k, v, mask)
        grouped = q.shape[1] != k.shape[1]
        if q.dtype.itemsize < 4 and q.device.type == "cpu":
            if q.requires_grad and q.dtype is torch.bfloat16:
                if k.shape[2] <= SHORT:
                    return attention_by_products(q, k, v, mask, causal)
                q, k, v = q.float(), k.float(), v.float()
                with torch.autocast("cpu", enabled=False):  # or they become bfloat16 again
                    return self.attention(q, k, v, mask, causal).bfloat16()
            if q.shape[2] == 1:
                return self._one_query(q, k, v, mask)
        with PLANS.off() if on_gpu else nullcontext():
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )

    def _one_query(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """In float32: PyTorch's kernel for half formats takes 2 to 4 times as long for one query.

        Where native code cannot be used. Row by row, since copies of all rows
        would soon be too large for memory that is used again.
        """
        found = []
        for row in range(q.shape[0]):
            query, keys, values = (x[row : row + 1].float() for x in (q, k, v))
            seen = None if mask is None else mask[row % mask.shape[0]][None]
            found.append(self.attention(query, keys, values, seen, False))
        return torch.cat(found).to(q.dtype)


class Plans:
    """cuDNN's attention, which PyTorch may choose for half formats on a GPU: it plans anew for each
    number of keys, so that a token of a growing cache took 27 ms on an H200."""

    def __init__(self) -> None:
        self._lock, self._without, self._before = Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within, it is not chosen, unless all other fused attention has been turned off. The
        setting is the process's: it is as before when the last of several threads has left."""
        cuda = torch.backends.cuda
        with self._lock:
            if not self._without:
                self._before = cuda.cudnn_sdp_enabled()
                others = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()
                cuda.enable_cudnn_sdp(self._before and not others)
            self._without += 1
        try:
            yield
        finally:
            with self._lock:
                self._without -= 1
                if not self._without:
                    cuda.enable_cudnn_sdp(self._before)


PLANS = Plans()


def _reads_slowly(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether PyTorch's attention on a GPU is slower than `attention_of_one`, which can do it."""
    serial = mask is not None or (q.dtype.itemsize >= 4 and k.shape[2] >= LONG)
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


def by_parts(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, sight: Sight, merges: bool = False
) -> Tensor:
    """`Kernels.attention` where the mask would be large, some queries at a time.

    merges: the columns that all of them see are read without a mask, and apart from the others.
    """
    batch, n_heads, n, width = q.shape
    y = q.new_empty(batch, n, n_heads, width).transpose(1, 2)
    for part in sight.parts:
        if merges and part.edges:
            _merge(q, k, v, sight, part, y)
            continue
        mask = sight.mask(part.queries, part.columns)
        keys, values = (taken(x, part.columns) for x in (k, v))
        y[:, :, part.queries] = attention(q[:, :, part.queries], keys, values, mask, False)
    return y


def taken(x: Tensor, columns: slice | Tensor) -> Tensor:
    """Those columns of (B,H,S,D), a view if they are a stretch."""
    return x[:, :, columns] if isinstance(columns, slice) else x.index_select(2, columns)


# PyTorch's attention on a CPU, which tells the logarithm of the sum of each softmax as well.
FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def _merges(q: Tensor) -> bool:
    """Whether there is an attention that can be merged with another, for queries such as these."""
    return FLASH is not None and q.is_cpu and not (torch.is_grad_enabled() and q.requires_grad)


def _merge(q: Tensor, k: Tensor, v: Tensor, sight: Sight, part: Part, y: Tensor) -> None:
    """Attention over the columns that all queries of a part see, and over the others, each weighed
    by its part in the sum of the softmax (Dao 2022, arXiv 2205.14135, 3.1) -> y (B,H,T,D)"""
    assert FLASH is not None
    common, total = FLASH(q[:, :, part.queries], k[:, :, part.run], v[:, :, part.run])
    for queries, columns in part.edges:
        hidden = ~sight.mask(queries, columns)
        mask = q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        keys, values = (taken(x, columns) for x in (k, v))
        own, total_own = FLASH(q[:, :, queries], keys, values, attn_mask=mask)
        first = part.queries.start
        here = slice(queries.start - first, queries.stop - first)
        weight = torch.sigmoid(total[:, :, here] - total_own)[..., None]
        shared = common[:, :, here].to(weight.dtype)
        y[:, :, queries] = torch.lerp(own.to(weight.dtype), shared, weight)


DEFAULT = DefaultKernels()


def make_kernels(name: str) -> Kernels:
    """The registered kernels of that name. Raises UsageError for an unknown one."""
    registry.choose(name, tuple(registry.KERNELS), "--kernels")
    return registry.load(registry.KERNELS, name)()


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
