"""Layers for a few tokens and attention for one query: native code beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kvtool.core.kernels.default import DEFAULT
from kvtool.core.native import arrays as native
from kvtool.core.native import prompts

SHAPES = [(256, 1024), (1024, 256), (256, 4096), (768, 3072), (2048, 5632)]  # in, out
MORE_THAN_L2 = 2**23  # bytes


def by_pytorch(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight)


def by_native_code(weight: Tensor) -> Callable[[Tensor], Tensor]:
    assert native.layer_code(weight.dtype)  # compiled, or read from disk
    layer = native.linear(native.Weights.of(weight, None))
    return lambda x: native.on_tensor(layer, x)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.benchmark(min_rounds=200, max_time=0.3)
@pytest.mark.parametrize("make", [by_pytorch, by_native_code], ids=lambda make: make.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4])
@torch.no_grad()
def test_a_layer_of_few_tokens_is_multiplied(
    benchmark: BenchmarkFixture,
    threads: int,
    rows: int,
    shape: tuple[int, int],
    make: Callable[[Tensor], Callable[[Tensor], Tensor]],
) -> None:
    """With weights in turns, so that none lies in the processor's second-level cache."""
    benchmark.group = f"{rows} rows by {shape[0]} x {shape[1]}, threads: {threads}"
    torch.manual_seed(0)
    x = torch.randn(rows, shape[0])
    weights = [
        torch.randn(shape[1], shape[0])
        for _ in range(MORE_THAN_L2 // (4 * x[0].numel() * shape[1]) + 2)
    ]
    layers = cycle([make(weight) for weight in weights])
    benchmark(lambda: next(layers)(x))
    y = make(weights[0])(x)
    torch.testing.assert_close(y, F.linear(x, weights[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.benchmark(min_rounds=5, max_time=0.2)
@pytest.mark.parametrize("make", [by_pytorch, by_native_code], ids=lambda make: make.__name__)
@pytest.mark.parametrize("rows", [16, 256])
@pytest.mark.parametrize("shape", [(576, 3072)], ids=str)
@pytest.mark.parametrize("dtype", native.READ, ids=str)
@torch.no_grad()
def test_a_layer_of_many_rows_is_multiplied(
    benchmark: BenchmarkFixture,
    dtype: torch.dtype,
    shape: tuple[int, int],
    rows: int,
    make: Callable[[Tensor], Callable[[Tensor], Tensor]],
) -> None:
    """What native.MAX_ROWS is read from: as far as native code takes less time."""
    benchmark.group = f"{rows} rows by {shape[0]} x {shape[1]}, {dtype}"
    torch.manual_seed(0)
    x, weight = torch.randn(rows, shape[0]).to(dtype), torch.randn(*shape[::-1]).to(dtype)
    layer = make(weight)
    y = benchmark(lambda: layer(x))
    assert y.shape == (rows, shape[1])


@pytest.mark.benchmark(min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("route", ["pytorch", "native"])
@pytest.mark.parametrize("n", [128, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_prompt_attends(
    benchmark: BenchmarkFixture, dtype: torch.dtype, n: int, route: str
) -> None:
    benchmark.group = f"a prompt of {n} tokens, 9 heads over 3, {dtype}"
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, 64, dtype=dtype).transpose(1, 2) for heads in (9, 3, 3))
    if route == "native" and not prompts.can_attend(q, k, v):
        pytest.skip("needs AVX-512")
    serve = prompts.attention if route == "native" else causal_by_pytorch
    assert benchmark(lambda: serve(q, k, v)).shape == q.shape


def causal_by_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.benchmark(min_rounds=200, max_time=0.3)
@pytest.mark.parametrize("attention", ["pytorch", "native"])
@pytest.mark.parametrize("n_keys", [100, 1000])
@torch.no_grad()
def test_one_query_attends(benchmark: BenchmarkFixture, n_keys: int, attention: str) -> None:
    benchmark.group = f"one query of 8 heads over {n_keys} keys"
    torch.manual_seed(0)
    q = torch.randn(1, 8, 1, 32)
    k, v = (torch.randn(1, 8, 1200, 32)[:, :, :n_keys] for _ in range(2))
    if attention == "native":
        y = benchmark(lambda: DEFAULT.attention(q, k, v, None, False))
    else:
        y = benchmark(lambda: F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v))
