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
from numba import carray, from_dtype, types

from kvtool.core.native.compiled.code_tiles import add_tokens, score_tokens
from kvtool.core.native.compiled.lanes import (
    FLOAT8_UNIT,
    WIDTH,
    lanes_at,
    multiply_add,
    plus,
    put_lanes,
    put_totals,
    spread,
    times,
)
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    dense,
    number,
    pointer,
    shared,
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


@shared(fast=False)
def decode_tokens(
    coded: Array, head: int, first: int, n: int, width: int, like: Array, y: Array
) -> None:
    """The first rows of y (..,W) = n tokens from `first` on, as numbers to compute with, `width`
    each; `like` is of the type of the scales."""
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
    queries: Array, coded: Array, head: int, width: int, begin: int, end: int, like: Array,
    scores: Array,
) -> None:  # fmt: skip
    """scores (m,n+3) of queries (m,W), zeros behind their numbers, and the keys of tokens `begin`
    to `end`, which are codes: by channel, or in e4m3; the last three are used."""
    if queries.shape[1] != width:  # keys do not fill lanes
        few = np.zeros((4, queries.shape[1]), queries.dtype)
        for t in range(begin, end, 4):
            decode_tokens(coded, head, t, min(4, end - t), width, like, few)
            score_few(queries, few, width, scores, t - begin)
    elif coded[FORM] == FORM_FLOATS:
        score_runs(queries, coded, head, begin, end, 0, like, scores, FLOATS, FLOATS)
    elif coded[FORM] == FORM_BYTES:
        score_runs(queries, coded, head, begin, end, 0, like, scores, BYTES, BYTES)
    else:
        first = begin
        if begin % 2 and begin < end:  # its byte is shared with a token that is not seen
            few = np.zeros((4, width), queries.dtype)
            decode_tokens(coded, head, begin, 1, width, like, few)
            score_few(queries, few, width, scores, 0)
            first = begin + 1
        score_runs(
            queries, coded, head, first, end, first - begin, like, scores, LOW_HALVES, HIGH_HALVES
        )


@compiled(fast=False)
def score_few(queries: Array, keys: Array, width: int, scores: Array, column: int) -> None:
    """Of queries (m,W) and keys (4,W), of `width` numbers, the scores (m,n) from `column` on."""
    scale = queries.dtype.type(1 / np.sqrt(width))
    at, size = np.int64(keys.ctypes.data), keys.shape[1] * keys.itemsize
    for i in range(queries.shape[0]):
        to = np.int64(scores.ctypes.data) + (i * scores.shape[1] + column) * scores.itemsize
        dot_four(queries[i], at, at + size, at + 2 * size, at + 3 * size, keys, scale, to)


@compiled(fast=False)
def widened(address: int, n: int, like: Array, y: Array, unit: float) -> int:
    """The address of n numbers as they are computed with, times `unit`; there is room in y."""
    if like.itemsize == y.itemsize and unit == 1:
        return address
    at, whole, factor = np.int64(y.ctypes.data), n // WIDTH * WIDTH, spread(y.dtype.type(unit))
    for i in range(0, whole, WIDTH):
        put_lanes(times(lanes_at(address + i * like.itemsize, like), factor), at + i * y.itemsize)
    rest = vector(address, n, like)
    for i in range(whole, n):
        y[i] = number(rest[i]) * y.dtype.type(unit)
    return at


@shared(fast=False)
def score_runs(
    queries: Array, coded: Array, head: int, begin: int, end: int, column: int, like: Array,
    scores: Array, even: Array, odd: Array,
) -> None:  # fmt: skip
    """`score_codes` from `column` on, where keys fill lanes: `even` and `odd` are the forms of the
    first token and the next, and so on. Scales are widened together, those of the channels of a
    group of tokens or, in e4m3, those of BLOCK tokens."""
    (m, width), size = queries.shape, queries.itemsize
    of_token, shared_by = coded[FORM] == FORM_FLOATS, is_half(odd)
    together = BLOCK if of_token else coded[TOKENS]
    wide_scales = np.empty(max(BLOCK, width), queries.dtype)
    wide_zeros = np.empty(width, queries.dtype)
    q, q_step, to_step = np.int64(queries.ctypes.data), width * size, scores.shape[1] * size
    start, scale = row_of(coded, head, 0, width), queries.dtype.type(1 / np.sqrt(width))
    first, zeros = begin, np.int64(0)
    while first < end:
        last = min(end, (first // together + 1) * together)
        behind = scale_of(coded, head, first, width, like.itemsize)
        n_scales, unit = (last - first, FLOAT8_UNIT) if of_token else (width, 1.0)
        scales = widened(coded[SCALES] + behind, n_scales, like, wide_scales, unit)
        if not of_token:
            zeros = widened(coded[ZERO_POINTS] + behind, width, like, wide_zeros, 1.0)
        to = np.int64(scores.ctypes.data) + (column + first - begin) * size
        score_tokens(
            m, q, q_step, width, start + (first >> shared_by) * width, width, last - first, scales,
            zeros, scale, to, to_step, even, odd, like, queries,
        )  # fmt: skip
        first = last


@compiled(fast=False)
def add_codes(
    w: Array, coded: Array, head: int, width: int, begin: int, n: int, like: Array, y: Array
) -> None:
    """y (m,W) += the sums of the values of n tokens from `begin` on, whole eights, each times its
    weights w (m,..): values are codes with scales of their own."""
    if y.shape[1] != width or coded[CHANNELS] % WIDTH:
        few = np.zeros((8, y.shape[1]), y.dtype)
        for i in range(0, n, 8):
            decode_tokens(coded, head, begin + i, 8, width, like, few)
            for row in range(y.shape[0]):
                add_eight(w[row, i : i + 8], few, y[row])
    elif coded[FORM] == FORM_FLOATS:
        add_runs(w, coded, head, begin, n, like, y, FLOATS, FLOATS)
    elif coded[FORM] == FORM_BYTES:
        add_runs(w, coded, head, begin, n, like, y, BYTES, BYTES)
    elif begin % 2:
        add_runs(w, coded, head, begin, n, like, y, HIGH_HALVES, LOW_HALVES)
    else:
        add_runs(w, coded, head, begin, n, like, y, LOW_HALVES, HIGH_HALVES)


@compiled(fast=False)
def add_eight(w: Array, values: Array, y: Array) -> None:
    """y (W,) += the sum of eight values (8,W), whole lanes, each times its weight w (8,)."""
    at, size = np.int64(values.ctypes.data), values.shape[1] * values.itemsize
    for j in range(0, y.shape[0], WIDTH):
        v = at + j * y.itemsize
        a, b = times(spread(w[0]), lanes_at(v, y)), times(spread(w[4]), lanes_at(v + 4 * size, y))
        for i in range(1, 4):
            a = multiply_add(spread(w[i]), lanes_at(v + i * size, y), a)
            b = multiply_add(spread(w[4 + i]), lanes_at(v + (4 + i) * size, y), b)
        there = np.int64(y.ctypes.data) + j * y.itemsize
        put_lanes(plus(lanes_at(there, y), plus(a, b)), there)


@compiled(fast=False)
def is_half(form: Array) -> int:
    """1 if two tokens share a byte, else 0."""
    return 1 if 1 < form.itemsize < 8 else 0


@shared(fast=False)
def add_runs(
    w: Array, coded: Array, head: int, begin: int, n: int, like: Array, y: Array, even: Array,
    odd: Array,
) -> None:  # fmt: skip
    """`add_codes` where values fill lanes; `even` and `odd` as in `score_runs`."""
    (m, width), size, channels = y.shape, y.itemsize, coded[CHANNELS]
    each, shared_by = width // channels, is_half(odd)
    of_token, unit = coded[FORM] == FORM_FLOATS, 1.0
    if of_token:
        unit = FLOAT8_UNIT
    wide_scales, wide_zeros = np.empty(BLOCK * each, y.dtype), np.empty(BLOCK * each, y.dtype)
    start, zeros = row_of(coded, head, 0, width), np.int64(0)
    for i in range(0, n, BLOCK):
        t, held = begin + i, min(BLOCK, n - i)
        behind = scale_of(coded, head, t, width, like.itemsize)
        scales = widened(coded[SCALES] + behind, held * each, like, wide_scales, unit)
        if not of_token:
            zeros = widened(coded[ZERO_POINTS] + behind, held * each, like, wide_zeros, 1.0)
        add_tokens(
            m, np.int64(w.ctypes.data) + i * size, w.shape[1] * size, width,
            start + (t >> shared_by) * width, width, held, scales, zeros, each * size, channels,
            np.int64(y.ctypes.data), width * size, even, odd, like, y,
        )  # fmt: skip


def forms(real: types.Type, kind: types.Type) -> Forms:
    """What reads codes whose scales are of `kind`, with queries in `real`."""
    n, x2, coded, like = types.intp, dense(real)[1], dense(types.intp)[0], dense(kind)[0]
    whole = [(as_constant(codes), as_constant(codes)) for codes in (BYTES, FLOATS)]
    low, high = as_constant(LOW_HALVES), as_constant(HIGH_HALVES)
    yield decode_tokens, (coded, n, n, n, n, like, x2)
    for codes in (*whole, (low, high)):
        yield score_runs, (x2, coded, n, n, n, n, like, x2, *codes)
    for codes in (*whole, (low, high), (high, low)):
        yield add_runs, (x2, coded, n, n, n, like, x2, *codes)


def as_constant(x: Array) -> types.Type:
    """numba's type of a global array."""
    return types.Array(from_dtype(x.dtype), 1, "C", readonly=True)
