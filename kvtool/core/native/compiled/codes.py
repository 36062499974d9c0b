"""Keys and values that are codes, read in registers by code that numba compiles.

A code stands for code * scale + zero_point, computed in float32 (or float64) and rounded after the
product and after the sum, as PyTorch does. Scales and zero points are of the model's format.
Numbers in e4m3 have no zero point. quantize.py makes codes.

`coded` says where codes are (LENGTH of them 0: there are none), as whole numbers: the addresses of
codes, scales and zero points (B,G,...); of how many tokens there are codes, and is there room for;
the form of codes, FORM_BYTES, FORM_HALF_BYTES (two tokens in each) or FORM_FLOATS; how many tokens,
or channels of a token, share a scale; and the column of exact ones in which the next token stands.
"""

from __future__ import annotations

import numpy as np
from numba import carray

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
    compiled,
    number,
    pointer,
    vector,
)

CODES, SCALES, ZERO_POINTS, LENGTH, ROOM, FORM, TOKENS, CHANNELS, EXACT = range(9)
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
        zeros = vector(coded[ZERO_POINTS] + behind, width // coded[CHANNELS], like)
        for j in range(width):
            scale = number(scales[j // coded[CHANNELS]])
            if coded[FORM] == FORM_FLOATS:
                y[i, j] = y.dtype.type(float8(codes[j])) * scale
            else:
                code = y.dtype.type((codes[j] >> shift) & mask)
                y[i, j] = code * scale + number(zeros[j // coded[CHANNELS]])


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
    wide_scales, wide_zeros = np.empty(width, query.dtype), np.empty(width, query.dtype)
    first = begin
    while first < end:
        last = min(end, (first // tokens + 1) * tokens)
        behind = scale_of(coded, head, first, width, like.itemsize)
        scales = widened(coded[SCALES] + behind, width, like, wide_scales)
        zeros = widened(coded[ZERO_POINTS] + behind, width, like, wide_zeros)
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
                s, zero = lanes_at(scales + j * size, query), lanes_at(zeros + j * size, query)
                w = multiply_add(q, value_of(code_at(a + j, even, query), s, zero, even, like), w)
                x = multiply_add(q, value_of(code_at(b + j, odd, query), s, zero, odd, like), x)
                y = multiply_add(q, value_of(code_at(c + j, even, query), s, zero, even, like), y)
                z = multiply_add(q, value_of(code_at(d + j, odd, query), s, zero, odd, like), z)
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
    wide_scales, wide_zeros = np.empty(BLOCK * each, y.dtype), np.empty(BLOCK * each, y.dtype)
    scales = zeros = np.int64(0)
    size, of_token = y.itemsize, each * y.itemsize
    for i in range(0, n, 8):
        t = begin + i
        if i % BLOCK == 0:
            behind, held = scale_of(coded, head, t, width, like.itemsize), min(BLOCK, n - i) * each
            scales = widened(coded[SCALES] + behind, held, like, wide_scales)
            zeros = widened(coded[ZERO_POINTS] + behind, held, like, wide_zeros)
        w0, w1, w2, w3 = spread(w[i]), spread(w[i + 1]), spread(w[i + 2]), spread(w[i + 3])
        w4, w5, w6, w7 = spread(w[i + 4]), spread(w[i + 5]), spread(w[i + 6]), spread(w[i + 7])
        v0, v1 = start + (t >> half) * width, start + (t + 1 >> half) * width
        v2, v3 = start + (t + 2 >> half) * width, start + (t + 3 >> half) * width
        v4, v5 = start + (t + 4 >> half) * width, start + (t + 5 >> half) * width
        v6, v7 = start + (t + 6 >> half) * width, start + (t + 7 >> half) * width
        for c in range(0, width, channels):
            s = scales + i % BLOCK * of_token + c // channels * size
            z = zeros + i % BLOCK * of_token + c // channels * size
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
