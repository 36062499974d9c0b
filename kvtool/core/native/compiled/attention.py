"""Attention of a query over keys and values, compiled by numba: numbers, codes, or both.

Every sum has one order: a query's products with a key in sixteen lanes, and values in eights. So
the same keys give the same bits in any memory, whether they were codes or are numbers by now.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import carray, types
from numba import from_dtype as from_dtype

from kvtool.core.native.compiled import codes, layers, prompts
from kvtool.core.native.compiled.code_tiles import queries_at_once
from kvtool.core.native.compiled.codes import (
    EXACT,
    LENGTH,
    add_codes,
    decode_tokens,
    dot_four,
    score_codes,
)
from kvtool.core.native.compiled.lanes import (
    WIDTH,
    highest,
    lanes_at,
    larger,
    multiply_add,
    plus,
    put_lanes,
    spread,
    times,
)
from kvtool.core.native.compiled.layers import ACTIVATIONS as ACTIVATIONS
from kvtool.core.native.compiled.layers import MAX_THREADS as MAX_THREADS
from kvtool.core.native.compiled.layers import activate as activate
from kvtool.core.native.compiled.layers import exponential as exponential
from kvtool.core.native.compiled.layers import normalise as normalise
from kvtool.core.native.compiled.layers import product as product
from kvtool.core.native.compiled.tools import CONVERTS_FLOAT16 as CONVERTS_FLOAT16
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    copy_rows,
    dense,
    number,
    pointer,
    shared,
    use_threads,
)

# Of keys or values: an address, a row's bytes, a head's columns, an array of their type, and the
# codes that come before them, as in codes.py.
Stored = tuple[int, int, int, Array, Array]


@compiled(fast=False)
def copy_numbers(x: Array, y: Array) -> None:
    """y (n,D...) = x (n,D), as numbers to compute with; what is behind them stays."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = number(x[i, j])


@shared(fast=False)
def score(query: Array, keys: Array, scores: Array) -> None:
    """scores (n+3,) of a query (W,), zeros behind its D numbers, and keys (n,D); the last three are
    used."""
    n, width = keys.shape
    scale = query.dtype.type(1 / np.sqrt(width))
    at, size = np.int64(keys.ctypes.data), width * keys.itemsize
    to = np.int64(scores.ctypes.data)
    if width == query.shape[0]:
        for i in range(0, n, 4):
            a, b = at + i * size, at + min(i + 1, n - 1) * size
            c, d = at + min(i + 2, n - 1) * size, at + min(i + 3, n - 1) * size
            dot_four(query, a, b, c, d, keys, scale, to + i * query.itemsize)
        return
    few = np.zeros((4, query.shape[0]), query.dtype)
    at, size = np.int64(few.ctypes.data), query.size * query.itemsize
    for i in range(0, n, 4):
        copy_numbers(keys[i : i + 4], few)
        a, b, c, d = at, at + size, at + 2 * size, at + 3 * size
        dot_four(query, a, b, c, d, query, scale, to + i * query.itemsize)


@shared(fast=False)
def add_values(w: Array, v: Array, y: Array) -> None:
    """y (W,) += the sum of the values v (n,D), each times its weight w (n,): eights first."""
    n, width = v.shape
    at, size, wide = np.int64(v.ctypes.data), width * v.itemsize, y.shape[0]
    if width == wide:
        add_numbers(w, at, size, n, v, y)
        return
    few = np.zeros((8, wide), y.dtype)
    for i in range(0, n, 8):
        copy_numbers(v[i : i + 8], few)
        add_numbers(w[i : i + 8], np.int64(few.ctypes.data), wide * y.itemsize, min(8, n - i), y, y)


@compiled(fast=False)
def add_numbers(w: Array, at: int, size: int, n: int, like: Array, y: Array) -> None:
    """`add_values` for values at an address, `size` bytes each."""
    goal, whole = np.int64(y.ctypes.data), n // 8 * 8
    for i in range(0, whole, 8):  # together, or each would wait for y of the one before
        w0, w1, w2, w3 = spread(w[i]), spread(w[i + 1]), spread(w[i + 2]), spread(w[i + 3])
        w4, w5, w6, w7 = spread(w[i + 4]), spread(w[i + 5]), spread(w[i + 6]), spread(w[i + 7])
        for j in range(0, y.shape[0], WIDTH):
            v, there = at + i * size + j * like.itemsize, goal + j * y.itemsize
            a = times(w0, lanes_at(v, like))
            a = multiply_add(w1, lanes_at(v + size, like), a)
            a = multiply_add(w2, lanes_at(v + 2 * size, like), a)
            a = multiply_add(w3, lanes_at(v + 3 * size, like), a)
            b = times(w4, lanes_at(v + 4 * size, like))
            b = multiply_add(w5, lanes_at(v + 5 * size, like), b)
            b = multiply_add(w6, lanes_at(v + 6 * size, like), b)
            b = multiply_add(w7, lanes_at(v + 7 * size, like), b)
            put_lanes(plus(lanes_at(there, y), plus(a, b)), there)
    for i in range(whole, n):
        weight = spread(w[i])
        for j in range(0, y.shape[0], WIDTH):
            there = goal + j * y.itemsize
            v = lanes_at(at + i * size + j * like.itemsize, like)
            put_lanes(multiply_add(weight, v, lanes_at(there, y)), there)


@shared()
def weigh(scores: Array) -> float:
    """scores (n,) become e to their powers, the largest 1 -> their sum."""
    largest = largest_of(scores)
    for i in range(scores.shape[0]):
        scores[i] -= largest
    exponential(scores)
    total = scores.dtype.type(0)
    for i in range(scores.shape[0]):
        total += scores[i]
    return total


@compiled(fast=False)
def largest_of(scores: Array) -> float:
    """The largest of scores (n,), in lanes: LLVM goes one by one, since one may be no number."""
    n, size, at = scores.shape[0], scores.itemsize, np.int64(scores.ctypes.data)
    whole = n // (4 * WIDTH) * 4 * WIDTH
    a = b = c = d = spread(scores.dtype.type(-np.inf))
    for i in range(0, whole, 4 * WIDTH):
        a = larger(lanes_at(at + i * size, scores), a)
        b = larger(lanes_at(at + (i + WIDTH) * size, scores), b)
        c = larger(lanes_at(at + (i + 2 * WIDTH) * size, scores), c)
        d = larger(lanes_at(at + (i + 3 * WIDTH) * size, scores), d)
    largest = highest(larger(larger(a, b), larger(c, d)))
    for i in range(whole, n):
        largest = scores[i] if scores[i] > largest else largest
    return largest


@shared()
def attend_head(
    query: Array, first_keys: Array, first_values: Array, keys: Array, values: Array, result: Array
) -> None:
    """One query (D,) over the first keys and values (m,D), m whole eights, and more of them (n,D)
    -> result (D,), NaN if there are none: the same bits however they are divided."""
    n_first = first_keys.shape[0]
    n_keys = n_first + keys.shape[0]
    wide, y = padded(query)
    scores = np.empty(n_keys + 3, query.dtype)
    score(wide, first_keys, scores)
    score(wide, keys, scores[n_first:])
    total = weigh(scores[:n_keys])
    add_values(scores[:n_first], first_values, y)
    add_values(scores[n_first:n_keys], values, y)
    divide(y, total, result)


@compiled(fast=False)
def divide(y: Array, total: float, result: Array) -> None:
    """result (n,) = the first of y, over the total: not times its reciprocal, as LLVM would choose
    here and not there."""
    for j in range(result.shape[0]):
        result[j] = y[j] / total


@compiled(fast=False)
def padded(query: Array) -> tuple[Array, Array]:
    """A query (D,) with zeros behind it, so that it fills lanes (W,), and zeros (W,)."""
    n = -(-query.shape[0] // WIDTH) * WIDTH
    wide = np.zeros(n, query.dtype)
    for j in range(query.shape[0]):
        wide[j] = query[j]
    return wide, np.zeros(n, query.dtype)


@shared()
def attend_codes(
    queries: Array, k: Stored, v: Stored, row: int, group: int, n_groups: int, first: int,
    last: int, results: Array,
) -> None:  # fmt: skip
    """As `attend_head` for queries (m,D) of a group of heads, over the tokens from `first` to
    `last` of a row, of which the first are codes; these are never written out, but for those beyond
    whole eights."""
    head, (m, width) = row * n_groups + group, queries.shape
    n_codes = min(k[4][LENGTH], last)
    n, n_keys = n_codes - first, last - first
    keys = seen_of(k, row, group, n_codes, last, width)
    values = seen_of(v, row, group, n_codes, last, width)
    wide = np.zeros((m, -(-width // WIDTH) * WIDTH), queries.dtype)
    copy_rows(queries, wide)
    y, scores = np.zeros_like(wide), np.empty((m, n_keys + 3), queries.dtype)
    score_codes(wide, k[4], head, width, first, n_codes, k[3], scores)
    totals, whole = np.empty(m, queries.dtype), n // 8 * 8
    for i in range(m):
        score(wide[i], keys, scores[i, n:])
        totals[i] = weigh(scores[i, :n_keys])
    add_codes(scores, v[4], head, width, first, whole, v[3], y)
    rest = n - whole
    taken = min(8 - rest, values.shape[0]) if rest else 0
    mixed = np.empty((8, width), queries.dtype)
    if rest:
        decode_tokens(v[4], head, first + whole, rest, width, v[3], mixed)
        copy_numbers(values[:taken], mixed[rest:])
    for i in range(m):
        if rest:
            add_values(scores[i, whole : n + taken], mixed[: rest + taken], y[i])
        add_values(scores[i, n + taken : n_keys], values[taken:], y[i])
        divide(y[i], totals[i], results[i])


@compiled()
def seen_of(stored: Stored, row: int, group: int, first: int, last: int, width: int) -> Array:
    """Tokens `first` to `last`, none of them codes, of a row's and a head's keys or values
    (columns,width)."""
    address, row_bytes, columns, like, coded = stored
    column = group * columns + first + coded[EXACT] - coded[LENGTH]
    at = address + row * row_bytes + column * width * like.itemsize
    return carray(pointer(at, like), (last - first, width))


@compiled()
def sinks_and_rest(
    stored: Stored, row: int, group: int, span: Array, width: int
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
    q: Array, begin: int, end: int, n_each: int, n_groups: int, k: Stored, v: Stored, spans: Array,
    y: Array,
) -> None:  # fmt: skip
    """`attend` for the heads from number `begin` to `end`, counted over all queries."""
    n_heads, together, at = q.shape[1], queries_at_once(q), begin
    while at < end:
        i, h = at // n_heads, at % n_heads
        row, group = i // n_each, h * n_groups // n_heads
        if spans[i, 0] < k[4][LENGTH]:
            others = -(-(group + 1) * n_heads // n_groups) - h  # with those of the same group
            m = min(others, together, end - at)
            first, last = spans[i, 0], spans[i, 1]
            attend_codes(q[i, h : h + m], k, v, row, group, n_groups, first, last, y[i, h : h + m])
            at += m
            continue
        at += 1
        first_keys, keys = sinks_and_rest(k, row, group, spans[i], q.shape[2])
        first_values, values = sinks_and_rest(v, row, group, spans[i], q.shape[2])
        attend_head(q[i, h], first_keys, first_values, keys, values, y[i, h])


@shared(parallel=True)
def attend_by_threads(
    q: Array, parts: int, n_each: int, n_groups: int, k: Stored, v: Stored, spans: Array, y: Array
) -> None:
    """`attend`, each of `parts` threads with its own heads."""
    use_threads(parts)
    for part in numba.prange(parts):
        n, at = q.shape[0] * q.shape[1], np.int64(part)
        begin, end = n * at // parts, n * (at + 1) // parts
        attend_part(q, begin, end, n_each, n_groups, k, v, spans, y)


@shared(entry=True)
def attend(
    q: Array, n_each: int, n_groups: int, k: Stored, v: Stored, spans: Array, y: Array,
    threads: int, large: int,
) -> None:  # fmt: skip
    """Queries of each head, q (n,H,D), `n_each` of a row, over keys and values -> y (n,H,D).

    Query i sees the columns from spans[i,2] to spans[i,3], sinks, and then those from spans[i,0] to
    spans[i,1]; NaN if there are none. k and v say where (B,n_groups,columns,D) is; where codes come
    first, there are no sinks. Several threads share `large` numbers to read or more. Heads of
    queries share heads of keys (Ainslie 2023).
    """
    n = q.shape[0]
    seen = 0
    for i in range(n):
        seen += spans[i, 1] - spans[i, 0] + spans[i, 3] - spans[i, 2]
    if threads > 1 and 2 * n_groups * q.shape[2] * seen >= large:
        attend_by_threads(q, threads, n_each, n_groups, k, v, spans, y)
    else:
        attend_part(q, 0, n * q.shape[1], n_each, n_groups, k, v, spans, y)


@shared(entry=True)
def attend_columns(
    q: Array, row: int, n_groups: int, k: Stored, v: Stored, columns: Array, y: Array
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


def stored_type(kind: types.Type) -> types.Type:
    """numba's type of `Stored` numbers of `kind`."""
    n = types.intp
    return types.Tuple((n, n, n, dense(kind)[0], dense(n)[0]))


def attention_forms(real: types.Type, kind: types.Type) -> Forms:
    """What attends with queries in `real` to keys and values of `kind`."""
    n, (x1, x2, x3), w2, place = types.intp, dense(real), dense(kind)[1], stored_type(kind)
    columns, spans, _ = dense(n)
    read = n, n, place, place, spans, x3
    yield score, (x1, w2, x1)
    for stored in dict.fromkeys((kind, real)):
        yield add_values, (x1, dense(stored)[1], x1)
    yield attend_head, (x1, w2, w2, w2, w2, x1)
    yield from codes.forms(real, kind)
    yield attend_codes, (x2, place, place, n, n, n, n, n, x2)
    yield attend_part, (x3, n, n, *read)
    yield attend_by_threads, (x3, n, *read)
    yield attend, (x3, *read, n, n)
    yield attend_columns, (x2, n, n, place, place, columns, x2)


def forms(real: types.Type, kind: types.Type) -> Forms:
    """What computes in `real` with weights, keys and values of `kind`, what is called first."""
    yield from layers.forms(real, kind)
    yield weigh, (dense(real)[0],)
    yield from attention_forms(real, kind)
    if real == types.float32:
        yield from prompts.forms()
    if kind != real:
        yield from attention_forms(real, real)  # codes read as numbers are not of a half format
