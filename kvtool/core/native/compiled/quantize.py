"""Keys and values made into codes by code that numba compiles: to bits, and to e4m3.

codes.py says what codes are and where. The codes are those that core/cache/packed.py and
core/cache/float8.py make with PyTorch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, types

from kvtool.core.native.compiled.codes import (
    BYTES,
    CHANNELS,
    FORM,
    FORM_HALF_BYTES,
    ROOM,
    SCALES,
    TOKENS,
    ZERO_POINTS,
    row_of,
    scale_of,
)
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    dense,
    kept,
    number,
    pointer,
    shared,
    vector,
)


@compiled(fast=False)
def float8_of(x: float, bits: Array) -> int:
    """The code in e4m3 next to a float32 of at most 448, of two the even one; uses bits (1,)."""
    size = abs(x)
    sign = 128 if math.copysign(1.0, x) < 0 else 0
    if size < 0.015625:  # below the normal numbers
        return sign | np.int64(np.rint(size * np.float32(512)))
    bits[0] = size
    whole = np.int64(bits.view(np.int32)[0])
    return sign | (((whole + ((1 << 19) - 1) + ((whole >> 20) & 1)) >> 20) - (120 << 3))


@shared(fast=False)
def store_float8(
    x: Array, first: int, n_groups: int, coded: Array, slot: int, n_each: int, kind: Array
) -> None:
    """Of tokens x (n,..,D), n_each of a row, G heads from number `first` on, as codes from column
    `slot` on, each with the power of two that core/cache/float8.py gives it."""
    n, _, width = x.shape
    bits, least = np.empty(1, np.float32), max(tiny(kind), 512 * tiny(kind) * epsilon(kind))
    for i in range(n):
        row, token = i // n_each, slot + i % n_each
        for group in range(n_groups):
            head = row * n_groups + group
            codes = carray(pointer(row_of(coded, head, token, width), BYTES), (width,))
            largest, finite = x.dtype.type(0), True
            for j in range(width):
                size = abs(x[i, first + group, j])
                finite = finite and size < np.inf
                largest = size if size > largest else largest
            digits, exponent = math.frexp(largest)
            scale = max(math.ldexp(1.0, exponent - (8 if digits > 0.875 else 9)), least)
            factor = x.dtype.type(scale if finite else np.nan)
            at = coded[SCALES] + (head * coded[ROOM] + token) * kind.itemsize
            vector(at, 1, kind)[0] = kept(factor, kind)
            for j in range(width):
                part = np.float32(x[i, first + group, j] / factor)
                codes[j] = float8_of(part, bits) if finite else 0


@shared(entry=True, fast=False)
def round_groups(
    stored: Array, columns: int, column: int, padding: Array, first: int, n: int, n_groups: int,
    width: int, coded: Array, kind: Array, real: Array,
) -> None:  # fmt: skip
    """Make codes of n tokens, whole groups from token number `first` on, of all rows and layers:
    stored (2,layers) as `decode` has it, from `column` on. As Packed.write in
    core/cache/packed.py, of padding (B,) too."""
    for layer in range(stored.shape[1]):
        for side in range(2):
            facts = coded[side, layer]
            for head in range(padding.shape[0] * n_groups):
                start = stored[side, layer] + (head * columns + column) * width * kind.itemsize
                for t in range(0, n, facts[TOKENS]):
                    at = start + t * width * kind.itemsize
                    x = carray(pointer(at, kind), (facts[TOKENS], width))
                    padded = padding[head // n_groups] - first - t
                    round_group(x, facts, head, first + t, padded, kind, real)


@compiled(fast=False)
def round_group(
    stored: Array, facts: Array, head: int, token: int, padded: int, kind: Array, real: Array
) -> None:
    """Make codes of stored (n,D), tokens that share scales; the first `padded` of them have no
    part in these if there are others."""
    n, width = stored.shape
    channels, levels = facts[CHANNELS], 15 if facts[FORM] == FORM_HALF_BYTES else 255
    x = np.empty((n, width), real.dtype)
    for i in range(n):
        for j in range(width):
            x[i, j] = number(stored[i, j])
    low, high = np.empty(width, real.dtype), np.empty(width, real.dtype)
    odd, counted = np.zeros(width, real.dtype), padded if 0 < padded < n else 0
    for j in range(width):
        low[j] = high[j] = x[counted, j]
    for i in range(counted, n):
        for j in range(width):
            low[j] = x[i, j] if x[i, j] < low[j] else low[j]
            high[j] = x[i, j] if x[i, j] > high[j] else high[j]
            odd[j] += x[i, j] * 0  # NaN for what is not finite
    behind = scale_of(facts, head, token, width, kind.itemsize)
    scales = vector(facts[SCALES] + behind, width // channels, kind)
    zeros = vector(facts[ZERO_POINTS] + behind, width // channels, kind)
    for c in range(width // channels):
        at = c * channels
        for j in range(at + 1, at + channels):
            low[at] = low[j] if low[j] < low[at] else low[at]
            high[at] = high[j] if high[j] > high[at] else high[at]
            odd[at] += odd[j]
        steps = real.dtype.type(levels)
        extent = high[at] - low[at] + odd[at]
        scale = number(kept(extent / steps, kind))
        if scale * steps < extent:
            scale = number(kept(scale * real.dtype.type(1 + epsilon(kind)), kind))
        scale = real.dtype.type(tiny(kind)) if scale < tiny(kind) else scale
        scales[c], zeros[c] = kept(scale, kind), kept(low[at] + odd[at], kind)
        for j in range(at, at + channels):
            low[j], high[j] = low[at], scale
    for i in range(n):
        codes = carray(pointer(row_of(facts, head, token + i, width), BYTES), (width,))
        shift = 4 * ((token + i) & 1) if facts[FORM] == FORM_HALF_BYTES else 0
        for j in range(width):
            code = np.rint((x[i, j] - low[j]) / high[j])
            code = real.dtype.type(0) if not code > 0 else code
            code = real.dtype.type(levels) if code > levels else code
            whole = np.uint8(np.int32(code))
            codes[j] = (codes[j] | whole << shift) if shift else whole


@compiled(fast=False)
def epsilon(kind: Array) -> float:
    """The distance from 1 to the next larger number."""
    if kind.itemsize == 8:
        return 2.0**-52
    if kind.itemsize == 4:
        return 2.0**-23
    return 2.0**-7 if is_bfloat16(kind) else 2.0**-10


@compiled(fast=False)
def tiny(kind: Array) -> float:
    """The least normal number."""
    if kind.itemsize == 8:
        return 2.0**-1022
    return 2.0**-126 if kind.itemsize == 4 or is_bfloat16(kind) else 2.0**-14


@compiled(fast=False)
def is_bfloat16(kind: Array) -> bool:
    """Whether a half format reaches far."""
    return number(kept(np.float32(1e38), kind)) < np.inf


@shared(entry=True)
def move_columns(
    stored: Array, columns: int, first: int, n: int, heads: int, width: int, kind: Array
) -> None:
    """Move n columns from `first` on to the front, of all layers and heads: stored (2,layers)."""
    for layer in range(stored.shape[1]):
        for side in range(2):
            for head in range(heads):
                at = stored[side, layer] + head * columns * width * kind.itemsize
                rows = carray(pointer(at, kind), (columns, width))
                for i in range(n):
                    for j in range(width):
                        rows[i, j] = rows[first + i, j]


def forms(real: types.Type, kind: types.Type) -> Forms:
    """What makes codes of numbers of `kind`, which are computed with in `real`."""
    n, (k1, _, _), (n1, n2, n3) = types.intp, dense(kind), dense(types.intp)
    yield store_float8, (dense(real)[2], n, n, n1, n, n, k1)
    yield round_groups, (n2, n, n, n1, n, n, n, n, n3, k1, dense(real)[0])
    yield move_columns, (n2, n, n, n, n, n, k1)
