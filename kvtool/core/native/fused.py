"""Fused parts of a training step: one pass over memory where PyTorch takes several.

They need a CPU, float32 or bfloat16, a context with `training`, and numba. The compiled loops are
in compiled/training.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvtool.core.native import arrays as native
from kvtool.core.native import compiling, context

MIN_NUMBERS = 2**14  # numbers; for fewer the 0.3 s of loading do not pay
MAX_KEYS = 24  # keys; for more, batched products of many heads are faster
CHANNELS_MULTIPLE = 16  # numbers of a head that are multiplied at once
DTYPES = torch.float32, torch.bfloat16


def can_fuse(x: Tensor, *others: Tensor) -> bool:
    """Whether fused code can be used for these tensors; the size of x decides if it pays."""
    return (
        context.current().training
        and torch.is_grad_enabled()
        and x.numel() >= MIN_NUMBERS
        and all(t.is_cpu and t.dtype in DTYPES for t in (x, *others))
        and _code() is not None
    )


@cache
def _code() -> ModuleType | None:
    def load() -> ModuleType:
        code = importlib.import_module("kvtool.core.native.compiled.training")
        compiling.load_all(code.forms(), "steps of training")
        return code

    return compiling.available(load)


def _compiled() -> ModuleType:
    code = _code()
    assert code is not None, "ask can_fuse() first"
    return code


def _threads() -> int:
    return min(torch.get_num_threads(), int(_compiled().MAX_THREADS))


def _rows(x: Tensor) -> native.Array:
    """(...,d) -> (n,d), bfloat16 as uint16"""
    return native.array(x).reshape(-1, x.shape[-1])


class DropoutMask(NamedTuple):
    """Which elements a dropout keeps; a hash of each element's index decides."""

    start: int  # index of the first element
    least: int  # an element is kept if its hash, an int32, is this or more
    scale: float  # factor of kept elements

    def keep_mask(self, x: Tensor) -> Tensor:
        """Which elements of x are kept, bool in the shape of x; as compiled.training.is_kept."""
        h = torch.arange(x.numel(), dtype=torch.int32, device=x.device).add_(_int32(self.start))
        h.bitwise_xor_(h >> 16 & 0xFFFF).mul_(0x7FEB352D)
        h.bitwise_xor_(h >> 15 & 0x1FFFF).mul_(_int32(0x846CA68B))
        return (h >= self.least).view(x.shape)


def _int32(x: int) -> int:
    """The int32 with the same 32 bits."""
    return (x + 2**31) % 2**32 - 2**31


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, mask: DropoutMask) -> Tensor:
        y = torch.empty_like(x if onto is None else onto, memory_format=torch.contiguous_format)
        ctx.mask, ctx.dtype, ctx.adds = mask, x.dtype, onto is not None
        _drop(x, onto, mask, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dx = torch.empty(dy.shape, dtype=ctx.dtype)
        _drop(dy, None, ctx.mask, dx)
        return dx, dy if ctx.adds else None, None


def _drop(x: Tensor, onto: Tensor | None, mask: DropoutMask, y: Tensor) -> None:
    added = x.new_empty(0, 1, dtype=torch.float32) if onto is None else onto
    _compiled().dropout(_rows(x), _rows(added), *mask, _rows(y), _threads())


def dropout(x: Tensor, onto: Tensor | None, mask: DropoutMask) -> Tensor:
    """x (...,d) after dropout, plus `onto` (...,d) if that is given -> (...,d).

    Ask `can_fuse` first. It has first derivatives only.
    """
    found: Tensor = _Dropout.apply(x, onto, mask)
    return found


class View(NamedTuple):
    """A part (B,H,T,D) of a base tensor; the heads of a token are adjacent in memory."""

    of: int  # index of the base tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    behind: int  # offset in numbers from the base's first

    def strided(self, bases: Sequence[Tensor]) -> tuple[int, int, int, int]:
        """The part's memory, as compiled.training.Strided."""
        base, (of_row, _, of_token, _) = bases[self.of], self.stride
        size = base.itemsize
        return base.data_ptr() + self.behind * size, of_row * size, of_token * size, self.shape[2]


class _Attention(torch.autograd.Function):
    """Attention as a function of the base tensors of q, k and v: so each base gets one gradient,
    and those of its parts need not be concatenated."""

    @staticmethod
    def forward(ctx: Any, seen: Tensor, views: Sequence[View], *bases: Tensor) -> Tensor:
        (batch, n_heads, n, width), (_, n_groups, n_keys, _) = (view.shape for view in views[:2])
        weights = torch.empty(batch, n_heads, n, n_keys)
        y = torch.empty(batch, n, n_heads, width, dtype=bases[0].dtype)
        ctx.views = views
        ctx.save_for_backward(weights, *bases)
        strided = (view.strided(bases) for view in views)
        result = _rows(y).reshape(y.shape)
        _compiled().attend(*strided, n_groups, seen.numpy(), weights.numpy(), result, _threads())
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weights, *bases = ctx.saved_tensors
        dy = _dense(dy)
        grads = [torch.empty_like(base) for base in bases]
        _compiled().attend_backward(
            View(0, dy.shape, dy.stride(), 0).strided((dy,)),
            *(view.strided(bases) for view in ctx.views),
            ctx.views[1].shape[1],
            weights.numpy(),
            _rows(dy[0, 0, :1])[0],
            *(view.strided(grads) for view in ctx.views),
            _threads(),
        )
        return None, None, *grads


def _dense(x: Tensor) -> Tensor:
    """x (B,H,T,D) stored contiguously as (B,T,H,D); a copy if it is not."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def can_fuse_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` can be used for q (B,H,T,D) and k, v (B,Hkv,S,D)."""
    fits = k.shape[2] <= MAX_KEYS and k.shape == v.shape and not k.shape[3] % CHANNELS_MULTIPLE
    return fits and q.dtype is k.dtype is v.dtype and can_fuse(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`Kernels.attention`, computed in float32. Ask `can_fuse_attention` first. It has first
    derivatives only."""
    n, n_keys = q.shape[2], k.shape[2]
    if mask is None or causal:
        seen = torch.ones(1, n, n_keys, dtype=torch.bool)
        seen = seen.tril() if causal else seen
    else:
        seen = mask[:, 0].expand(-1, n, n_keys).contiguous()
    parts: Sequence[Tensor] = (q, k, v)
    bases = _bases(parts)
    if not bases:
        bases = parts = [_dense(x) for x in parts]
    views = [_view(x, bases) for x in parts]
    found: Tensor = _Attention.apply(seen, views, *bases)
    return found


def _bases(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The contiguous base tensors of the parts (B,H,T,D), if the parts cover them completely and
    the heads of each token are adjacent; else none."""
    bases = list({id(x._base): x._base for x in parts if x._base is not None}.values())
    whole = sum(base.numel() for base in bases) == sum(x.numel() for x in parts)
    apart = len({x.data_ptr() for x in parts}) == len(parts)
    beside = all(x.stride()[1::2] == (x.shape[3], 1) and 0 not in x.stride() for x in parts)
    graded = all(base.is_contiguous() and base.requires_grad for base in bases)
    return bases if whole and apart and beside and graded else ()


def _view(x: Tensor, bases: Sequence[Tensor]) -> View:
    of = next(i for i, base in enumerate(bases) if base is x or base is x._base)
    behind = int(x.storage_offset() - bases[of].storage_offset())
    return View(of, x.shape, x.stride(), behind)
