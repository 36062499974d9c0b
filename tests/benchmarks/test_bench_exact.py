"""What bit-exact logits cost: decoding steps and whole passes, beside the default kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kvtool import registry
from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.default import make_kernels
from kvtool.core.models import Model

LENGTHS = [10, 100, 500, 1000]
MOST = 2.0  # times the default kernels' time; docs/exact.md has what was measured


def ids_for(model: Model, length: int) -> Tensor:
    return torch.arange(length)[None] % model.config.vocab_size


def stepper(model: Model, kind: str, kernels: str, length: int) -> Callable[[], Tensor]:
    """Decodes the last of `length` tokens, again and again."""
    spec = CacheSpec.of(model.config, 1, model.config.context, kernels=make_kernels(kernels))
    ids, cache = ids_for(model, length), make_cache(kind, spec)
    decode = decoding_form(model)
    feed(decode, cache, ids[:, :-1], last=True)

    def step() -> Tensor:
        cache.crop(length - 1)  # forgets the step before, which takes no time
        return feed(decode, cache, ids, last=True)

    return step


def whole(model: Model, kernels: str, length: int) -> Tensor:
    return model(ids_for(model, length), Step.full(1, length, kernels=make_kernels(kernels)))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("length", LENGTHS)
def test_an_exact_step_is_affordable(
    benchmark: BenchmarkFixture, model: Model, kind: str, length: int
) -> None:
    """In turns with a step of the default kernels, so that a slow moment hits both."""
    benchmark.group = f"one exact step at {length:4} tokens"
    exact, default = (stepper(model, kind, kernels, length) for kernels in ("exact", "default"))
    times: list[float] = []

    def default_first() -> None:
        started = time.perf_counter()
        default()
        times.append(time.perf_counter() - started)

    logits = benchmark.pedantic(exact, setup=default_first, rounds=200, warmup_rounds=10)
    assert logits[:, -1].equal(whole(model, "exact", length)[:, -1])
    if not benchmark.disabled:
        ratio = benchmark.stats.stats.median / median(times)
        benchmark.extra_info.update(kind=kind, length=length, tokens=1, times_default=ratio)
        assert ratio < MOST


@pytest.mark.parametrize("kind", ["none"])  # the pass that exact steps are compared with
@pytest.mark.parametrize("kernels", registry.KERNELS)
def test_a_whole_pass_is_finite(
    benchmark: BenchmarkFixture, model: Model, kernels: str, kind: str
) -> None:
    benchmark.group = "a whole pass over 1000 tokens"
    benchmark.extra_info.update(kind=kind, length=1000, tokens=1000)
    logits = benchmark.pedantic(whole, args=(model, kernels, 1000), rounds=5, warmup_rounds=1)
    assert bool(logits.isfinite().all())
