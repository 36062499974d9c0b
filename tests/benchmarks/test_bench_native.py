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
