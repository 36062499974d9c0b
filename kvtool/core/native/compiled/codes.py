"""Dequantizing keys and values, compiled by numba.

Scales and zero points have the type of the result. Rounding is PyTorch's: after the product, after
the sum, and at last to a half format.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types

from kvtool.core.native.compiled.lanes import (
    WIDTH,
    codes_at,
    lanes_at,
    put_lanes,
    spread,
    times_plus,
)
from kvtool.core.native.compiled.layers import Place, seen_of
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
    vector,
)


@compiled(fast=False)
def decode_token(
    codes: int, shift: int, mask: int, scale: int, low: int, channels: int, width: int, y: int,
    kind: Array,
) -> None:  # fmt: skip
    """Dequantize one token of a head: y (width,) = code * scale + low, all four given as addresses.

    A code is the bits of its byte from `shift` on, under `mask`. scale and low (width/channels,)
    and y have the type of `kind`.
    """
    whole = width % WIDTH == 0 and (channels == 1 or channels % WIDTH == 0)
    if kind.itemsize == 4 and whole:
        for j in range(0, width, WIDTH):
            if channels == 1:
                factor, zero = lanes_at(scale + 4 * j), lanes_at(low + 4 * j)
            else:
                at = 4 * (j // channels)
                factor = spread(np.float32(number(vector(scale + at, 1, kind)[0])))
                zero = spread(np.float32(number(vector(low + at, 1, kind)[0])))
            put_lanes(times_plus(codes_at(codes + j, shift, mask), factor, zero), y + 4 * j)
        return
    stored, result = carray(pointer(codes, np.uint8), (width,)), vector(y, width, kind)
    scales, lows = vector(scale, width // channels, kind), vector(low, width // channels, kind)
    for j in range(width):
        code = np.float32((stored[j] >> shift) & mask)
        result[j] = kept(code * number(scales[j // channels]) + number(lows[j // channels]), kind)


@shared()
def read_codes(
    codes: Array, packing: Array, stored: Place, exact: int, shape: tuple[int, int, int, int],
    y: Array,
) -> Place:  # fmt: skip
    """Write the keys or values of `shape` (B,G,n,D) densely into y -> their place.

    codes (3,): addresses of the codes, scales and zero points (B,G,...) of the quantized columns,
    which come first. The rest are in `stored` from column `exact` on. packing (5,): the number of
    quantized columns, the room for them, codes per byte, and tokens and channels per scale. y has
    B*G*n*D numbers or more.
    """
    n_quantized, room, per_byte = packing[0], packing[1], packing[2]
    tokens, channels = packing[3], packing[4]
    batch, n_groups, n, width = shape
    mask, token_bytes = 255 if per_byte == 1 else 15, width * y.itemsize
    scale_bytes = width // channels * y.itemsize  # of one group of tokens
    for head in range(batch * n_groups):
        at = np.int64(y.ctypes.data) + head * n * token_bytes
        met = carray(pointer(at, y), (n, width))
        token = codes[0] + head * (room // per_byte) * width
        behind = head * (room // tokens) * scale_bytes
        scale, low = codes[1] + behind, codes[2] + behind
        for first in range(0, n_quantized, tokens):
            for i in range(first, first + tokens):
                shift = 4 * (i & (per_byte - 1))
                decode_token(token, shift, mask, scale, low, channels, width, at, y)
                token += width if per_byte == 1 or shift else 0
                at += token_bytes
            scale += scale_bytes
            low += scale_bytes
        row, group = head // n_groups, head % n_groups
        others = seen_of(stored, row, group, exact, exact + n - n_quantized, width)
        copy_rows(others, met[n_quantized:])
    return np.int64(y.ctypes.data), n_groups * n * token_bytes, n, y[:0]


def forms(kind: types.Type) -> Forms:
    """The functions of this file with their argument types, for a result of `kind`."""
    n, (like, *_) = types.intp, dense(kind)
    row, place = dense(n)[0], types.Tuple((n, n, n, like))
    yield read_codes, (row, row, place, n, types.UniTuple(n, 4), like)
