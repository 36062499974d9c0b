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
from torch import Tensor, nn
from torch.autograd import forward_ad

Array = NDArray[Any]
ArrayLayer = Callable[[Array], Array]  # (n,in) -> (n,out), each row by itself

FEW = 8  # rows; PyTorch is faster for many more
LARGE = 2**18  # weights of a layer; to share fewer among threads gains little
PAYS = 1000  # tokens to decode; loading takes 0.4 s, and a token gains 0.3 to 0.5 ms

_allowed = True


@cache
def _kernels() -> ModuleType | None:
    """The compiled functions; None where numba does not work, beside a newer NumPy for example."""
    threads = torch.get_num_threads()
    try:
        kernels = importlib.import_module("kvtool.core.numba_kernels")
        one = np.ones((1, 1), np.float32)
        kernels.product(one, one, one[0], one.copy(), 1, LARGE)  # whether it compiles and loads
    except Exception:  # of numba, of LLVM, of a file that it kept: PyTorch does all without it
        return None
    finally:
        torch.set_num_threads(threads)  # numba starts its own, and OpenMP takes that for PyTorch's
    return kernels


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
    """Whether native code is there, and `numpy_can_read` these tensors."""
    return _allowed and numpy_can_read(first, *others) and _kernels() is not None


def numpy_can_read(first: Tensor, *others: Tensor | None) -> bool:
    """Whether arrays can stand for these tensors, and may: what is done to arrays is missed by
    gradients, by a compiler, and by a mode that watches or replaces what PyTorch does."""
    if first.dtype not in (torch.float32, torch.float64):
        return False
    graded = torch.is_grad_enabled()
    for x in (first, *others):
        if x is not None and (
            x.dtype is not first.dtype
            or not x.is_cpu
            or (graded and x.requires_grad)
            or type(x) not in (Tensor, nn.Parameter)
        ):
            return False
    return not watched()


def watched() -> bool:
    """Whether something would miss what PyTorch does not do: a compiler, a tracer, autocast, a
    mode, a transform of functions, forward derivatives."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def can_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` can do it: with queries and keys, and a mask as `Kernels` has it."""
    sizes = k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    masked = mask is None or (
        mask.dtype is torch.bool and (mask.shape[1], mask.shape[3]) == (1, k.shape[2])
    )
    return sizes and masked and bool(q.numel() and k.numel()) and can_read(q, k, v)


def array(tensor: Tensor) -> Array:
    """A tensor's memory as an array; a copy if it is not dense."""
    return tensor.detach().contiguous().numpy()


def on_tensor(layer: ArrayLayer, x: Tensor) -> Tensor:
    """A layer of arrays applied to (...,in) -> (...,out)."""
    y = layer(array(x).reshape(x.numel() // x.shape[-1], x.shape[-1]))
    return torch.from_numpy(y).view(*x.shape[:-1], y.shape[1])


class Weights(NamedTuple):
    """Of a linear layer: weight (out,in), bias (out,) or (0,)"""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Weights:
        _require_width(weight, bias)
        return cls(array(weight), _or_empty(bias, weight))


class Norm(NamedTuple):
    """Of a LayerNorm, which is centred, or of an RMSNorm: scale (d,), shift (d,) or (0,)"""

    centred: bool
    scale: Array
    shift: Array
    eps: float

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor | None, eps: float, centred: bool) -> Norm:
        _require_width(scale, shift)
        return cls(centred, array(scale), _or_empty(shift, scale), eps)


def _require_width(weight: Tensor, bias: Tensor | None) -> None:
    """Compiled functions trust the shapes that they are given. Raises ValueError."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weights of {len(weight)} outputs have a bias of shape {tuple(bias.shape)}"
        )


def _require_input(x: Array, width: int) -> None:
    if x.ndim != 2 or x.shape[1] != width or not x.flags.c_contiguous:
        raise ValueError(f"a layer of {width} inputs was given {x.shape}, or no dense array")


def _or_empty(bias: Tensor | None, weight: Tensor) -> Array:
    return array(weight.new_empty(0) if bias is None else bias)


def linear(weights: Weights) -> ArrayLayer:
    """`F.linear`. Large weights are shared by as many threads as PyTorch has."""
    kernel, (n_out, n_in) = _loaded().product, weights.weight.shape

    def layer(x: Array) -> Array:
        _require_input(x, n_in)
        y = np.empty((len(x), n_out), x.dtype)
        kernel(x, *weights, y, _threads(weights), LARGE)
        return y

    return layer


def normalised(norm: Norm) -> ArrayLayer:
    """`F.layer_norm` or `F.rms_norm` over the last dimension."""
    kernel, width = _loaded().normalise, len(norm.scale)

    def layer(x: Array) -> Array:
        _require_input(x, width)
        y = np.empty_like(x)
        kernel(x, *norm, y)
        return y

    return layer


def activation(name: str) -> ArrayLayer:
    """The activation of a feed-forward network, by its name in a ModelConfig; swiglu (n,2d) ->
    (n,d)."""
    kernel, number = _loaded().activate, _loaded().ACTIVATIONS[name]
    parts = 1 + (name == "swiglu")

    def layer(x: Array) -> Array:
        y = np.empty((len(x), x.shape[1] // parts), x.dtype)
        kernel(number, x, y)
        return y

    return layer


def normed_linear(norm: Norm, weights: Weights) -> ArrayLayer:
    """`normalised` and then `linear`, in one call."""
    kernel, (n_out, n_in) = _loaded().normed_linear, weights.weight.shape
    _require_input(norm.scale[None], n_in)

    def layer(x: Array) -> Array:
        _require_input(x, n_in)
        y = np.empty((len(x), n_out), x.dtype)
        kernel(x, *norm, *weights, y, _threads(weights), LARGE)
        return y

    return layer


def normed_network(norm: Norm, up: Weights, name: str, down: Weights) -> ArrayLayer:
    """`normalised` and then a feed-forward network with that activation, in one call."""
    kernel, number = _loaded().normed_network, _loaded().ACTIVATIONS[name]
    (n_wide, n_in), n_out = up.weight.shape, len(down.weight)
    _require_input(norm.scale[None], n_in)
    _require_input(down.weight, n_wide // (1 + (name == "swiglu")))

    def layer(x: Array) -> Array:
        _require_input(x, n_in)
        y = np.empty((len(x), n_out), x.dtype)
        kernel(x, *norm, *up, number, *down, y, _threads(up, down), LARGE)
        return y

    return layer


def _threads(*layers: Weights) -> int:
    """How many threads share the large ones of these layers: as many as PyTorch has."""
    if all(weights.weight.size < LARGE for weights in layers):
        return 1
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
        size = self.memory.itemsize
        shape = n_heads, int(numbers[-1]) + 1, width
        strides = self.head * size, width * size, size
        whole = np.ndarray(
            shape, self.memory.dtype, self.memory.data, row * self.row * size, strides
        )
        return whole.take(numbers, axis=1)


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
