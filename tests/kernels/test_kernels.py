"""The mask rule, and attention as its formula says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import needs_cuda
from kvtool import registry
from kvtool.core.cache import EMPTY
from kvtool.core.kernels import default as kernels
from kvtool.core.kernels.default import (
    DEFAULT,
    PRODUCTS_UP_TO,
    attention_by_products,
    attention_of_one,
    make_kernels,
    reference_attention,
)
from kvtool.core.kernels.masks import visible
from kvtool.core.native import arrays as native
from kvtool.core.native import few_queries
from kvtool.errors import UsageError

E = EMPTY  # short, for the tables


def seen(q_pos: list[int], k_pos: list[int], window: int = 0, sinks: int = 0) -> list[str]:
    """A row of x (sees) and . (does not) for each query."""
    mask = visible(torch.tensor([q_pos]), torch.tensor([k_pos]), window, sinks)
    assert mask.shape == (1, 1, len(q_pos), len(k_pos))
    return ["".join("x" if cell else "." for cell in row) for row in mask[0, 0].tolist()]


@pytest.mark.parametrize(
    ("q_pos", "k_pos", "expected"),
    [
        ([0, 1, 2], [0, 1, 2], ["x..", "xx.", "xxx"]),
        ([2], [0, 1, 2], ["xxx"]),
        ([1, 2], [0, 1, 2], ["xx.", "xxx"]),  # not aligned at the top left
        ([3], [2, 4, 0, 3, 1], ["x.xxx"]),  # position decides, not the column
        ([1, 2], [0, 1, 2, E, E], ["xx...", "xxx.."]),
        ([1], [E, 1, E, 0], [".x.x"]),
    ],
)
def test_a_query_sees_its_own_position_and_those_before(
    q_pos: list[int], k_pos: list[int], expected: list[str]
) -> None:
    assert seen(q_pos, k_pos) == expected
    assert seen(q_pos, k_pos, window=9) == expected
    assert seen(q_pos, k_pos, sinks=9) == expected


@pytest.mark.parametrize("window", [0, 1, 3])
def test_padding_sees_itself_and_nobody_else_sees_it(window: int) -> None:
    found = seen([-2, -1, 0, 1], [-2, -1, 0, 1, E], window)
    assert found == ["x....", ".x...", "..x..", "..xx." if window != 1 else "...x."]


@pytest.mark.parametrize(
    ("window", "sinks", "expected"),
    [
        (1, 0, ["x....", ".x...", "..x..", "...x.", "....x"]),
        (2, 0, ["x....", "xx...", ".xx..", "..xx.", "...xx"]),
        (4, 0, ["x....", "xx...", "xxx..", "xxxx.", ".xxxx"]),
        (5, 0, ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]),
        (1, 1, ["x....", "xx...", "x.x..", "x..x.", "x...x"]),
        (2, 2, ["x....", "xx...", "xxx..", "xxxx.", "xx.xx"]),
        (1, 9, ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"]),
    ],
)
def test_a_window_counts_the_query_itself_and_sinks_stay_behind_it(
    window: int, sinks: int, expected: list[str]
) -> None:
    assert seen([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], window, sinks) == expected
    ring = seen([4], [3, 4, 0, 1, 2], window, sinks)[0]  # the same columns, after a wrap
    assert ring == expected[4][3:] + expected[4][:3]


def test_sinks_are_positions_and_neither_padding_nor_empty_columns() -> None:
    assert seen([3], [-2, -1, 0, 1, 2, 3, E], window=1, sinks=2) == ["..xx.x."]


def test_each_row_of_a_batch_has_its_own_rule() -> None:
    q_pos, k_pos = torch.tensor([[1], [0]]), torch.tensor([[0, 1], [-1, 0]])
    assert visible(q_pos, k_pos)[:, 0, 0].tolist() == [[True, True], [False, True]]


def random_qkv(n_kv_heads: int, n_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_kv_heads)
    sizes = [(2, 4, n_queries, 8), (2, n_kv_heads, 6, 8), (2, n_kv_heads, 6, 8)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return q, k, v


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)  # sums of 8 or fewer terms


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_attention_follows_its_formula_for_every_grouping_of_heads(n_kv_heads: int) -> None:
    q, k, v = random_qkv(n_kv_heads, 3)
    k_pos = torch.tensor([[0, 1, 2, 3, 4, 5], [-2, -1, 0, 1, 2, 3]])
    mask = visible(k_pos[:, 3:], k_pos)
    close(DEFAULT.attention(q, k, v, mask, False), reference_attention(q, k, v, mask, False))
    close(DEFAULT.attention(q, k, v, None, False), reference_attention(q, k, v, None, False))


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_causal_attention_equals_the_mask_rule(n_kv_heads: int) -> None:
    q, k, v = random_qkv(n_kv_heads, 6)
    positions = torch.arange(6).expand(2, 6)
    masked = DEFAULT.attention(q, k, v, visible(positions, positions), False)
    close(DEFAULT.attention(q, k, v, None, True), masked)
    close(reference_attention(q, k, v, None, True), masked)


def test_the_reference_is_attention_worked_by_hand() -> None:
    """One query of width 4 scores its two keys with 0 and 2 ln 3 / sqrt 4: weights 1/4 and 3/4."""
    q = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    k = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    k[0, 0, 1, 0] = 2 * torch.tensor(3.0, dtype=torch.float64).log()
    v = torch.tensor([[[[4.0, 0, 0, 8], [0, 4.0, 0, 8]]]])
    close(reference_attention(q, k, v, None, False)[0, 0, 0], torch.tensor([1, 3, 0, 8]).double())


def test_a_padding_query_is_not_nan() -> None:
    q, k, v = random_qkv(2, 6)
    positions = torch.arange(-3, 3).expand(2, 6)
    for attention in (DEFAULT.attention, reference_attention):
        found = attention(q, k, v, visible(positions, positions), False)
        assert bool(found.isfinite().all())
        close(found[:, :2, :3], v[:, :1, :3].expand(2, 2, 3, 8))  # each saw itself alone


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rule", ["causal", "mask", "none"])
def test_attention_by_products_follows_the_formula_too(n_kv_heads: int, rule: str) -> None:
    q, k, v = (t.float() for t in random_qkv(n_kv_heads, 6))
    positions = torch.arange(-2, 4).expand(2, 6)
    mask = visible(positions, positions) if rule == "mask" else None
    found = attention_by_products(q, k, v, mask, rule == "causal")
    expected = reference_attention(q, k, v, mask, rule == "causal")
    assert (found - expected).abs().max() < 1e-6


def one_query(n_kv_heads: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A query, keys and values that begin a larger buffer, and a mask with padding."""
    q, k, v = random_qkv(n_kv_heads, 1)
    buffers = (torch.full((2, n_kv_heads, 9, 8), torch.nan, dtype=k.dtype) for _ in range(2))
    k, v = (buffer.narrow(2, 0, 6).copy_(x) for buffer, x in zip(buffers, (k, v), strict=True))
    k_pos = torch.tensor([[0, 1, 2, 3, E, E], [-2, -1, 0, 1, E, E]])
    return q, k, v, visible(k_pos[:, 3:4], k_pos) if masked else None


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_follows_the_formula_too(n_kv_heads: int, masked: bool) -> None:
    q, k, v, mask = one_query(n_kv_heads, masked)
    close(attention_of_one(q, k, v, mask), reference_attention(q, k, v, mask, False))


@needs_cuda
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_one_query_with_a_mask_goes_by_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n_kv_heads: int
) -> None:
    q, k, v, mask = (x if x is None else x.cuda() for x in one_query(n_kv_heads, masked=True))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # calling it would fail
    with torch.no_grad():
        found = DEFAULT.attention(q, k, v, mask, False)
    assert found.dtype is dtype
    worst = (found - reference_attention(q, k, v, mask, False)).abs().max()
    assert worst < (4 if dtype.itemsize == 2 else 45) * torch.finfo(dtype).eps


def test_a_row_that_sees_nothing_gives_zeros_as_in_pytorchs_attention() -> None:
    q, k, v, mask = one_query(2, masked=True)
    assert mask is not None
    mask[1] = False
    found = attention_of_one(q, k, v, mask)
    assert found[1].eq(0).all()
    close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))


CUDNN, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH


@pytest.mark.parametrize(("asked", "chosen"), [([], False), ([CUDNN], True), ([CUDNN, MATH], True)])
def test_plans_for_each_number_of_keys_are_made_only_where_others_may_not_be_chosen(
    asked: list[SDPBackend], chosen: bool
) -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    with sdpa_kernel(asked or list(SDPBackend.__members__.values())):
        before = enabled()
        with kernels.CUDNN.off():
            assert enabled() == chosen
        assert enabled() == before


def test_two_threads_leave_the_process_as_it_was() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    one, other = kernels.CUDNN.off(), kernels.CUDNN.off()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert not enabled()
    other.__exit__(None, None, None)
    assert enabled() == before


@needs_cuda
@pytest.mark.parametrize("n_queries", [1, 3])
def test_on_a_gpu_no_plan_is_made_for_a_growing_cache(
    monkeypatch: pytest.MonkeyPatch, n_queries: int
) -> None:
    found: list[bool] = []
    real = F.scaled_dot_product_attention

    def asked(*args: Any, **kwargs: Any) -> Tensor:
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", asked)
    q, k, v = torch.randn(3, 1, 2, n_queries, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        DEFAULT.attention(q, k, v, None, False)
    assert found == [False]


def test_training_in_bfloat16_on_a_cpu_goes_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.bfloat16() for t in random_qkv(2, 6))
    fused = DEFAULT.attention(q, k, v, None, True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # calling it would fail
    found = DEFAULT.attention(q.requires_grad_(), k, v, None, True)
    assert (found - fused).abs().max() < 0.02 and found.dtype is torch.bfloat16


@pytest.mark.parametrize("amp", [False, True])
def test_training_in_bfloat16_with_many_keys_goes_by_pytorchs_attention_in_float32(
    monkeypatch: pytest.MonkeyPatch, amp: bool
) -> None:
    """Products of all scores at once would take more memory than a processor has nearby."""
    q, k, v = (
        torch.randn(1, 2, PRODUCTS_UP_TO + 1, 8).bfloat16().requires_grad_() for _ in range(3)
    )
    monkeypatch.setattr(kernels, "attention_by_products", None)  # calling it would fail
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        found = DEFAULT.attention(q, k, v, None, True)
    exact = reference_attention(q, k, v, None, True)
    assert found.dtype is torch.bfloat16 and (found - exact).abs().max() < 2**-7
    (grad,) = torch.autograd.grad(found.sum(), q)
    (gradient,) = torch.autograd.grad(exact.sum(), q)
    assert grad.dtype is torch.bfloat16 and (grad - gradient).abs().max() < 0.02


@pytest.mark.parametrize("n_queries", [1, 5])
def test_causal_is_refused_where_it_would_be_aligned_wrongly(n_queries: int) -> None:
    q, k, v = random_qkv(4, n_queries)
    with pytest.raises(ValueError, match=rf"as many queries as keys \({n_queries}, 6\)"):
        DEFAULT.attention(q, k, v, None, True)


@pytest.mark.parametrize("name", registry.KERNELS)
def test_kernels_are_made_by_name(name: str) -> None:
    assert make_kernels(name).name == name
    with pytest.raises(UsageError, match=f"--kernels: '{name}s' is not known"):
        make_kernels(f"{name}s")


def test_layers_follow_one_another() -> None:
    x, layer = torch.randn(2, 3, 5), torch.nn.Linear(5, 4)
    assert DEFAULT.per_token(x, layer, torch.exp).equal(layer(x).exp())
    assert DEFAULT.per_token(x) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_of_a_half_format_is_computed_in_float32(
    dtype: torch.dtype, masked: bool
) -> None:
    """So the result is the exact one, rounded once."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8).to(dtype) for heads, n in ((4, 1), (2, 50), (2, 50)))
    mask = (torch.arange(50) % 3 > 0).expand(2, 1, 1, 50) if masked else None
    found = DEFAULT.attention(q, k, v, mask, False)
    assert found.dtype is dtype
    exact = reference_attention(q, k, v, mask, False)
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps).all()


GAP = torch.arange(700) % 3 > 0
KEPT = torch.arange(700) > 400  # side by side


@pytest.mark.parametrize("seen", [None, GAP, KEPT], ids=["all", "gaps", "last"])
@pytest.mark.parametrize("n_queries", [1, 3])
@pytest.mark.parametrize("dtype", native.HALVES)
def test_keys_in_half_formats_are_attended_without_copies_of_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n_queries: int, seen: Tensor | None
) -> None:
    """The bits of float32's attention to the same numbers, rounded once: also by several threads,
    and where keys are a part of a larger buffer."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, n_queries, 64).to(dtype)
    k, v = (torch.randn(2, 2, 750, 64).to(dtype)[:, :, 30:730] for _ in "kv")
    v[0, 0, 5], k[1, 1, 699] = 60_000, -torch.finfo(dtype).tiny / 4  # large, and subnormal
    mask = None if seen is None else seen.expand(2, 1, n_queries, 700)
    widened = DEFAULT.attention(q.float(), k.float(), v.float(), mask, False)
    monkeypatch.setattr(DEFAULT, "_one_query", None)  # which copies
    monkeypatch.setattr(native, "threads_for", lambda n: native.loaded().MAX_THREADS)
    found = DEFAULT.attention(q, k, v, mask, False)
    assert found.dtype is dtype and found.equal(widened.to(dtype))


def test_spans_tell_columns_with_one_interruption_at_most() -> None:
    random_numbers = np.random.default_rng(0)
    for _ in range(200):
        seen = random_numbers.random((2, 3, 6)) < 0.5
        found = few_queries.two_spans_of(seen)
        shown = ["".join("x" if s else " " for s in row).split() for row in seen.reshape(6, 6)]
        assert (found is None) == any(len(parts) > 2 for parts in shown)
        if found is not None:
            for row, (begin, end, first, last) in zip(
                seen.reshape(6, 6), found.reshape(6, 4), strict=True
            ):
                assert [*range(first, last), *range(begin, end)] == row.nonzero()[0].tolist()
