"""Whole generations: the cache is allocated, the prompt read, and every token chosen."""

from __future__ import annotations

import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from kvtool import registry
from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.decoding.engine import generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.models import Model

N_PROMPT = 16
ROUNDS = {10: 20, 50: 10, 100: 6, 300: 3}  # tokens -> how often they are generated
LONGEST = max(ROUNDS)
CACHED = [kind for kind in registry.CACHES if kind != "none"]


def spec_for(model: Model, n_new: int) -> CacheSpec:
    return CacheSpec.of(model.config, 1, N_PROMPT + n_new)


def generated(model: Model, kind: str, n_new: int) -> tuple[list[int], Cache]:
    """The tokens that follow a prompt, and the cache that held it all."""
    cache = make_cache(kind, spec_for(model, n_new))
    prompt = torch.arange(N_PROMPT)[None]
    return [int(token) for token in generate(model, prompt, cache, n_new, Sampler())], cache


def seconds(model: Model, kind: str, n_new: int) -> float:
    started = time.perf_counter()
    generated(model, kind, n_new)
    return time.perf_counter() - started


@pytest.mark.parametrize("kind", registry.CACHES)
@pytest.mark.parametrize("n_new", ROUNDS)
def test_a_generation_is_complete(
    benchmark: BenchmarkFixture, model: Model, kind: str, n_new: int
) -> None:
    benchmark.group = f"generate {n_new:4} tokens"  # in the order of numbers
    benchmark.extra_info.update(kind=kind, length=N_PROMPT + n_new, tokens=n_new)
    if benchmark.disabled and kind == "none":
        n_new = min(n_new, 50)  # it holds nothing at any length, and takes the longest
    tokens, cache = benchmark.pedantic(
        generated, args=(model, kind, n_new), rounds=ROUNDS[n_new], warmup_rounds=1
    )
    assert len(tokens) == n_new
    assert all(0 <= token < model.config.vocab_size for token in tokens)
    held = N_PROMPT + n_new - 1  # the last token is never fed back
    assert cache.length == held
    needed = type(cache).predict_nbytes(spec_for(model, n_new), held, prompt=N_PROMPT)
    assert cache.nbytes().allocated == needed


@pytest.mark.parametrize("kind", CACHED)
def test_a_cache_is_faster_than_none(benchmark: BenchmarkFixture, model: Model, kind: str) -> None:
    """At the longest length. In turns, so that a slow minute of the machine hits both."""
    if benchmark.disabled:
        pytest.skip("compares timings, and --benchmark-disable takes none")
    benchmark.group = f"generate {LONGEST:4} tokens, in turns with no cache"
    benchmark.extra_info.update(kind=kind, length=N_PROMPT + LONGEST, tokens=LONGEST)
    uncached: list[float] = []
    benchmark.pedantic(
        generated,
        args=(model, kind, LONGEST),
        setup=lambda: uncached.append(seconds(model, "none", LONGEST)),
        rounds=2,
    )
    speedup = min(uncached) / benchmark.stats.stats.min
    benchmark.extra_info["speedup"] = speedup
    assert speedup > 1
