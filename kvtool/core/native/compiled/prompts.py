"""Causal attention of whole prompts, compiled by numba, in float32: blocks of queries over blocks
of keys, whose scores never leave the processor's caches (Dao 2022, arXiv 2205.14135).

The queries of all heads that share keys are rows of one product: so a key that was read is used for
each of them.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from kvtool.core.native.compiled.lanes import (
    WIDTH,
    highest,
    lanes_at,
    larger,
    plus,
    put_lanes,
    spread,
    total,
)
from kvtool.core.native.compiled.layers import exponential
from kvtool.core.native.compiled.tiles import N_COLUMNS, N_ROWS, add_products, put_products
from kvtool.core.native.compiled.tools import Array, Forms, compiled, shared, use_threads

ROWS = 16 * N_ROWS  # queries of a block, of all heads that share keys
KEYS = N_COLUMNS  # of a block


@shared(entry=True)
def pack(k: Array, v: Array, keys: Array, values: Array) -> None:
    """keys (n,blocks,D,KEYS) = k (n,S,D) transposed by blocks, values (n,blocks,KEYS,D) = v; zeros
    behind the last."""
    for head in range(k.shape[0]):
        for block in range(keys.shape[1]):
            for i in range(KEYS):
                t = block * KEYS + i
                for j in range(k.shape[2]):
                    there = t < k.shape[1]
                    keys[head, block, j, i] = k[head, t, j] if there else np.float32(0)
                    values[head, block, i, j] = v[head, t, j] if there else np.float32(0)


@compiled()
def soften(scores: Array, largest: Array, sums: Array, y: Array, begin: int) -> None:
    """Scores (N_ROWS,KEYS) of rows from `begin` on become weights, and what rows have by now, sums
    and y (R,D), is scaled to the largest score of each."""
    at, line = np.int64(scores.ctypes.data), 4 * WIDTH
    for i in range(N_ROWS):
        a, b, c, d = at, at + line, at + 2 * line, at + 3 * line
        w, x = lanes_at(a, scores), lanes_at(b, scores)
        y0, z = lanes_at(c, scores), lanes_at(d, scores)
        high = highest(larger(larger(w, x), larger(y0, z)))
        if high > largest[begin + i]:
            factor = np.float32(np.exp(largest[begin + i] - high))
            largest[begin + i] = high
            sums[begin + i] *= factor
            for j in range(y.shape[1]):
                y[begin + i, j] *= factor
        less = spread(-largest[begin + i])
        put_lanes(plus(w, less), a)
        put_lanes(plus(x, less), b)
        put_lanes(plus(y0, less), c)
        put_lanes(plus(z, less), d)
        at += 4 * line
    exponential(scores.reshape(scores.size))
    at = np.int64(scores.ctypes.data)
    for i in range(N_ROWS):
        low = plus(lanes_at(at, scores), lanes_at(at + line, scores))
        rest = plus(lanes_at(at + 2 * line, scores), lanes_at(at + 3 * line, scores))
        sums[begin + i] += total(plus(low, rest))
        at += 4 * line


@compiled()
def hide(scores: Array, begin: int, first: int, n_shared: int, key: int) -> None:
    """Scores (N_ROWS,KEYS) of keys that come after their query become -inf: row `begin` + i is of
    query `first` + (begin + i) // n_shared, column 0 of the key `key`."""
    for i in range(N_ROWS):
        seen = first + (begin + i) // n_shared - key + 1
        for j in range(max(seen, 0), KEYS):
            scores[i, j] = -np.inf


@shared()
def attend_block(
    q: Array, first: int, n_shared: int, keys: Array, values: Array, n_rows: int, y: Array
) -> None:
    """y (R,D) = attention of scaled queries q (R,D), of which `n_rows` count, `n_shared` of each
    token from number `first` on, over keys (blocks,D,KEYS) and values (blocks,KEYS,D)."""
    width, n = q.shape[1], (n_rows + N_ROWS - 1) // N_ROWS * N_ROWS
    last = first + (n_rows - 1) // n_shared
    largest, sums = np.full(n, -np.inf, np.float32), np.zeros(n, np.float32)
    scores = np.empty((n, KEYS), np.float32)
    y[:] = 0
    size, wide = 4 * width, 4 * KEYS
    q_at, s_at = np.int64(q.ctypes.data), np.int64(scores.ctypes.data)
    y_at = np.int64(y.ctypes.data)
    for block in range(last // KEYS + 1):
        key = block * KEYS
        k_at = np.int64(keys.ctypes.data) + block * width * wide
        v_at = np.int64(values.ctypes.data) + block * width * wide
        for i in range(0, n, N_ROWS):
            put_products(q_at + i * size, size, k_at, wide, width, s_at + i * wide, wide)
            tile = scores[i : i + N_ROWS]
            if key + KEYS - 1 > first + i // n_shared:
                hide(tile, i, first, n_shared, key)
            soften(tile, largest, sums, y, i)
            for j in range(0, size, wide):
                add_products(s_at + i * wide, wide, v_at + j, size, KEYS, y_at + i * size + j, size)
    for i in range(n_rows):
        for j in range(width):
            y[i, j] /= sums[i]


@shared()
def attend_blocks(q: Array, keys: Array, values: Array, y: Array, part: int, parts: int) -> None:
    """`attend_prompt` for every block of queries whose number is `part`, modulo `parts`."""
    batch, n, n_heads, width = q.shape
    n_groups = keys.shape[0] // batch
    n_shared = n_heads // n_groups
    n_each = max(ROWS // n_shared, 1)
    rows = (n_each * n_shared + N_ROWS - 1) // N_ROWS * N_ROWS
    mine, found = np.zeros((rows, width), np.float32), np.empty((rows, width), np.float32)
    scale, n_blocks = np.float32(1 / np.sqrt(width)), (n + n_each - 1) // n_each
    for number in range(part, keys.shape[0] * n_blocks, parts):
        head, first = number // n_blocks, number % n_blocks * n_each
        row, heads = head // n_groups, head % n_groups * n_shared
        many = min(n_each, n - first)
        for t in range(many):
            for h in range(n_shared):
                for j in range(width):
                    mine[t * n_shared + h, j] = q[row, first + t, heads + h, j] * scale
        attend_block(mine, first, n_shared, keys[head], values[head], many * n_shared, found)
        for t in range(many):
            for h in range(n_shared):
                for j in range(width):
                    y[row, first + t, heads + h, j] = found[t * n_shared + h, j]


@shared(entry=True, parallel=True)
def attend_prompt(q: Array, keys: Array, values: Array, y: Array, threads: int) -> None:
    """y (B,T,H,D) = causal attention of queries q (B,T,H,D) over packed keys and values of as many
    tokens; the D numbers of a head are whole blocks of N_COLUMNS."""
    use_threads(threads)
    for part in numba.prange(threads):
        attend_blocks(q, keys, values, y, np.int64(part), threads)


def forms() -> Forms:
    """The functions of this file with their argument types, what is called first."""
    n, f = types.intp, types.float32
    x2, x3, x4 = f[:, ::1], f[:, :, ::1], f[:, :, :, ::1]
    yield pack, (x3, x3, x4, x4)
    yield attend_block, (x2, n, n, x3, x3, n, x2)
    yield attend_blocks, (x4, x4, x4, x4, n, n)
    yield attend_prompt, (x4, x4, x4, x4, n)
