"""A small cache of pages that several files of tests share, and what must hold of its pool."""

from __future__ import annotations

from collections import Counter
from functools import partial

import torch

from kvtool.core.cache import CacheSpec
from kvtool.core.cache.paged import PagedCache

SPEC = CacheSpec(2, 3, 2, 4, 24, torch.float64)
FOURS = partial(PagedCache, page=4)


def tables(cache: PagedCache) -> list[list[int]]:
    return [list(row) for row in cache._table]


def check_pages(*caches: PagedCache) -> None:
    """I11: live + free = pool, and each page counts the rows that use it."""
    pool = caches[0].pool
    used = Counter(page for cache in caches for row in cache._table for page in row)
    assert pool.users == [used[page] for page in range(pool.n_pages)]
    assert sorted([*pool._free, *used]) == list(range(pool.n_pages))
    assert pool.n_live + pool.n_free == pool.n_pages
    for cache in caches:
        assert all(len(set(row)) == len(row) for row in cache._table)


def put(cache: PagedCache, values: list[list[float]], commit: int) -> None:
    """Write a token with keys and values of each number, and commit the first few of each row."""
    step = cache.begin(len(values[0]))
    new = torch.tensor(values, dtype=torch.float64)[:, None, :, None].expand(-1, 2, -1, 4)
    for layer in range(2):
        cache.write(layer, new + layer, -new - layer, step)
    cache.commit(commit)


def check_contents(cache: PagedCache, rows: list[list[float]]) -> None:
    for layer in range(2):
        keys, values, positions = cache.snapshot(layer)
        assert keys[:, 0, :, 0].tolist() == [[x + layer for x in row] for row in rows]
        assert torch.equal(values, -keys) and keys.eq(keys[:, :1, :, :1]).all()
        assert positions.tolist() == [list(range(len(rows[0])))] * len(rows)
