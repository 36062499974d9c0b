"""Attention with bounded scores: right by its formula, in every way that kernels are asked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtool import registry
from kvtool.core.kernels import masks
from kvtool.core.kernels.default import QUERIES, capped, make_kernels
from kvtool.core.kernels.exact import EXACT

CAP = 0.7
every_kernel = pytest.mark.parametrize("kernels", registry.KERNELS)


def drawn(n: int, n_keys: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """q (2,4,n,6), k and v (2,2,n_keys,6)"""
    draw = torch.Generator().manual_seed(n)
    shapes = (2, 4, n, 6), (2, 2, n_keys, 6), (2, 2, n_keys, 6)
    return tuple(
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes
    )


def by_formula(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = CAP * torch.tanh(q.double() @ k.mT / 6**0.5 / CAP)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def gap(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


@every_kernel
@pytest.mark.parametrize("n", [1, 5, QUERIES + 3])
def test_a_causal_pass_is_that_of_the_formula(kernels: str, n: int) -> None:
    q, k, v = drawn(n, n)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    found = capped(make_kernels(kernels), CAP).attention(q, k, v, None, True)
    assert gap(found, by_formula(q, k, v, seen)) < 1e-13
    assert gap(make_kernels(kernels).attention(q, k, v, None, True), found) > 0.01 or n == 1


@every_kernel
def test_a_mask_is_obeyed_made_or_not_made_yet(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, n_keys = 20, 24
    q, k, v = drawn(n, n_keys)
    k_pos, q_pos = torch.arange(n_keys)[None], torch.arange(4, n_keys)[None]
    seen = masks.visible(q_pos, k_pos, window=6)
    with_cap = capped(make_kernels(kernels), CAP)
    assert gap(with_cap.attention(q, k, v, seen, False), by_formula(q, k, v, seen)) < 1e-13
    monkeypatch.setattr(masks, "MIN_PAIRS", 1)
    lazy = masks.make_mask(q_pos, k_pos, 6)
    assert isinstance(lazy, masks.LazyMask)
    assert gap(with_cap.attention(q, k, v, lazy, False), by_formula(q, k, v, seen)) < 1e-13


def test_exact_kernels_give_a_query_the_same_bits_alone_and_among_others() -> None:
    q, k, v = drawn(9, 9, torch.float32)
    whole = capped(EXACT, CAP).attention(q, k, v, None, True)
    for i in range(9):
        alone = q[:, :, i : i + 1], k[:, :, : i + 1].clone(), v[:, :, : i + 1].clone()
        assert capped(EXACT, CAP).attention(*alone, None, False).equal(whole[:, :, i : i + 1])


@every_kernel
def test_a_half_format_is_computed_in_float32(kernels: str) -> None:
    q, k, v = drawn(5, 5, torch.bfloat16)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    found = capped(make_kernels(kernels), CAP).attention(q, k, v, None, True)
    assert found.dtype is torch.bfloat16
    assert gap(found, by_formula(q, k, v, seen)) < 2**-8
