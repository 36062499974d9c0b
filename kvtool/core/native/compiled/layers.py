"""Layers as loops over arrays, compiled by numba.

Every function computes each row alone, in an order that depends on the row's width only. So a
token gets the same bits alone or among others, cached or not, anywhere in memory and with any
number of threads. All arrays are contiguous and of one type, float32 or float64. Weights, keys and
values may be in a half format; then all else is float32. An empty bias or shift means that there is
none, so that each function is compiled once and not twice.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import from_dtype as from_dtype
from numba import types

from kvtool.core.native.compiled.lanes import WIDTH
from kvtool.core.native.compiled.tiles import (
    CACHED,
    MAX_ROWS,
    at_once,
    dots_in_turn,
    dots_of_one,
    dots_of_three,
    dots_of_two,
)
from kvtool.core.native.compiled.tools import CONVERTS_FLOAT16 as CONVERTS_FLOAT16
from kvtool.core.native.compiled.tools import MAX_THREADS as MAX_THREADS
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    dense,
    kept,
    number,
    shared,
    use_threads,
)

# Constants of the compiled functions.
GELU, GELU_TANH, RELU, SWIGLU, GEGLU = range(5)
ACTIVATIONS = {
    "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "swiglu": SWIGLU, "geglu": GEGLU
}  # fmt: skip


@compiled()
def round_to_format(x: Array, kind: Array) -> None:
    """Round x (n,d) to the type of `kind`, in place."""
    if kind.itemsize < x.itemsize:
        for n in range(x.shape[0]):
            for j in range(x.shape[1]):
                x[n, j] = number(kept(x[n, j], kind))


@compiled(fast=False)
def linear_tiles(
    x: Array, weight: Array, first: int, n: int, step: int, y: int, y_step: int
) -> None:
    """At address y the products of rows x (n,in) and `at_once` rows of weights from `first` on,
    `step` bytes apart, but for the numbers beyond whole lanes."""
    whole, size = x.shape[1] // WIDTH * WIDTH, x.shape[1] * x.itemsize
    w = np.int64(weight.ctypes.data) + first * x.shape[1] * weight.itemsize
    at, i = np.int64(x.ctypes.data), 0
    while i < n:
        if MAX_ROWS >= 3 and n - i >= 3:
            dots_of_three(w, step, at + i * size, size, whole, weight, y + i * y_step, x, y_step)
            i += 3
        elif MAX_ROWS >= 2 and n - i >= 2:
            dots_of_two(w, step, at + i * size, size, whole, weight, y + i * y_step, x, y_step)
            i += 2
        elif weight.size <= CACHED:
            dots_of_one(w, step, at + i * size, size, whole, weight, y + i * y_step, x, y_step)
            i += 1
        else:
            dots_in_turn(w, step, at + i * size, size, whole, weight, y + i * y_step, x, y_step)
            i += 1


@shared(fast=False)
def linear(x: Array, weight: Array, bias: Array, y: Array, first: int, last: int) -> None:
    """Columns `first` to `last` of y (n,out) = x (n,in) times weight.T (in,out) + bias (out,)."""
    n, width = x.shape
    together = at_once(x)
    step, y_step = width * weight.itemsize, y.shape[1] * y.itemsize
    if last - first >= together:
        for i in range(first, last, together):
            at = min(i, last - together)  # the last ones once more, where they are fewer
            to = np.int64(y.ctypes.data) + at * y.itemsize
            linear_tiles(x, weight, at, n, step, to, y_step)
    else:
        alike = np.empty((n, together), y.dtype)
        for i in range(first, last):
            to = np.int64(alike.ctypes.data)
            linear_tiles(x, weight, i, n, 0, to, together * y.itemsize)
            for row in range(n):
                y[row, i] = alike[row, 0]
    whole = width // WIDTH * WIDTH
    if whole == width and not bias.size:
        return
    for row in range(n):
        for i in range(first, last):
            for j in range(whole, width):
                y[row, i] += number(weight[i, j]) * x[row, j]
            if bias.size:
                y[row, i] += number(bias[i])


@shared(parallel=True)
def linear_by_threads(x: Array, weight: Array, bias: Array, y: Array, parts: int) -> None:
    """`linear` by `parts` threads; each computes its own columns."""
    use_threads(parts)
    for part in numba.prange(parts):
        width, at = weight.shape[0], np.int64(part)
        linear(x, weight, bias, y, width * at // parts, width * (at + 1) // parts)


@compiled()
def layer_norm(x: Array, scale: Array, shift: Array, eps: float, y: Array) -> None:
    """y (n,d) = LayerNorm of x (n,d) with scale (d,) and shift (d,) or (0,) (Ba 2016)."""
    width = x.shape[1]
    for n in range(x.shape[0]):
        total = x.dtype.type(0)
        for j in range(width):
            total += x[n, j]
        mean = total / x.dtype.type(width)
        squares = x.dtype.type(0)
        for j in range(width):
            squares += (x[n, j] - mean) * (x[n, j] - mean)
        factor = x.dtype.type(1 / np.sqrt(squares / x.dtype.type(width) + eps))
        for j in range(width):
            y[n, j] = (x[n, j] - mean) * factor * number(scale[j])
            if shift.size:
                y[n, j] += number(shift[j])


@compiled()
def rms_norm(x: Array, scale: Array, eps: float, y: Array) -> None:
    """y (n,d) = RMSNorm of x (n,d) with scale (d,) (Zhang 2019)."""
    width = x.shape[1]
    for n in range(x.shape[0]):
        squares = x.dtype.type(0)
        for j in range(width):
            squares += x[n, j] * x[n, j]
        factor = x.dtype.type(1 / np.sqrt(squares / x.dtype.type(width) + eps))
        for j in range(width):
            y[n, j] = x[n, j] * factor * number(scale[j])


@compiled()
def exponential(x: Array) -> None:
    """x (n,) = e**x, in place; float32 as 2**k * 2**f with |f| <= 1/2, by the Taylor series of
    2**f, since LLVM could vectorise neither NumPy's exp nor the C library's."""
    if x.itemsize == 8:
        for i in range(x.shape[0]):
            x[i] = np.exp(x[i])
        return
    bits = x.view(np.int32)
    for i in range(x.shape[0]):
        t = x[i] * np.float32(1.4426950408889634)  # log2(e)
        t = np.float32(-127) if t < np.float32(-127) else t  # the bits of 2**-127 are those of 0
        t = np.float32(128) if t > np.float32(128) else t  # and those of 2**128 are infinity's
        k = np.rint(t)
        f = t - k
        power = np.float32(1.5252734e-5)
        power = power * f + np.float32(1.5403530e-4)
        power = power * f + np.float32(1.3333558e-3)
        power = power * f + np.float32(9.6181291e-3)
        power = power * f + np.float32(5.5504109e-2)
        power = power * f + np.float32(2.4022651e-1)
        power = power * f + np.float32(6.9314718e-1)
        x[i] = power * f + np.float32(1)
        bits[i] += np.int32(k) << 23  # times 2**k


@compiled()
def sigmoid_times(x: Array, t: Array, y: Array) -> None:
    """y (n,) = x / (1 + e**-t); t is overwritten."""
    for i in range(t.shape[0]):
        t[i] = -t[i]
    exponential(t)
    for i in range(t.shape[0]):
        y[i] = x[i] / (t.dtype.type(1) + t[i])


@compiled()
def gelu_tanh(x: Array, y: Array) -> None:
    """y (n,d) = GELU of x (n,d) by the tanh approximation (Hendrycks 2016), with (1 + tanh(u)) / 2
    computed as 1 / (1 + e**-2u)."""
    one = x.dtype.type(1)
    cubic, factor = x.dtype.type(0.044715), x.dtype.type(1.5957691216057308)  # 2 sqrt(2 / pi)
    t = np.empty(x.shape[1], x.dtype)
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            t[j] = factor * x[n, j] * (one + cubic * x[n, j] * x[n, j])
        sigmoid_times(x[n], t, y[n])


@compiled()
def gelu(x: Array, y: Array) -> None:
    """y (n,d) = GELU of x (n,d): x/2 (1 + erf(x/sqrt(2))) (Hendrycks 2016).

    In float32 erfc(|u|) is t e**(p(t) - u**2) with t = 1 / (1 + 0.4 |u|). The polynomial p is
    fitted to ln(erfcx(u)/t) at 400 Chebyshev nodes for |u| <= 10, with a relative error of 1.1e-7.
    LLVM could not vectorise the C library's erf.
    """
    half, one, root = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(0.7071067811865476)
    if x.itemsize == 8:
        for n in range(x.shape[0]):
            for j in range(x.shape[1]):
                y[n, j] = half * x[n, j] * (one + math.erf(x[n, j] * root))
        return
    t, erfc = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            u = abs(x[n, j] * root)
            t[j] = one / (one + np.float32(0.4) * u)
            p = np.float32(-2.12721808e-1)
            p = p * t[j] + np.float32(9.50186970e-1)
            p = p * t[j] + np.float32(-1.53893885e0)
            p = p * t[j] + np.float32(1.05971852e0)
            p = p * t[j] + np.float32(-4.85119681e-1)
            p = p * t[j] + np.float32(3.17978040e-1)
            p = p * t[j] + np.float32(3.95332937e-1)
            p = p * t[j] + np.float32(1.00231005e0)
            p = p * t[j] + np.float32(-1.48874628e0)
            erfc[j] = p - u * u
        exponential(erfc)
        for j in range(x.shape[1]):
            tail = t[j] * erfc[j]
            y[n, j] = half * x[n, j] * (tail if x[n, j] < 0 else np.float32(2) - tail)


@compiled()
def swiglu(x: Array, y: Array) -> None:
    """y (n,d) = SiLU of the first half of x (n,2d), times the second half (Shazeer 2020)."""
    width = y.shape[1]
    for n in range(x.shape[0]):
        sigmoid_times(x[n], x[n, :width].copy(), y[n])
        for j in range(width):
            y[n, j] *= x[n, width + j]


@compiled()
def geglu(x: Array, y: Array) -> None:
    """y (n,d) = gelu_tanh of the first half of x (n,2d), times the second (Shazeer 2020)."""
    width = y.shape[1]
    gelu_tanh(x[:, :width].copy(), y)
    for n in range(x.shape[0]):
        for j in range(width):
            y[n, j] *= x[n, width + j]


@shared(entry=True)
def normalise(x: Array, centred: bool, scale: Array, shift: Array, eps: float, y: Array) -> None:
    """`layer_norm` if `centred`, else `rms_norm`."""
    if centred:
        layer_norm(x, scale, shift, eps, y)
    else:
        rms_norm(x, scale, eps, y)


@shared(entry=True)
def activate(number: int, x: Array, y: Array) -> None:
    """y (n,d) = the activation with that number in ACTIVATIONS; x (n,d), or (n,2d) for swiglu."""
    if number == GELU:
        gelu(x, y)
    elif number == GELU_TANH:
        gelu_tanh(x, y)
    elif number == SWIGLU:
        swiglu(x, y)
    elif number == GEGLU:
        geglu(x, y)
    else:
        for n in range(x.shape[0]):
            for j in range(x.shape[1]):
                y[n, j] = 0 if x[n, j] < 0 else x[n, j]


@shared(entry=True)
def product(x: Array, weight: Array, bias: Array, y: Array, threads: int, large: int) -> None:
    """`linear`, by several threads if there are `large` weights or more."""
    if threads > 1 and weight.size >= large:
        linear_by_threads(x, weight, bias, y, threads)
    else:
        linear(x, weight, bias, y, 0, weight.shape[0])


def forms(real: types.Type, kind: types.Type) -> Forms:
    """What computes in `real` with weights, keys and values of `kind`, what is called first."""
    n, x2, (w1, w2, _) = types.intp, dense(real)[1], dense(kind)
    yield linear, (x2, w2, w1, x2, n, n)
    yield linear_by_threads, (x2, w2, w1, x2, n)
    yield product, (x2, w2, w1, x2, n, n)
    yield normalise, (x2, types.boolean, w1, w1, types.float64, x2)
    yield activate, (n, x2, x2)
