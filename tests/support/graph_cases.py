"""A model with a cache, decoded step by step, and stories of what happens meanwhile, told with and
without recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec
from kvtool.core.cache.paged import PagedCache
from kvtool.core.cache.static import StaticCache
from kvtool.core.decoding import cuda_graphs as graphs
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed, first_input
from kvtool.core.native import arrays as native
from recorded_steps import Recorder
from small_models import random_model

N, PROMPT, BLOCK = 16, 5, 4
SHAPES: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "learned": {"positions": "learned", "activation": "gelu_tanh", "bias": False, "tied": False},
    "grouped": {"positions": "rotary", "n_kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "with norms of heads": {"positions": "rotary", "qk_norm": True},
    "windows": {"positions": "rotary", "window": 4, "first_window_layer": 1},
    "pair": {"n_encoder_layers": 1, "source_vocab_size": 9},
}
KINDS: dict[str, Callable[..., Cache]] = {
    "static": partial(StaticCache, block=BLOCK),
    "paged": partial(PagedCache, page=BLOCK, rows=4),
}
Capturing = Callable[["graphs.Capture | None"], None]


@pytest.fixture(autouse=True)
def by_pytorch() -> Iterator[None]:
    """Without native code, which no recording sees, and without gradients."""
    with native.native_if_worthwhile(0), torch.inference_mode():
        yield


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Capturing:
    """Says how decoding forms that are made from now on record steps."""
    return lambda capture: monkeypatch.setattr(graphs, "capture_for", lambda device: capture)


class Case:
    """A model, tokens, and a cache for them that a decoding form serves step by step."""

    def __init__(self, make: Any = KINDS["static"], batch: int = 2, **config: Any) -> None:
        self.model = random_model(0, **config)
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(23, (batch, N), generator=generator)
        self.make = make
        self.padding = torch.arange(batch) if batch > 1 else None
        self.cache = self.new_cache()
        _, self.source = first_input(self.model, self.ids[:, :4] % 9)
        self.decode = decoding_form(self.model)
        self.kept: list[Tensor] = []

    def new_cache(self, capacity: int = N, **changes: Any) -> Cache:
        spec = CacheSpec.of(self.model.config, len(self.ids), capacity, **changes)
        return self.make(spec, self.padding)

    def steps(self, end: int, cache: Cache | None = None) -> Tensor:
        """The logits of the tokens up to `end` that the cache does not hold, one by one."""
        cache = cache or self.cache
        ends = range(max(cache.length + 1, PROMPT), end + 1)
        found = [feed(self.decode, cache, self.ids[:, :i], self.source, last=True) for i in ends]
        return torch.cat(found, dim=1)


Story = Callable[[Case], Tensor]


def both(capturing: Capturing, story: Story, make: Callable[[], Case] = Case) -> Recorder:
    """Require the same logits of a story, and the same keys and values at its end, with and without
    recordings -> the recorder."""
    ends = []
    recorder = Recorder()
    for capture in (None, recorder):
        capturing(capture)
        case = make()
        ends.append([story(case), *case.cache.snapshot(0), *case.cache.snapshot(1)])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))
    return recorder
