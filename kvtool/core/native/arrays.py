"""Native code for a few tokens at a time, where PyTorch does not reach the memory bandwidth.

PyTorch multiplies one row by a matrix at a third of the memory bandwidth, and four rows at half of
it (docs/performance.md). So modules and exact kernels pass such work to compiled/layers.py and
compiled/attention.py, if they run on a CPU without gradients. Half formats are computed in float32.
A whole decoding step goes to compiled/decoder.py. All of these routes give the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad

from kvtool.config import GATED
from kvtool.core.native import compiling, context

Array = NDArray[Any]
ArrayLayer = Callable[[Array], Array]  # (n,in) -> (n,out), each row alone

MAX_STEP_TOKENS = 8  # tokens; PyTorch's attention is faster for more of one row
# One token of each of so many rows takes less time in native code than by PyTorch: measured by
# `pytest tests/benchmarks/test_bench_native.py -k many_rows` with AVX-512, where tiles fill the
# registers. For bfloat16 PyTorch has instructions that native code has not, but where a cache holds
# codes it writes them out as numbers first.
MAX_ROWS = {torch.float32: 256, torch.float16: 256, torch.bfloat16: 32}
MAX_CODED_ROWS = {torch.float32: 256, torch.float16: 256, torch.bfloat16: 128}
MIN_SHARED = 2**17  # numbers read by a layer or attention; for fewer, threads gain little
MIN_DECODED = 500  # tokens to decode; loading takes 0.3 s, and each token saves 0.5 ms or more

COMPUTED = torch.float32, torch.float64
# NumPy or numba lacks these formats. So arrays hold their bits as integers, one type for each.
HALVES = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
READ = *COMPUTED, *HALVES
NO_CODES = np.zeros(9, np.int64)  # as compiled/codes.py has it


def native_if_worthwhile(n_tokens: int) -> AbstractContextManager[None]:
    """Turn native code off if loading it takes longer than `n_tokens` decoded tokens gain."""
    why = f"for fewer than {MIN_DECODED} tokens native code takes longer to load than it gains"
    return context.within(no_native="" if n_tokens >= MIN_DECODED else why)


def can_compute(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether native code takes less time for x (B,T,in), and can read all the tensors."""
    rows = x.shape[0] if x.dim() == 3 and x.shape[1] == 1 else 0
    few = x.numel() <= MAX_STEP_TOKENS * x.shape[-1] or 0 < rows <= most_rows(x.dtype)
    return few and not why_unreadable(x, *parameters)


def is_few(rows: int, n_each: int, dtype: torch.dtype) -> bool:
    """Whether native code takes less time than PyTorch for `n_each` tokens of each row."""
    return rows * n_each <= MAX_STEP_TOKENS or (n_each == 1 and rows <= most_rows(dtype))


def most_rows(dtype: torch.dtype) -> int:
    """How many rows of one token native code serves in that format, on this processor, with a
    cache like that of the context."""
    most = MAX_CODED_ROWS if context.current().coded else MAX_ROWS
    return most.get(dtype, MAX_STEP_TOKENS) if fills_registers() else MAX_STEP_TOKENS


@cache
def fills_registers() -> bool:
    """Whether the processor has the registers that compiled/tiles.py is made for."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def can_read(first: Tensor, *others: Tensor | None) -> bool:
    """Whether native code is available and can replace PyTorch for these tensors."""
    return not why_unreadable(first, *others)


def why_unreadable(first: Tensor, *others: Tensor | None) -> str:
    """Why native code cannot replace PyTorch for these tensors; empty if it can."""
    if why := context.current().no_native:
        return why
    if not numpy_can_read(first, *others, dtypes=READ):
        return "native code needs plain tensors of one floating format on the CPU"
    if layer_code(first.dtype) is None:
        return f"native code could not be had ({compiling.failure()})"
    return ""


def numpy_can_read(
    first: Tensor, *others: Tensor | None, dtypes: Sequence[torch.dtype] = COMPUTED
) -> bool:
    """Whether NumPy can compute with these tensors in PyTorch's place.

    All must have the same dtype, one of `dtypes`, and lie on the CPU. Neither gradients nor a
    compiler, tracer or mode may be active, since none of them sees operations on arrays.
    """
    if first.dtype not in dtypes:
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
    return not is_intercepted()


def why_away() -> str:
    """Why no step may use native code now, whatever its tensors are; empty if it may."""
    why = context.current().no_native
    return "something watches what PyTorch does" if not why and is_intercepted() else why


def is_intercepted() -> bool:
    """Whether something tracks or changes PyTorch's operations and would miss those done elsewhere:
    a compiler, a tracer, autocast, a dispatch mode, a function transform, forward derivatives."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def array(tensor: Tensor) -> Array:
    """The tensor's memory as an array, half formats as bits; a copy if it is not contiguous."""
    return tensor.detach().contiguous().view(HALVES.get(tensor.dtype, tensor.dtype)).numpy()


def computed(tensor: Tensor) -> Array:
    """The tensor as an array of numbers, half formats converted to float32."""
    return array(tensor.float() if tensor.dtype in HALVES else tensor)


def on_tensor(layer: ArrayLayer, x: Tensor) -> Tensor:
    """Apply a layer for arrays to a tensor: x (...,in) -> (...,out) in the dtype of x."""
    y = layer(computed(x).reshape(x.numel() // x.shape[-1], x.shape[-1]))
    return torch.from_numpy(y).view(*x.shape[:-1], y.shape[1]).to(x.dtype)


class Weights(NamedTuple):
    """The arrays of a linear layer: weight (out,in), bias (out,) or (0,)"""

    weight: Array
    bias: Array

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Weights:
        """The arrays of a layer; contiguous weights are not copied.

        Raises ValueError if the bias has another width than the weight.
        """
        _require_width(weight, bias)
        return cls(array(weight), _or_empty(bias, weight))


class Norm(NamedTuple):
    """The arrays of a LayerNorm (centred) or an RMSNorm: scale (d,), shift (d,) or (0,)"""

    centred: bool
    scale: Array
    shift: Array
    eps: float

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor | None, eps: float, centred: bool) -> Norm:
        """The arrays of a norm; contiguous weights are not copied.

        Raises ValueError if the shift has another width than the scale.
        """
        _require_width(scale, shift)
        return cls(centred, array(scale), _or_empty(shift, scale), eps)


def _require_width(weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError for a bias of another width: compiled functions do not check shapes."""
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
    """`F.linear` on arrays; threads share weights of MIN_SHARED numbers or more.

    The layer raises ValueError for an input of another width or one that is not contiguous.
    """
    kernel, (n_out, n_in) = loaded().product, weights.weight.shape

    def layer(x: Array) -> Array:
        _require_input(x, n_in)
        y = np.empty((len(x), n_out), x.dtype)
        kernel(x, *weights, y, threads_for(weights.weight.size), MIN_SHARED)
        return y

    return layer


def normalised(norm: Norm) -> ArrayLayer:
    """`F.layer_norm` or `F.rms_norm` over the last dimension of arrays.

    The layer raises ValueError for an input of another width or one that is not contiguous.
    """
    kernel, width = loaded().normalise, len(norm.scale)

    def layer(x: Array) -> Array:
        _require_input(x, width)
        y = np.empty_like(x)
        kernel(x, *norm, y)
        return y

    return layer


def activation(name: str) -> ArrayLayer:
    """The activation that a ModelConfig names, on arrays: (n,d) -> (n,d); with a gate
    (n,2d) -> (n,d).

    Raises KeyError for an unknown name.
    """
    kernel, number = loaded().activate, number_of(name)
    parts = 1 + (name in GATED)

    def layer(x: Array) -> Array:
        y = np.empty((len(x), x.shape[1] // parts), x.dtype)
        kernel(number, x, y)
        return y

    return layer


def threads_for(n_read: int) -> int:
    """How many threads share work that reads `n_read` numbers: 1 below MIN_SHARED, else as many as
    PyTorch uses and compiled code allows."""
    n = torch.get_num_threads() if n_read >= MIN_SHARED else 1
    return n if n == 1 else min(n, loaded().MAX_THREADS)


def number_of(activation: str) -> int:
    """The number of an activation in compiled functions. Raises KeyError for an unknown name."""
    return int(loaded().ACTIVATIONS[activation])


@cache
def kind_of(dtype: torch.dtype) -> Array:
    """An empty array of the type that represents `dtype` in compiled code."""
    return array(torch.empty(0, dtype=dtype))


@cache
def layer_code(dtype: torch.dtype) -> ModuleType | None:
    """The compiled functions of layers and attention for weights of that dtype; None if numba does
    not work here."""
    return _code("attention", dtype, "layers")


@cache
def decoder_code(dtype: torch.dtype) -> ModuleType | None:
    """The compiled functions of a whole step for weights of that dtype; None as `layer_code`."""
    return _code("decoder", dtype, "whole steps")


def prepare(tensor: Tensor) -> None:
    """Compile the code for this tensor's dtype now, so that no compilation falls into a timing."""
    if tensor.is_cpu and tensor.dtype in READ:
        decoder_code(tensor.dtype)


def _code(name: str, dtype: torch.dtype, what: str) -> ModuleType | None:
    def load() -> ModuleType:
        code = importlib.import_module(f"kvtool.core.native.compiled.{name}")
        if dtype is torch.float16 and not code.CONVERTS_FLOAT16:
            raise NotImplementedError("float16 on this processor")
        real = computed(torch.empty(0, dtype=dtype))
        forms = code.forms(*(code.from_dtype(x.dtype) for x in (real, kind_of(dtype))))
        compiling.load_all(forms, f"{what} in {str(dtype).removeprefix('torch.')}")
        return code

    return compiling.available(load)


@cache
def loaded() -> ModuleType:
    """The module of `layer_code`; `can_read` has loaded its functions for the dtype in use."""
    return importlib.import_module("kvtool.core.native.compiled.attention")
