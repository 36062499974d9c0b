"""A few tokens at a time through native code, where PyTorch is far from the speed of memory.

PyTorch's library multiplies one row by a matrix at a third of the speed at which a processor reads
the matrix, and four rows at half of it (docs/performance.md). So modules, the flat form of a step
and the exact kernels give such work to the functions of numba_kernels.py, where it can be done: on
a CPU, in float32 or float64, without gradients. All of them get the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
ArrayLayer = Callable[[Array], Array]  # (n,in) -> (n,out), each row by itself

FEW = 4  # rows; PyTorch is faster for many more
LARGE = 2**18  # weights of a layer; to share fewer among threads gains little


@cache
def _kernels() -> ModuleType | None:
    """The compiled functions; None where numba does not load, beside a newer NumPy for example."""
    try:
        return importlib.import_module("kvtool.core.numba_kernels")
    except ImportError:
        return None


def serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x (...,in) holds few tokens, and `can_read` them and the parameters."""
    return x.numel() <= FEW * x.shape[-1] and can_read(x, *parameters)


def can_read(first: Tensor, *others: Tensor | None) -> bool:
    """Whether native code can work on these tensors, and may: it would be missed by gradients, by
    a compiler, and by a mode that watches or replaces what PyTorch does."""
    if first.dtype not in (torch.float32, torch.float64):
        return False
    graded = torch.is_grad_enabled()
    for x in (first, *others):
        if x is not None and (
            x.dtype is not first.dtype or not x.is_cpu or (graded and x.requires_grad)
        ):
            return False
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return not watched and _kernels() is not None


def array(tensor: Tensor) -> Array:
    """A tensor's memory as an array; a copy if it is not dense."""
    return tensor.detach().contiguous().numpy()


def on_tensor(layer: ArrayLayer, x: Tensor) -> Tensor:
    """A layer of arrays applied to (...,in) -> (...,out)."""
    return torch.from_numpy(layer(array(x).reshape(-1, x.shape[-1]))).view(*x.shape[:-1], -1)


def linear(weight: Tensor, bias: Tensor | None) -> ArrayLayer:
    """`F.linear`. Large weights are shared by as many threads as PyTorch has."""
    kernels = _loaded()
    w, b, n_out = array(weight), None if bias is None else array(bias), weight.shape[0]
    large = weight.numel() >= LARGE

    def layer(x: Array) -> Array:
        y = np.empty((x.shape[0], n_out), x.dtype)
        if large and (threads := torch.get_num_threads()) > 1:
            kernels.linear_by_threads(x, w, b, y, kernels.use_threads(threads))
        else:
            kernels.linear(x, w, b, y, 0, n_out)
        return y

    return layer


def layer_norm(scale: Tensor, shift: Tensor | None, eps: float) -> ArrayLayer:
    """`F.layer_norm` over the last dimension."""
    kernels = _loaded()
    a, b = array(scale), None if shift is None else array(shift)

    def layer(x: Array) -> Array:
        y = np.empty_like(x)
        kernels.layer_norm(x, a, b, eps, y)
        return y

    return layer


def rms_norm(scale: Tensor, eps: float) -> ArrayLayer:
    """`F.rms_norm` over the last dimension."""
    kernels, a = _loaded(), array(scale)

    def layer(x: Array) -> Array:
        y = np.empty_like(x)
        kernels.rms_norm(x, a, eps, y)
        return y

    return layer


def activation(name: str) -> ArrayLayer:
    """The activation of a feed-forward network, by its name in a ModelConfig; swiglu (n,2d) ->
    (n,d)."""
    kernels = _loaded()
    if name == "relu":
        return lambda x: np.maximum(x, 0)
    function, parts = getattr(kernels, name), 2 if name == "swiglu" else 1

    def layer(x: Array) -> Array:
        y = np.empty((x.shape[0], x.shape[1] // parts), x.dtype)
        function(x, y)
        return y

    return layer


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`Kernels.attention`, each query by itself over the keys that it sees, in their order."""
    queries, keys, values = q.detach().numpy(), Stored.of(k), Stored.of(v)
    found = []
    for i in range(q.shape[2]):
        seen = None if mask is None else mask[:, 0, i % mask.shape[2]]
        n_keys = i + 1 if causal else k.shape[2]
        found.append(attend(queries[:, :, i], keys, values, k.shape[1], n_keys, seen))
    return torch.from_numpy(np.stack(found, axis=2))


class Stored(NamedTuple):
    """Keys or values (B,H,S,D) as memory (n,) in which each (S,D) is dense."""

    memory: Array
    row: int  # how far one row begins behind the other
    head: int  # and one head

    @classmethod
    def of(cls, x: Tensor) -> Stored:
        """Copied only if a head's columns are not dense."""
        if x.stride()[2:] != (x.shape[3], 1):
            x = x.contiguous()
        row, head = x.stride()[:2]
        size = (x.shape[0] - 1) * row + (x.shape[1] - 1) * head + x.shape[2] * x.shape[3]
        return cls(x.as_strided((size,), (1,)).numpy(), row, head)

    def columns(self, row: int, n_heads: int, width: int, numbers: Array) -> Array:
        """A copy (n_heads, len(numbers), width) of some columns of a row."""
        at = row * self.row + numbers[:, None] * width + np.arange(width)
        return self.memory[np.arange(n_heads)[:, None, None] * self.head + at]


def attend(
    q: Array, k: Stored, v: Stored, n_groups: int, n_keys: int, mask: Tensor | None
) -> Array:
    """One query of each row and head, (B,H,D), over those of the first `n_keys` keys of `n_groups`
    heads that mask (B or 1,n_keys) lets it see -> (B,H,D), NaN where that is none."""
    kernel, y, width = _loaded().attend, np.empty_like(q), q.shape[2]
    first, masks = 0, None if mask is None else mask.numpy()
    for row in range(len(q)):
        at = [(s.memory, row * s.row, s.head) for s in (k, v)]
        if masks is not None:
            seen = np.flatnonzero(masks[row % len(masks)])
            n_keys, first = len(seen), seen[0] if len(seen) else 0
            if n_keys and seen[-1] - first + 1 != n_keys:  # they do not follow one another
                copies = (s.columns(row, n_groups, width, seen) for s in (k, v))
                at, first = [(c.reshape(-1), 0, n_keys * width) for c in copies], 0
        (keys, k_at, k_head), (values, v_at, v_head) = at
        k_at, v_at = k_at + first * width, v_at + first * width
        query = np.ascontiguousarray(q[row])
        kernel(query, keys, k_at, k_head, values, v_at, v_head, n_groups, n_keys, y[row])
    return y


def _loaded() -> ModuleType:
    kernels = _kernels()
    assert kernels is not None, "ask can_read() first"
    return kernels
