"""A few tokens at a time through native code, where PyTorch is far from the speed of memory.

PyTorch's library multiplies one row by a matrix at a third of the speed at which a processor reads
the matrix, and four rows at half of it (docs/performance.md). So modules, the flat form of a step
and the exact kernels give such work to the functions of numba_kernels.py, where it can be done: on
a CPU, in float32 or float64, without gradients. All of them get the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtool.config import ACTIVATIONS

Array = NDArray[Any]
ArrayLayer = Callable[[Array], Array]  # (n,in) -> (n,out), each row by itself

FEW = 8  # rows; PyTorch is faster for many more
LARGE = 2**18  # weights of a layer; to share fewer among threads gains little
PAYS = 1000  # tokens to decode; loading takes 0.4 s, and a token gains 0.3 to 0.5 ms

_allowed = True


@cache
def _kernels() -> ModuleType | None:
    """The compiled functions; None where numba does not load, beside a newer NumPy for example."""
    try:
        return importlib.import_module("kvtool.core.numba_kernels")
    except ImportError:
        return None


@contextmanager
def where_it_pays(n_tokens: int) -> Iterator[None]:
    """For a command that decodes about `n_tokens`: without native code if loading it would take
    longer than is gained."""
    global _allowed
    before, _allowed = _allowed, n_tokens >= PAYS
    try:
        yield
    finally:
        _allowed = before


def serves(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x (...,in) holds few tokens, and `can_read` them and the parameters."""
    return x.numel() <= FEW * x.shape[-1] and can_read(x, *parameters)


def can_read(first: Tensor, *others: Tensor | None) -> bool:
    """Whether native code can work on these tensors, and may: it would be missed by gradients, by
    a compiler, and by a mode that watches or replaces what PyTorch does."""
    if not _allowed or first.dtype not in (torch.float32, torch.float64):
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


class Weights(NamedTuple):
    """Of a linear layer: weight (out,in), bias (out,) or (0,)"""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Weights:
        return cls(array(weight), _or_empty(bias, weight))


class Norm(NamedTuple):
    """Of a LayerNorm, which is centred, or of an RMSNorm: scale (d,), shift (d,) or (0,)"""

    centred: bool
    scale: Array
    shift: Array
    eps: float

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor | None, eps: float, centred: bool) -> Norm:
        return cls(centred, array(scale), _or_empty(shift, scale), eps)


def _or_empty(bias: Tensor | None, weight: Tensor) -> Array:
    return array(weight.new_empty(0) if bias is None else bias)


def linear(weights: Weights) -> ArrayLayer:
    """`F.linear`. Large weights are shared by as many threads as PyTorch has."""
    kernel, n_out = _loaded().product, len(weights.weight)

    def layer(x: Array) -> Array:
        y = np.empty((len(x), n_out), x.dtype)
        kernel(x, *weights, y, _threads(), LARGE)
        return y

    return layer


def normalised(norm: Norm) -> ArrayLayer:
    """`F.layer_norm` or `F.rms_norm` over the last dimension."""
    kernel = _loaded().normalise

    def layer(x: Array) -> Array:
        y = np.empty_like(x)
        kernel(x, *norm, y)
        return y

    return layer


def activation(name: str) -> ArrayLayer:
    """The activation of a feed-forward network, by its name in a ModelConfig; swiglu (n,2d) ->
    (n,d)."""
    kernel, number, parts = _loaded().activate, ACTIVATIONS.index(name), 1 + (name == "swiglu")

    def layer(x: Array) -> Array:
        y = np.empty((len(x), x.shape[1] // parts), x.dtype)
        kernel(number, x, y)
        return y

    return layer


def normed_linear(norm: Norm, weights: Weights) -> ArrayLayer:
    """`normalised` and then `linear`, in one call."""
    kernel, n_out = _loaded().normed_linear, len(weights.weight)

    def layer(x: Array) -> Array:
        y = np.empty((len(x), n_out), x.dtype)
        kernel(x, *norm, *weights, y, _threads(), LARGE)
        return y

    return layer


def normed_network(norm: Norm, up: Weights, name: str, down: Weights) -> ArrayLayer:
    """`normalised` and then a feed-forward network with that activation, in one call."""
    kernel, number = _loaded().normed_network, ACTIVATIONS.index(name)

    def layer(x: Array) -> Array:
        y = np.empty_like(x)
        kernel(x, *norm, *up, number, *down, y, _threads(), LARGE)
        return y

    return layer


def _threads() -> int:
    """How many threads may share a layer: as many as PyTorch has."""
    n = torch.get_num_threads()
    return n if n == 1 else _loaded().use_threads(n)


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
    kernel, y = _loaded().attend, np.empty(q.shape, q.dtype)
    for row in range(len(q)):
        memory: tuple[Any, ...] = k.memory, row * k.row, k.head, v.memory, row * v.row, v.head
        if mask is not None:
            memory, n_keys = _seen(k, v, row, n_groups, q.shape[2], mask[row % len(mask)])
        kernel(np.ascontiguousarray(q[row]), *memory, n_groups, n_keys, y[row])
    return y


def _seen(
    k: Stored, v: Stored, row: int, n_groups: int, width: int, mask: Tensor
) -> tuple[tuple[Any, ...], int]:
    """Where the keys and values are that mask (S,) lets a row see, and how many; copied if they do
    not follow one another."""
    numbers = np.flatnonzero(mask.numpy())
    n = len(numbers)
    first = int(numbers[0]) if n else 0
    if n and numbers[-1] - first + 1 != n:
        keys, values = (s.columns(row, n_groups, width, numbers).reshape(-1) for s in (k, v))
        return (keys, 0, n * width, values, 0, n * width), n
    k_at, v_at = (s.row * row + first * width for s in (k, v))
    return (k.memory, k_at, k.head, v.memory, v_at, v.head), n


def _loaded() -> ModuleType:
    kernels = _kernels()
    assert kernels is not None, "ask can_read() first"
    return kernels
