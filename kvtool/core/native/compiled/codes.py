"""Keys and values that are codes, compiled by numba: read in registers, and made.

A code stands for code * scale + low, computed in float32 (or float64) and rounded after the product
and after the sum, as PyTorch does; scales and zero points are of the format of the model. Numbers
in e4m3 have no zero point.

`coded` says where codes are (LENGTH of them 0: there are none), as whole numbers: the addresses of
codes, scales and zero points (B,G,...); of how many tokens there are codes, and is there room for;
the form of codes, FORM_BYTES, FORM_HALF_BYTES (two tokens in each) or FORM_FLOATS; how many tokens,
or channels of a token, share a scale; and the column of exact ones in which the next token stands.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, types

from kvtool.core.native.compiled.lanes import (
    WIDTH,
    code_at,
    lanes_at,
    multiply_add,
    plus,
    put_lanes,
    put_totals,
    scale_at,
    spread,
    spread_at,
    times,
    value_of,
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

CODES, SCALES, LOWS, LENGTH, ROOM, FORM, TOKENS, CHANNELS, EXACT = range(9)
N_FACTS = 9
FORM_BYTES, FORM_HALF_BYTES, FORM_FLOATS = 1, 2, 3


# By their types, the forms to compile for: two tokens share a byte's halves.
BYTES, LOW_HALVES, HIGH_HALVES, FLOATS = (
    np.empty(0, dtype) for dtype in (np.uint8, np.uint16, np.uint32, np.uint64)
)
BLOCK = 64  # tokens whose scales are widened together


@compiled(fast=False)
def dot_four(
    query: Array, a: int, b: int, c: int, d: int, like: Array, scale: float, to: int
) -> None:
    """At address `to` the products of a query (W,), whole lanes, with the keys at a, b, c and d,
    times the scale."""
    none, at, size = spread(query.dtype.type(0)), np.int64(query.ctypes.data), like.itemsize
    w, x, y, z = none, none, none, none
    for j in range(0, query.shape[0], WIDTH):
        q = lanes_at(at + j * query.itemsize, query)
        w = multiply_add(q, lanes_at(a + j * size, like), w)
        x = multiply_add(q, lanes_at(b + j * size, like), x)
        y = multiply_add(q, lanes_at(c + j * size, like), y)
        z = multiply_add(q, lanes_at(d + j * size, like), z)
    put_totals(w, x, y, z, scale, to)


@compiled(fast=False)
def row_of(coded: Array, head: int, token: int, width: int) -> int:
    """The address of a token's codes."""
    if coded[FORM] == FORM_HALF_BYTES:
        return coded[CODES] + (head * (coded[ROOM] // 2) + token // 2) * width
    return coded[CODES] + (head * coded[ROOM] + token) * width


@compiled(fast=False)
def scale_of(coded: Array, head: int, token: int, width: int, size: int) -> int:
    """Where the scale of a token's first channel is, from the first of all scales on; zero points
    are as far from theirs. size: bytes of a number."""
    of_token = width // coded[CHANNELS]
    return (head * (coded[ROOM] // coded[TOKENS]) + token // coded[TOKENS]) * of_token * size


@compiled(fast=False)
def float8(code: int) -> float:
    """A number in e4m3 (Micikevicius 2022, arXiv 2209.05433)."""
    exponent, digits = (code >> 3) & 15, code & 7
    size = np.ldexp(np.float64(digits + 8 * (exponent > 0)), max(exponent, 1) - 10)
    return -size if code & 128 else size


@compiled(fast=False)
def decode_tokens(coded: Array, head: int, first: int, like: Array, y: Array) -> None:
    """y (n,D) = the tokens from `first` on, as numbers to compute with; `like` is of the type of
    the scales."""
    n, width = y.shape
    for i in range(n):
        token = first + i
        codes = carray(pointer(row_of(coded, head, token, width), BYTES), (width,))
        shift = 4 * (token & 1) if coded[FORM] == FORM_HALF_BYTES else 0
        mask = 15 if coded[FORM] == FORM_HALF_BYTES else 255
        behind = scale_of(coded, head, token, width, like.itemsize)
        scales = vector(coded[SCALES] + behind, width // coded[CHANNELS], like)
        lows = vector(coded[LOWS] + behind, width // coded[CHANNELS], like)
        for j in range(width):
            scale = number(scales[j // coded[CHANNELS]])
            if coded[FORM] == FORM_FLOATS:
                y[i, j] = y.dtype.type(float8(codes[j])) * scale
            else:
                code = y.dtype.type((codes[j] >> shift) & mask)
                y[i, j] = code * scale + number(lows[j // coded[CHANNELS]])


@compiled(fast=False)
def score_codes(
    query: Array, coded: Array, head: int, width: int, begin: int, end: int, like: Array,
    scores: Array,
) -> None:  # fmt: skip
    """scores (n+3,) of a query (W,), zeros behind its numbers, and the keys of tokens `begin` to
    `end`, which are codes: by channel, or in e4m3; the last three are used."""
    scale, to = query.dtype.type(1 / np.sqrt(width)), np.int64(scores.ctypes.data)
    if query.shape[0] != width:  # keys do not fill lanes
        few = np.zeros((4, query.shape[0]), query.dtype)
        at, size = np.int64(few.ctypes.data), query.size * query.itemsize
        for t in range(begin, end, 4):
            decode_tokens(coded, head, t, like, few[: min(4, end - t), :width])
            dot_four(query, at, at + size, at + 2 * size, at + 3 * size, query, scale, to)
            to += 4 * query.itemsize
    elif coded[FORM] == FORM_FLOATS:
        score_floats(query, coded, head, begin, end, like, scale, to)
    elif coded[FORM] == FORM_BYTES:
        score_by_channel(query, coded, head, begin, end, like, scale, to, BYTES, BYTES)
    else:
        if begin % 2 and begin < end:  # its byte is shared with a token that is not seen
            few = np.zeros((1, width), query.dtype)
            decode_tokens(coded, head, begin, like, few)
            at = np.int64(few.ctypes.data)
            dot_four(query, at, at, at, at, query, scale, to)
            begin, to = begin + 1, to + query.itemsize
        score_by_channel(query, coded, head, begin, end, like, scale, to, LOW_HALVES, HIGH_HALVES)


@compiled(fast=False)
def widened(address: int, n: int, like: Array, y: Array) -> int:
    """The address of n numbers as they are computed with, for which there is room in y."""
    if like.itemsize == y.itemsize:
        return address
    at, whole = np.int64(y.ctypes.data), n // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        put_lanes(lanes_at(address + i * like.itemsize, like), at + i * y.itemsize)
    rest = vector(address, n, like)
    for i in range(whole, n):
        y[i] = number(rest[i])
    return at


@compiled(fast=False)
def score_by_channel(
    query: Array, coded: Array, head: int, begin: int, end: int, like: Array, scale: float,
    to: int, even: Array, odd: Array,
) -> None:  # fmt: skip
    """`score_codes` where the tokens of a group share the scales of each channel: `even` and `odd`
    are the forms of the first and the next token, and so on."""
    width, tokens, shared_by = query.shape[0], coded[TOKENS], is_half(odd)
    none, at = spread(query.dtype.type(0)), np.int64(query.ctypes.data)
    start, size = row_of(coded, head, 0, width), query.itemsize
    wide_scales, wide_lows = np.empty(width, query.dtype), np.empty(width, query.dtype)
    first = begin
    while first < end:
        last = min(end, (first // tokens + 1) * tokens)
        behind = scale_of(coded, head, first, width, like.itemsize)
        scales = widened(coded[SCALES] + behind, width, like, wide_scales)
        lows = widened(coded[LOWS] + behind, width, like, wide_lows)
        for t in range(first, last, 4):
            # Of those that are not there, others are read; their scores are written over.
            two = t + 2 if t + 2 < last else t
            a = start + (t >> shared_by) * width
            b = start + ((t + 1 if t + 1 < last else t) >> shared_by) * width
            c = start + (two >> shared_by) * width
            d = start + ((t + 3 if t + 3 < last else two) >> shared_by) * width
            w, x, y, z = none, none, none, none
            for j in range(0, width, WIDTH):
                q = lanes_at(at + j * size, query)
                s, low = lanes_at(scales + j * size, query), lanes_at(lows + j * size, query)
                w = multiply_add(q, value_of(code_at(a + j, even, query), s, low, even, like), w)
                x = multiply_add(q, value_of(code_at(b + j, odd, query), s, low, odd, like), x)
                y = multiply_add(q, value_of(code_at(c + j, even, query), s, low, even, like), y)
                z = multiply_add(q, value_of(code_at(d + j, odd, query), s, low, odd, like), z)
            put_totals(w, x, y, z, scale, to + (t - begin) * size)
        first = last


@compiled(fast=False)
def score_floats(
    query: Array, coded: Array, head: int, begin: int, end: int, like: Array, scale: float, to: int
) -> None:
    """`score_codes` in e4m3, where each token has one scale."""
    width, size = query.shape[0], like.itemsize
    none, at = spread(query.dtype.type(0)), np.int64(query.ctypes.data)
    for t in range(begin, end, 4):
        t1, t2, t3 = min(t + 1, end - 1), min(t + 2, end - 1), min(t + 3, end - 1)
        first = coded[SCALES] + head * coded[ROOM] * size
        s0 = scale_at(first + t * size, FLOATS, like)
        s1 = scale_at(first + t1 * size, FLOATS, like)
        s2 = scale_at(first + t2 * size, FLOATS, like)
        s3 = scale_at(first + t3 * size, FLOATS, like)
        codes = coded[CODES] + head * coded[ROOM] * width
        a, b, c, d = codes + t * width, codes + t1 * width, codes + t2 * width, codes + t3 * width
        w, x, y, z = none, none, none, none
        for j in range(0, width, WIDTH):
            q = lanes_at(at + j * query.itemsize, query)
            w = multiply_add(q, times(code_at(a + j, FLOATS, query), s0), w)
            x = multiply_add(q, times(code_at(b + j, FLOATS, query), s1), x)
            y = multiply_add(q, times(code_at(c + j, FLOATS, query), s2), y)
            z = multiply_add(q, times(code_at(d + j, FLOATS, query), s3), z)
        put_totals(w, x, y, z, scale, to + (t - begin) * query.itemsize)


@compiled(fast=False)
def add_codes(
    w: Array, coded: Array, head: int, width: int, begin: int, n: int, like: Array, y: Array
) -> None:
    """y (W,) += the sum of the values of n tokens from `begin` on, whole eights, each times its
    weight w (n,): values are codes with scales of their own."""
    if y.shape[0] != width or coded[CHANNELS] % WIDTH:
        few = np.zeros((8, y.shape[0]), y.dtype)
        for i in range(0, n, 8):
            decode_tokens(coded, head, begin + i, like, few[:, :width])
            at, size = np.int64(few.ctypes.data), few.shape[1] * y.itemsize
            for j in range(0, y.shape[0], WIDTH):
                v = at + j * y.itemsize
                a = times(spread(w[i]), lanes_at(v, y))
                a = multiply_add(spread(w[i + 1]), lanes_at(v + size, y), a)
                a = multiply_add(spread(w[i + 2]), lanes_at(v + 2 * size, y), a)
                a = multiply_add(spread(w[i + 3]), lanes_at(v + 3 * size, y), a)
                b = times(spread(w[i + 4]), lanes_at(v + 4 * size, y))
                b = multiply_add(spread(w[i + 5]), lanes_at(v + 5 * size, y), b)
                b = multiply_add(spread(w[i + 6]), lanes_at(v + 6 * size, y), b)
                b = multiply_add(spread(w[i + 7]), lanes_at(v + 7 * size, y), b)
                there = np.int64(y.ctypes.data) + j * y.itemsize
                put_lanes(plus(lanes_at(there, y), plus(a, b)), there)
    elif coded[FORM] == FORM_FLOATS:
        add_by_token(w, coded, head, begin, n, like, y, FLOATS, FLOATS)
    elif coded[FORM] == FORM_BYTES:
        add_by_token(w, coded, head, begin, n, like, y, BYTES, BYTES)
    elif begin % 2:
        add_by_token(w, coded, head, begin, n, like, y, HIGH_HALVES, LOW_HALVES)
    else:
        add_by_token(w, coded, head, begin, n, like, y, LOW_HALVES, HIGH_HALVES)


@compiled(fast=False)
def is_half(form: Array) -> int:
    """1 if two tokens share a byte, else 0."""
    return 1 if 1 < form.itemsize < 8 else 0


@compiled(fast=False)
def add_by_token(
    w: Array, coded: Array, head: int, begin: int, n: int, like: Array, y: Array, even: Array,
    odd: Array,
) -> None:  # fmt: skip
    """`add_codes`, `even` and `odd` the forms of the first and the next token, and so on."""
    width, channels, each = y.shape[0], coded[CHANNELS], y.shape[0] // coded[CHANNELS]
    goal, start, half = np.int64(y.ctypes.data), row_of(coded, head, 0, width), is_half(odd)
    wide_scales, wide_lows = np.empty(BLOCK * each, y.dtype), np.empty(BLOCK * each, y.dtype)
    scales = lows = np.int64(0)
    size, of_token = y.itemsize, each * y.itemsize
    for i in range(0, n, 8):
        t = begin + i
        if i % BLOCK == 0:
            behind, held = scale_of(coded, head, t, width, like.itemsize), min(BLOCK, n - i) * each
            scales = widened(coded[SCALES] + behind, held, like, wide_scales)
            lows = widened(coded[LOWS] + behind, held, like, wide_lows)
        w0, w1, w2, w3 = spread(w[i]), spread(w[i + 1]), spread(w[i + 2]), spread(w[i + 3])
        w4, w5, w6, w7 = spread(w[i + 4]), spread(w[i + 5]), spread(w[i + 6]), spread(w[i + 7])
        v0, v1 = start + (t >> half) * width, start + (t + 1 >> half) * width
        v2, v3 = start + (t + 2 >> half) * width, start + (t + 3 >> half) * width
        v4, v5 = start + (t + 4 >> half) * width, start + (t + 5 >> half) * width
        v6, v7 = start + (t + 6 >> half) * width, start + (t + 7 >> half) * width
        for c in range(0, width, channels):
            s = scales + i % BLOCK * of_token + c // channels * size
            z = lows + i % BLOCK * of_token + c // channels * size
            s0, z0 = scale_at(s, even, y), spread_at(z, y)
            s1, z1 = scale_at(s + of_token, even, y), spread_at(z + of_token, y)
            s2, z2 = scale_at(s + 2 * of_token, even, y), spread_at(z + 2 * of_token, y)
            s3, z3 = scale_at(s + 3 * of_token, even, y), spread_at(z + 3 * of_token, y)
            s4, z4 = scale_at(s + 4 * of_token, even, y), spread_at(z + 4 * of_token, y)
            s5, z5 = scale_at(s + 5 * of_token, even, y), spread_at(z + 5 * of_token, y)
            s6, z6 = scale_at(s + 6 * of_token, even, y), spread_at(z + 6 * of_token, y)
            s7, z7 = scale_at(s + 7 * of_token, even, y), spread_at(z + 7 * of_token, y)
            for j in range(c, c + channels, WIDTH):
                a = times(w0, value_of(code_at(v0 + j, even, y), s0, z0, even, like))
                a = multiply_add(w1, value_of(code_at(v1 + j, odd, y), s1, z1, odd, like), a)
                a = multiply_add(w2, value_of(code_at(v2 + j, even, y), s2, z2, even, like), a)
                a = multiply_add(w3, value_of(code_at(v3 + j, odd, y), s3, z3, odd, like), a)
                b = times(w4, value_of(code_at(v4 + j, even, y), s4, z4, even, like))
                b = multiply_add(w5, value_of(code_at(v5 + j, odd, y), s5, z5, odd, like), b)
                b = multiply_add(w6, value_of(code_at(v6 + j, even, y), s6, z6, even, like), b)
                b = multiply_add(w7, value_of(code_at(v7 + j, odd, y), s7, z7, odd, like), b)
                there = goal + j * y.itemsize
                put_lanes(plus(lanes_at(there, y), plus(a, b)), there)


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


@compiled(fast=False)
def store_float8(x: Array, coded: Array, slot: int, n_each: int, kind: Array) -> None:
    """Tokens x (n,G,D), n_each of a row, as codes from column `slot` on, each with the power of two
    that core/cache/float8.py gives it."""
    n, n_groups, width = x.shape
    bits, least = np.empty(1, np.float32), max(tiny(kind), 512 * tiny(kind) * epsilon(kind))
    for i in range(n):
        row, token = i // n_each, slot + i % n_each
        for group in range(n_groups):
            head = row * n_groups + group
            codes = carray(pointer(row_of(coded, head, token, width), BYTES), (width,))
            largest, finite = x.dtype.type(0), True
            for j in range(width):
                size = abs(x[i, group, j])
                finite = finite and size < np.inf
                largest = size if size > largest else largest
            digits, exponent = math.frexp(largest)
            scale = max(math.ldexp(1.0, exponent - (8 if digits > 0.875 else 9)), least)
            factor = x.dtype.type(scale if finite else np.nan)
            at = coded[SCALES] + (head * coded[ROOM] + token) * kind.itemsize
            vector(at, 1, kind)[0] = kept(factor, kind)
            for j in range(width):
                codes[j] = float8_of(np.float32(x[i, group, j] / factor), bits) if finite else 0


@shared(fast=False)
def round_groups(
    stored: Array, columns: int, column: int, padding: Array, first: int, n: int, n_groups: int,
    width: int, coded: Array, kind: Array, real: Array,
) -> None:  # fmt: skip
    """Make codes of n tokens, whole groups from token number `first` on, of all rows and layers:
    stored (2,layers) as `decode` has it, from `column` on. As Packed.write in
    core/cache/quantized.py, of padding (B,) too."""
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
    lows = vector(facts[LOWS] + behind, width // channels, kind)
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
        scales[c], lows[c] = kept(scale, kind), kept(low[at] + odd[at], kind)
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


@shared()
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
    yield round_groups, (n2, n, n, n1, n, n, n, n, n3, k1, dense(real)[0])
    yield move_columns, (n2, n, n, n, n, n, k1)
