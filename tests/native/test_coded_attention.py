"""Attention over codes that become numbers in registers, beside attention over these numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.cache.direct_access import DirectAccess
from kvtool.core.native import arrays as native
from kvtool.core.native import few_queries
from small_models import random_model

N, WIDTH, ROWS, STORED = 75, 32, 2, 2  # tokens, numbers of a head, rows, stored heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8", "int8:group=6:residual=3"])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5])
def test_query_heads_that_share_codes_get_the_bits_that_numbers_give_each(
    heads: int, kind: str, dtype: torch.dtype
) -> None:
    """As many heads as a tile has, and more; a span may begin within a byte that two tokens share,
    and two threads may divide the heads of a group."""
    code: Any = native.decoder_code(dtype)
    n_heads = heads * STORED
    shape = {"d_model": n_heads * WIDTH, "n_heads": n_heads, "n_kv_heads": STORED}
    config = random_model(0, **shape, n_layers=1).config
    cache = make_cache(kind, CacheSpec.of(config, ROWS, N + 1, dtype))
    assert isinstance(cache, DirectAccess)
    torch.manual_seed(0)
    k, v = torch.randn(2, ROWS, STORED, N, WIDTH).to(dtype)
    cache.write(0, k, v, cache.begin(N))
    cache.commit(N)
    keys, values, _ = cache.snapshot(0)
    wide = torch.promote_types(dtype, torch.float32)
    numbers = [few_queries.Stored.of(x.to(wide)) for x in (keys, values)]
    q = torch.randn(ROWS, n_heads, WIDTH, dtype=wide).numpy()
    _, _, stored, columns, _, _, _, facts = cache.step_addresses(1)  # type: ignore[misc]
    like = native.kind_of(dtype)
    row_bytes = STORED * columns * WIDTH * dtype.itemsize
    codes = [(int(stored[i, 0]), row_bytes, columns, like) for i in range(2)]
    coded = [(*at, facts[i, 0]) for i, at in enumerate(codes)]
    for first, threads in ((0, 1), (7, 1), (0, 2)):
        spans, found = np.array([[first, N, 0, 0]] * ROWS), []
        for read in (coded, [x.layout for x in numbers]):
            y = np.full_like(q, np.nan)
            code.attend(q, 1, STORED, *read, spans, y, threads, 1)
            found.append(y)
        assert np.isfinite(found[0]).all() and found[0].tobytes() == found[1].tobytes()
