"""What decoding spends its time on, compiled by numba: layers and attention as loops over arrays.

Every function treats each row by itself, in an order that its width alone decides. So a token gets
the same bits alone, among others, cached or not, in any memory and with any number of threads.
All arrays are dense, of one type, float32 or float64; but weights, keys and values may be of a half
format, and all else float32 then. A bias or shift of no elements is none: one form of each function
to compile, and not two.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import carray, types
from numba import from_dtype as from_dtype

from kvtool.core.native.compiled.tools import CONVERTS_FLOAT16 as CONVERTS_FLOAT16
from kvtool.core.native.compiled.tools import MOST_THREADS as MOST_THREADS
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    copy_rows,
    dense,
    kept,
    number,
    pointer,
    shared,
    use_threads,
)

# Of keys or values: an address, a row's bytes, a head's columns, and an array of their type.
Place = tuple[int, int, int, Array]

# Compiled into the functions.
GELU, GELU_TANH, RELU, SWIGLU, GEGLU = range(5)
ACTIVATIONS = {
    "gelu": GELU, "gelu_tanh": GELU_TANH, "relu": RELU, "swiglu": SWIGLU, "geglu": GEGLU
}  # fmt: skip


@compiled()
def round_to_format(x: Array, kind: Array) -> None:
    """Round x (n,d) to numbers that arrays of the type of `kind` can hold, in place."""
    if kind.itemsize < x.itemsize:
        for n in range(x.shape[0]):
            for j in range(x.shape[1]):
                x[n, j] = number(kept(x[n, j], kind))


@shared()
def linear(x: Array, weight: Array, bias: Array, y: Array, first: int, last: int) -> None:
    """Columns `first` to `last` of y (n,out) = x (n,in) times weight (out,in), plus bias (out,)"""
    for i in range(first, last):
        row = weight[i]
        for n in range(x.shape[0]):  # inside, so that weights are read from memory once
            total = x.dtype.type(0)
            for j in range(row.shape[0]):
                total += number(row[j]) * x[n, j]
            if bias.size:
                total += number(bias[i])
            y[n, i] = total


@shared(parallel=True)
def linear_by_threads(x: Array, weight: Array, bias: Array, y: Array, parts: int) -> None:
    """`linear`, each of `parts` threads with its own columns."""
    use_threads(parts)
    for part in numba.prange(parts):
        width, at = weight.shape[0], np.int64(part)
        linear(x, weight, bias, y, width * at // parts, width * (at + 1) // parts)


@compiled()
def layer_norm(x: Array, scale: Array, shift: Array, eps: float, y: Array) -> None:
    """y (n,d) = each row of x, its mean taken away and divided by its deviation (Ba 2016)."""
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
    """y (n,d) = each row of x over the root of its mean square (Zhang 2019)."""
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
    """x (n,) becomes e to its power; in float32 by 2**k * 2**f, |f| <= 1/2, the last by its Taylor
    series, since neither NumPy's nor the C library's function would be vectorised here."""
    if x.itemsize == 8:
        for i in range(x.shape[0]):
            x[i] = np.exp(x[i])
        return
    bits = x.view(np.int32)
    for i in range(x.shape[0]):
        t = x[i] * np.float32(1.4426950408889634)  # log2(e)
        t = np.float32(-127) if t < np.float32(-127) else t  # 1 with this exponent is 0,
        t = np.float32(128) if t > np.float32(128) else t  # and with this one infinity
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
    """y (n,) = x / (1 + e**-t); t is used up."""
    for i in range(t.shape[0]):
        t[i] = -t[i]
    exponential(t)
    for i in range(t.shape[0]):
        y[i] = x[i] / (t.dtype.type(1) + t[i])


@compiled()
def gelu_tanh(x: Array, y: Array) -> None:
    """y (n,d) = GELU's approximation by tanh (Hendrycks 2016): (1 + tanh(u)) / 2 is 1 / (1 +
    e**-2u)."""
    one = x.dtype.type(1)
    cubic, factor = x.dtype.type(0.044715), x.dtype.type(1.5957691216057308)  # 2 sqrt(2 / pi)
    t = np.empty(x.shape[1], x.dtype)
    for n in range(x.shape[0]):
        for j in range(x.shape[1]):
            t[j] = factor * x[n, j] * (one + cubic * x[n, j] * x[n, j])
        sigmoid_times(x[n], t, y[n])


@compiled()
def gelu(x: Array, y: Array) -> None:
    """y (n,d) = x/2 (1 + erf(x/sqrt2)), the normal distribution's part of x (Hendrycks 2016).

    In float32 erfc(|u|) is t e**(p(t) - u**2) with t = 1 / (1 + 0.4 |u|); p is ln erfcx(u)/t fitted
    at 400 Chebyshev nodes for |u| <= 10, which is right to 1.1e-7 of the value. The C library's erf
    would not be vectorised.
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
    """y (n,d) = silu of the first half of x (n,2d), times the second (Shazeer 2020)."""
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


@compiled()
def add_values(w: Array, v: Array, y: Array) -> None:
    """y (D,) += the sum of the values v (n,D), each times its weight w (n,)."""
    whole = w.shape[0] // 8 * 8
    for i in range(0, whole, 8):  # together, or each would wait for y of the one before
        for j in range(y.shape[0]):
            first = w[i] * number(v[i, j]) + w[i + 1] * number(v[i + 1, j])
            second = w[i + 2] * number(v[i + 2, j]) + w[i + 3] * number(v[i + 3, j])
            third = w[i + 4] * number(v[i + 4, j]) + w[i + 5] * number(v[i + 5, j])
            fourth = w[i + 6] * number(v[i + 6, j]) + w[i + 7] * number(v[i + 7, j])
            y[j] += (first + second) + (third + fourth)
    for i in range(whole, w.shape[0]):
        for j in range(y.shape[0]):
            y[j] += w[i] * number(v[i, j])


@shared()
def normalise(x: Array, centred: bool, scale: Array, shift: Array, eps: float, y: Array) -> None:
    """`layer_norm` if centred, else `rms_norm`."""
    if centred:
        layer_norm(x, scale, shift, eps, y)
    else:
        rms_norm(x, scale, eps, y)


@shared()
def activate(number: int, x: Array, y: Array) -> None:
    """The activation of that number in ACTIVATIONS."""
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


@shared()
def product(x: Array, weight: Array, bias: Array, y: Array, threads: int, large: int) -> None:
    """`linear`, by several threads if there are `large` weights or more."""
    if threads > 1 and weight.size >= large:
        linear_by_threads(x, weight, bias, y, threads)
    else:
        linear(x, weight, bias, y, 0, weight.shape[0])


@compiled()
def score(query: Array, keys: Array, scores: Array) -> None:
    """scores (n,) of a query (D,) and keys (n,D)"""
    width = keys.shape[1]
    scale = query.dtype.type(1 / np.sqrt(width))
    for i in range(keys.shape[0]):
        product = query.dtype.type(0)
        for j in range(width):
            product += query[j] * number(keys[i, j])
        scores[i] = product * scale


@shared()
def attend_head(
    query: Array, first_keys: Array, first_values: Array, keys: Array, values: Array, result: Array
) -> None:
    """One query (D,) over the first keys and values (m,D), m whole eights, and more of them (n,D)
    -> result (D,), NaN if there are none: the same bits however they are divided."""
    n_first, width = first_keys.shape
    n_keys = n_first + keys.shape[0]
    scores = np.empty(n_keys, query.dtype)
    score(query, first_keys, scores[:n_first])
    score(query, keys, scores[n_first:])
    largest = query.dtype.type(-np.inf)
    for i in range(n_keys):
        largest = scores[i] if scores[i] > largest else largest
    for i in range(n_keys):
        scores[i] -= largest
    exponential(scores)
    total = query.dtype.type(0)
    for i in range(n_keys):
        total += scores[i]
    result[:] = 0
    add_values(scores[:n_first], first_values, result)
    add_values(scores[n_first:], values, result)
    for j in range(width):
        result[j] /= total


@compiled()
def seen_of(stored: Place, row: int, group: int, first: int, last: int, width: int) -> Array:
    """Columns `first` to `last` of a row's and a head's keys or values (columns,width)."""
    address, row_bytes, columns, like = stored
    at = address + row * row_bytes + (group * columns + first) * width * like.itemsize
    return carray(pointer(at, like), (last - first, width))


@compiled()
def sinks_apart(
    stored: Place, row: int, group: int, span: Array, width: int
) -> tuple[Array, Array]:
    """What a query sees by its span as in `attend`: sinks, with as many of the others as make whole
    eights, and the rest; without sinks all are the rest."""
    others = seen_of(stored, row, group, span[0], span[1], width)
    n_sinks = span[3] - span[2]
    if not n_sinks:
        return others[:0], others
    sinks = seen_of(stored, row, group, span[2], span[3], width)
    n_moved = min(-n_sinks % 8, others.shape[0])
    if not n_moved:
        return sinks, others
    first = np.empty((n_sinks + n_moved, width), others.dtype)
    copy_rows(sinks, first[:n_sinks])
    copy_rows(others[:n_moved], first[n_sinks:])
    return first, others[n_moved:]


@shared()
def attend_part(
    q: Array, begin: int, end: int, n_each: int, n_groups: int, k: Place, v: Place, spans: Array,
    y: Array,
) -> None:  # fmt: skip
    """`attend` for the heads from number `begin` to `end`, counted over all queries."""
    n_heads = q.shape[1]
    for at in range(begin, end):
        i, h = at // n_heads, at % n_heads
        row, group = i // n_each, h * n_groups // n_heads
        first_keys, keys = sinks_apart(k, row, group, spans[i], q.shape[2])
        first_values, values = sinks_apart(v, row, group, spans[i], q.shape[2])
        attend_head(q[i, h], first_keys, first_values, keys, values, y[i, h])


@shared(parallel=True)
def attend_by_threads(
    q: Array, parts: int, n_each: int, n_groups: int, k: Place, v: Place, spans: Array, y: Array
) -> None:
    """`attend`, each of `parts` threads with its own heads."""
    use_threads(parts)
    for part in numba.prange(parts):
        n, at = q.shape[0] * q.shape[1], np.int64(part)
        begin, end = n * at // parts, n * (at + 1) // parts
        attend_part(q, begin, end, n_each, n_groups, k, v, spans, y)


@shared()
def attend(
    q: Array, n_each: int, n_groups: int, k: Place, v: Place, spans: Array, y: Array,
    threads: int, large: int,
) -> None:  # fmt: skip
    """Queries of each head, q (n,H,D), `n_each` of a row, over keys and values -> y (n,H,D).

    Query i sees the columns from spans[i,2] to spans[i,3], sinks, and then those from spans[i,0] to
    spans[i,1]; NaN if there are none. k and v say where (B,n_groups,columns,D) is. Several threads
    share `large` numbers to read or more. Heads of queries share heads of keys (Ainslie 2023).
    """
    n = q.shape[0]
    seen = 0
    for i in range(n):
        seen += spans[i, 1] - spans[i, 0] + spans[i, 3] - spans[i, 2]
    if threads > 1 and 2 * n_groups * q.shape[2] * seen >= large:
        attend_by_threads(q, threads, n_each, n_groups, k, v, spans, y)
    else:
        attend_part(q, 0, n * q.shape[1], n_each, n_groups, k, v, spans, y)


@shared()
def attend_columns(
    q: Array, row: int, n_groups: int, k: Place, v: Place, columns: Array, y: Array
) -> None:
    """`attend` for one query of a row, q (H,D), over the columns (n,) that are listed: copied, so
    that they are side by side."""
    n, (n_heads, width) = columns.shape[0], q.shape
    keys, values = np.empty((n, width), k[3].dtype), np.empty((n, width), v[3].dtype)
    for group in range(n_groups):
        for i in range(n):
            key = seen_of(k, row, group, columns[i], columns[i] + 1, width)
            value = seen_of(v, row, group, columns[i], columns[i] + 1, width)
            for j in range(width):
                keys[i, j] = key[0, j]
                values[i, j] = value[0, j]
        for h in range(group * n_heads // n_groups, (group + 1) * n_heads // n_groups):
            attend_head(q[h], keys[:0], values[:0], keys, values, y[h])


def forms(real: types.Type, kind: types.Type) -> Forms:
    """What computes in `real` with weights, keys and values of `kind`, what is called first."""
    n, (x1, x2, x3), (w1, w2, _) = types.intp, dense(real), dense(kind)
    (columns, spans, _), place = dense(n), types.Tuple((n, n, n, w1))
    read = n, n, place, place, spans, x3
    yield linear, (x2, w2, w1, x2, n, n)
    yield linear_by_threads, (x2, w2, w1, x2, n)
    yield product, (x2, w2, w1, x2, n, n)
    yield normalise, (x2, types.boolean, w1, w1, types.float64, x2)
    yield activate, (n, x2, x2)
    yield attend_head, (x1, w2, w2, w2, w2, x1)
    yield attend_part, (x3, n, n, *read)
    yield attend_by_threads, (x3, n, *read)
    yield attend, (x3, *read, n, n)
    yield attend_columns, (x2, n, n, place, place, columns, x2)
