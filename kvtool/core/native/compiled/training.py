"""Dropout and attention of a training step, forward and backward, compiled by numba.

PyTorch does each of these in several passes over memory, with casts between. Here one pass reads a
row, computes in float32 and rounds once. Numbers are float32, or bfloat16 as uint16. Threads share
the rows. Each row is computed alone, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from kvtool.core.native.compiled.lanes import (
    NBYTES,
    lanes_at,
    multiply_add,
    put_lanes,
    spread,
    total,
)
from kvtool.core.native.compiled.layers import exponential
from kvtool.core.native.compiled.tools import MAX_THREADS as MAX_THREADS
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    kept,
    number,
    shared,
    use_threads,
    vector,
)

# Address, bytes to the next row, bytes to the next token, tokens of a row.
Strided = tuple[int, int, int, int]


@compiled()
def read(x: Array, y: Array) -> None:
    """y (n,) float32 = x (n,)."""
    for i in range(x.shape[0]):
        y[i] = number(x[i])


@compiled()
def write(x: Array, y: Array) -> None:
    """y (n,) = x (n,) float32, rounded to the type of y."""
    for i in range(x.shape[0]):
        y[i] = kept(x[i], y)


@compiled()
def is_kept(index: int, least: int) -> bool:
    """Whether dropout keeps the element `index`: if its hash, an int32, is `least` or more.

    The hash is lowbias32 (Wellons 2018) without its last step, which changes no upper bits.
    """
    h = np.uint32(index)
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D))
    h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.int32(h) >= np.int32(least)


@compiled()
def dropout_part(
    x: Array, onto: Array, start: int, least: int, scale: float, y: Array, first: int, last: int
) -> None:
    """`dropout` for rows `first` to `last`."""
    row, factor = np.empty(x.shape[1], np.float32), np.float32(scale)
    for n in range(first, last):
        read(x[n], row)
        index = np.uint32(start + n * row.shape[0])
        for j in range(row.shape[0]):
            stays = is_kept(index + np.uint32(j), least)
            row[j] = row[j] * factor if stays else np.float32(0)
        if onto.size:
            for j in range(row.shape[0]):
                row[j] += number(onto[n, j])
        write(row, y[n])


@shared(entry=True, parallel=True)
def dropout(
    x: Array, onto: Array, start: int, least: int, scale: float, y: Array, threads: int
) -> None:
    """y (n,d) = x (n,d) times `scale`, with dropped elements 0, plus onto (n,d) or nothing (0,1).

    start: index of the first element, for `is_kept`.
    """
    use_threads(threads)
    for part in numba.prange(threads):
        n, at = x.shape[0], np.int64(part)
        first, last = n * at // threads, n * (at + 1) // threads
        dropout_part(x, onto, start, least, scale, y, first, last)


@compiled()
def read_row(stored: Strided, row: int, like: Array, x: Array) -> None:
    """x (T*H,D) float32 = the tokens of a row, stored in the type of `like`."""
    address, of_row, of_token, n_tokens = stored
    tokens = x.reshape(n_tokens, x.size // n_tokens)
    for t in range(n_tokens):
        read(vector(address + row * of_row + t * of_token, tokens.shape[1], like), tokens[t])


@compiled()
def write_row(x: Array, stored: Strided, row: int, like: Array) -> None:
    """The tokens of a row = x (T*H,D) float32, stored in the type of `like`."""
    address, of_row, of_token, n_tokens = stored
    tokens = x.reshape(n_tokens, x.size // n_tokens)
    for t in range(n_tokens):
        write(tokens[t], vector(address + row * of_row + t * of_token, tokens.shape[1], like))


@compiled()
def multiply(x: Array, h: int, n: int, y: Array, group: int, m: int, z: Array) -> None:
    """z (T,S) = head h of x (T*n,D) times the transpose of head `group` of y (S*m,D)."""
    size = 4 * x.shape[1]  # bytes of a head
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            a, b = x.ctypes.data + (i * n + h) * size, y.ctypes.data + (j * m + group) * size
            sums = spread(np.float32(0))
            for at in range(0, size, NBYTES):
                sums = multiply_add(lanes_at(a + at, z), lanes_at(b + at, z), sums)
            z[i, j] = total(sums)


@compiled()
def add_product(w: Array, x: Array, h: int, n: int, y: Array, group: int, m: int) -> None:
    """Head `group` of y (T*m,D) += w (T,S) times head h of x (S*n,D); w may be a transpose."""
    size = 4 * x.shape[1]
    for i in range(w.shape[0]):
        for at in range(0, size, NBYTES):
            place = y.ctypes.data + (i * m + group) * size + at
            sums = lanes_at(place, w)
            for j in range(w.shape[1]):
                behind = (j * n + h) * size + at
                weight = spread(w[i, j])
                sums = multiply_add(weight, lanes_at(x.ctypes.data + behind, w), sums)
            put_lanes(sums, place)


@compiled()
def softmax(scores: Array, seen: Array, scale: float) -> None:
    """Turn scores (H,T,S) into weights over the keys that are True in `seen` (T,S), in place."""
    for h in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            largest = np.float32(-np.inf)
            for j in range(scores.shape[2]):
                score = scores[h, i, j] * np.float32(scale) if seen[i, j] else np.float32(-np.inf)
                scores[h, i, j] = score
                largest = score if score > largest else largest
            for j in range(scores.shape[2]):
                scores[h, i, j] -= largest
    exponential(scores.reshape(scores.size))
    for h in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            total = np.float32(0)
            for j in range(scores.shape[2]):
                total += scores[h, i, j]
            for j in range(scores.shape[2]):
                scores[h, i, j] /= total


@compiled()
def softmax_backward(weights: Array, grads: Array, scale: float) -> None:
    """Turn gradients (T,S) of weights (T,S) into those of the scores before `softmax`, in place."""
    for i in range(grads.shape[0]):
        mean = np.float32(0)
        for j in range(grads.shape[1]):
            mean += weights[i, j] * grads[i, j]
        for j in range(grads.shape[1]):
            grads[i, j] = weights[i, j] * (grads[i, j] - mean) * np.float32(scale)


@shared()
def attend_part(
    q: Strided, k: Strided, v: Strided, n_groups: int, seen: Array, weights: Array, y: Array,
    first: int, last: int,
) -> None:  # fmt: skip
    """`attend` for rows `first` to `last`."""
    _, n_queries, n_heads, width = y.shape
    n_keys, like = seen.shape[2], y[0, 0, 0]
    queries = np.empty((n_queries * n_heads, width), np.float32)
    result = np.empty_like(queries)
    keys = np.empty((n_keys * n_groups, width), np.float32)
    values = np.empty_like(keys)
    for row in range(first, last):
        read_row(q, row, like, queries)
        read_row(k, row, like, keys)
        read_row(v, row, like, values)
        w = weights[row]
        for h in range(n_heads):
            multiply(queries, h, n_heads, keys, h * n_groups // n_heads, n_groups, w[h])
        softmax(w, seen[row % seen.shape[0]], 1 / np.sqrt(width))
        result[:] = 0
        for h in range(n_heads):
            add_product(w[h], values, h * n_groups // n_heads, n_groups, result, h, n_heads)
        write(result.reshape(result.size), y[row].reshape(result.size))


@shared(entry=True, parallel=True)
def attend(
    q: Strided, k: Strided, v: Strided, n_groups: int, seen: Array, weights: Array, y: Array,
    threads: int,
) -> None:  # fmt: skip
    """Attention over the keys that are True in `seen` (1 or B,T,S).

    Writes weights (B,H,T,S) float32, and y (B,T,H,D) in the type of q, k and v.
    """
    use_threads(threads)
    for part in numba.prange(threads):
        batch, at = y.shape[0], np.int64(part)
        first, last = batch * at // threads, batch * (at + 1) // threads
        attend_part(q, k, v, n_groups, seen, weights, y, first, last)


@shared()
def attend_backward_part(
    dy: Strided, q: Strided, k: Strided, v: Strided, n_groups: int, weights: Array, like: Array,
    dq: Strided, dk: Strided, dv: Strided, first: int, last: int,
) -> None:  # fmt: skip
    """`attend_backward` for rows `first` to `last`."""
    _, n_heads, n_queries, n_keys = weights.shape
    width = like.shape[0]
    queries = np.empty((n_queries * n_heads, width), np.float32)
    keys = np.empty((n_keys * n_groups, width), np.float32)
    of_queries, g = np.empty_like(queries), np.empty_like(queries)
    values, of_keys, of_values = np.empty_like(keys), np.empty_like(keys), np.empty_like(keys)
    scores = np.empty((n_queries, n_keys), np.float32)
    for row in range(first, last):
        read_row(q, row, like, queries)
        read_row(k, row, like, keys)
        read_row(v, row, like, values)
        read_row(dy, row, like, g)
        of_queries[:] = 0
        of_keys[:] = 0
        of_values[:] = 0
        for h in range(n_heads):
            group, w = h * n_groups // n_heads, weights[row, h]
            add_product(w.T, g, h, n_heads, of_values, group, n_groups)
            multiply(g, h, n_heads, values, group, n_groups, scores)
            softmax_backward(w, scores, 1 / np.sqrt(width))
            add_product(scores, keys, group, n_groups, of_queries, h, n_heads)
            add_product(scores.T, queries, h, n_heads, of_keys, group, n_groups)
        write_row(of_queries, dq, row, like)
        write_row(of_keys, dk, row, like)
        write_row(of_values, dv, row, like)


@shared(entry=True, parallel=True)
def attend_backward(
    dy: Strided, q: Strided, k: Strided, v: Strided, n_groups: int, weights: Array, like: Array,
    dq: Strided, dk: Strided, dv: Strided, threads: int,
) -> None:  # fmt: skip
    """Write the gradients dq, dk and dv of `attend` from dy and its weights.

    like (D,): an array of the type of all the tensors.
    """
    use_threads(threads)
    for part in numba.prange(threads):
        batch, at = weights.shape[0], np.int64(part)
        first, last = batch * at // threads, batch * (at + 1) // threads
        attend_backward_part(dy, q, k, v, n_groups, weights, like, dq, dk, dv, first, last)


def forms() -> Forms:
    """The functions of this file with their argument types, for float32 (f) and bfloat16 bits (h).
    A function comes after those that it calls."""
    n, real, f, h = types.intp, types.float64, types.float32, types.uint16
    for x, onto, y in ((h, f, f), (f, f, f), (f, f, h)):
        yield dropout, (x[:, ::1], onto[:, ::1], n, n, real, y[:, ::1], n)
    place, weights = types.UniTuple(n, 4), f[:, :, :, ::1]
    for x in (f, h):
        given = place, place, place, n, types.boolean[:, :, ::1], weights, x[:, :, :, ::1]
        yield attend_part, (*given, n, n)
        yield attend, (*given, n)
        back = place, place, place, place, n, weights, x[::1], place, place, place
        yield attend_backward_part, (*back, n, n)
        yield attend_backward, (*back, n)
