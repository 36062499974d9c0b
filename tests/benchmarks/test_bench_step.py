"""One step of decoding, at several lengths of the sequence so far."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from kvtool import registry
from kvtool.core.cache import CacheSpec, Step, cache_class
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed
from kvtool.core.models import Model

LENGTHS = [16, 130, 520, 1000]  # at 128 and 512 a group is filled and quantized, as one in 32 is


@pytest.mark.benchmark(min_rounds=20, max_time=0.5)
@pytest.mark.parametrize("kind", registry.CACHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_gives_what_recomputing_gives(
    benchmark: BenchmarkFixture, model: Model, kind: str, length: int
) -> None:
    """`length` tokens, of which the last is new; without a cache all are computed again."""
    benchmark.group = f"one step at {length:4} tokens"  # in the order of numbers
    benchmark.extra_info.update(kind=kind, length=length, tokens=1)
    config = model.config
    spec = CacheSpec.of(config, 1, config.context)
    ids = torch.arange(length)[None] % config.vocab_size
    found = cache_class(kind)
    slack = {"slack": 1} if "slack" in found.small else {}  # so that the last token can be cropped
    cache = found(spec, **slack)
    decode = decoding_form(model)
    feed(decode, cache, ids[:, :-1], last=True)

    def step() -> Tensor:
        cache.crop(length - 1)  # forgets the step before, which takes no time
        return feed(decode, cache, ids, last=True)

    logits = benchmark(step)
    assert cache.length == length
    needed = found.predict_nbytes(spec, length, prompt=length - 1, **slack)
    assert cache.nbytes().allocated == needed
    step_of_all = Step.full(1, length, window=cache.window, sinks=cache.sinks)
    again = model(ids, step_of_all, last=True)
    if cache.exact:
        torch.testing.assert_close(logits, again, rtol=1e-3, atol=1e-3)
