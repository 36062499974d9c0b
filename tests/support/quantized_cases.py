"""Small quantized caches that several files of tests share, and how they are filled."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec
from kvtool.core.cache.quantized import Int4Cache, Int8Cache

SPEC = CacheSpec(2, 3, 2, 8, 200, torch.float64)
PADDING = torch.tensor([2, 0, 5])
KINDS = ("int8", "int4")
small4 = partial(Int4Cache, group=4, residual=2)
small8 = partial(Int8Cache, group=4, residual=2)
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(spec: CacheSpec, n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (B,Hkv,n,D) of each layer, with channels and tokens of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, spec.batch, spec.n_kv_heads, n, spec.head_dim)
    found = []
    for _ in range(spec.n_layers):
        k, v = torch.randn(shape, generator=generator, dtype=torch.float64)
        k *= torch.logspace(-1, 1, spec.head_dim, dtype=torch.float64)
        v *= torch.logspace(1, -1, n, dtype=torch.float64)[:, None]
        found.append((k.to(spec.dtype), v.to(spec.dtype)))
    return found


def put(cache: Cache, pairs: list[tuple[Tensor, Tensor]], ends: list[int]) -> None:
    """Write and commit the columns up to each of the ends."""
    for end in ends:
        start = cache.length
        step = cache.begin(end - start)
        for layer, pair in enumerate(pairs):
            cache.write(layer, *(t[:, :, start:end] for t in pair), step)
        cache.commit(end - start)


def filled(make: Any, n: int, spec: CacheSpec = SPEC, padding: Tensor | None = None) -> Any:
    cache = make(spec, padding)
    put(cache, random(spec, n), [n])
    return cache
