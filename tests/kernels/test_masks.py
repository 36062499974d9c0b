"""Long prompts: what each query sees without a mask for all of them, at the cost of a line."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache_contract import KINDS
from helpers import CASES, PADDED, TOLERANCE, VOCAB, Case, tokens
from kvtool.core.cache import Cache, CacheSpec, Step, cache_class
from kvtool.core.cache.quantization import Float8, Quantization
from kvtool.core.decoding.engine import advance
from kvtool.core.kernels import default as kernels
from kvtool.core.kernels import masks, query_blocks
from kvtool.core.kernels.default import DEFAULT, Kernels, make_kernels
from kvtool.core.kernels.masks import LazyMask, make_mask, mask_tensor, visible
from kvtool.core.models import Model
from small_models import random_model

BOTH = ("default", "exact")
WITHIN = Case("sinusoidal", 1, 2, (4, 0))  # a window too


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A prompt of a few tokens is treated as a long one."""
    monkeypatch.setattr(masks, "MIN_PAIRS", 0)
    monkeypatch.setattr(query_blocks, "BLOCK", 16)
    monkeypatch.setattr(query_blocks, "EDGE", 5)
    yield


def drawn_mask(rng: random.Random) -> LazyMask:
    """Random sizes, padding, windows and quantization, and columns that hold nothing."""
    batch, n, held = rng.randint(1, 3), rng.randint(16, 70), rng.choice([0, 1, 7, 60])
    numbers = torch.arange(held + n)
    padding = torch.tensor([rng.choice([0, 0, 3, 20]) for _ in range(batch)])[:, None]
    k_pos, copies = numbers - padding, None
    q_pos = k_pos[:, held:]
    if rng.random() < 0.5:
        by = Quantization(4, rng.choice([2, 4, 8]), rng.choice([0, 3, 30]))
        last, first = by.n_quantized(held + n - 1), by.n_quantized(held)
        copies = by.copy_rule(range(held, held + n), range(last), range(first, held + n))
        k_pos = torch.cat([k_pos[:, :last], k_pos[:, first:]], dim=1)
    elif rng.random() < 0.5:
        k_pos = torch.cat([k_pos, torch.full((batch, 9), -(2**30))], dim=1)
    window, sinks, near = (rng.choice([0, 0, 1, 6, 25]) for _ in range(3))
    return LazyMask(q_pos, k_pos, window, sinks, near, copies)


def whole_mask(of: LazyMask) -> Tensor:
    """All at once, from its definition."""
    mask = visible(of.q_pos, of.k_pos, of.window, of.sinks)
    if of.near:
        mask = mask & (of.q_pos[:, None, :, None] - of.k_pos[:, None, None] < of.near)
    if of.copies is not None:
        n_quantized = of.copies.n_quantized[:, None]
        mask = mask & (of.copies.since <= n_quantized) & (n_quantized < of.copies.until)
    return mask


@pytest.mark.parametrize("seed", range(60))
def test_blocks_show_each_query_what_the_whole_mask_shows(seed: int, small_blocks: None) -> None:
    of = drawn_mask(random.Random(seed))
    expected, n_keys = whole_mask(of), of.k_pos.shape[1]
    assert torch.equal(of.mask(), expected)
    found = torch.zeros_like(expected)
    for block in of.blocks:
        numbers = torch.arange(n_keys)[block.columns]
        found[:, :, block.queries, numbers] = of.mask(block.queries, block.columns)
        assert bool(expected[:, :, block.queries, block.shared].all()), "not all of them see it"
        others = torch.zeros_like(expected[:, :, block.queries])
        others[..., block.shared] = True
        for queries, columns in block.masked:
            here = slice(queries.start - block.queries.start, queries.stop - block.queries.start)
            assert not bool(others[:, :, here, columns].any()), "a column is read twice"
            others[:, :, here, torch.arange(n_keys)[columns]] = of.mask(queries, columns)
            assert bool(of.mask(queries, columns).any(3).all()), "a query sees only what all see"
        if block.masked:
            assert torch.equal(others, expected[:, :, block.queries])
    assert torch.equal(found, expected)


def test_a_mask_of_few_pairs_is_whole() -> None:
    pos = torch.arange(1400)[None]
    assert isinstance(make_mask(pos, pos), Tensor)
    pos = torch.arange(1500)[None]
    found = make_mask(pos, pos)
    assert isinstance(found, LazyMask)
    assert torch.equal(found.mask(), visible(pos, pos))
    assert isinstance(make_mask(pos[:, -1:], torch.arange(3_000_000)[None]), Tensor), "one query"


@pytest.mark.parametrize("merges", [True, False], ids=["merged", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_by_blocks_is_attention(
    dtype: torch.dtype, merges: bool, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not merges:
        monkeypatch.setattr(kernels, "FLASH", None)
    random_numbers = torch.Generator().manual_seed(0)
    for seed in range(20):
        of = drawn_mask(random.Random(seed))
        (batch, n), n_keys = of.q_pos.shape, of.k_pos.shape[1]
        shapes = (batch, 4, n, 8), (batch, 2, n_keys, 8), (batch, 2, n_keys, 8)
        q, k, v = (torch.randn(s, generator=random_numbers).to(dtype) for s in shapes)
        expected = kernels.reference_attention(q, k, v, of.mask(), False)
        found = DEFAULT.attention(q, k, v, of, False)
        assert found.dtype is dtype
        gap = float((found.double() - expected).abs().max())
        assert gap <= 8 * torch.finfo(dtype).eps * float(expected.abs().max()), f"seed {seed}"


def caches(kind: str, model: Model, case: Case, kernels: Kernels) -> Cache:
    found: Any = cache_class(kind)
    weight = next(model.parameters())
    spec = CacheSpec.of(model.config, case.batch, 100, weight.dtype, kernels=kernels)
    padding = torch.tensor(case.padding) if case.padding else None
    return found(spec, padding, **found.small)


def fed(cache: Cache, model: Model, ids: Tensor, held: int) -> Tensor:
    """The logits of all tokens behind the first `held`, which are fed before, and of one more."""
    with torch.inference_mode():
        if held and not cache.recompute:
            advance(model, cache, ids[:, :held])
        prompt = advance(model, cache, ids[:, :-1] if cache.recompute else ids[:, held:-1])
        more = advance(model, cache, ids if cache.recompute else ids[:, -1:])
    return torch.cat([prompt, more], dim=1)


@pytest.mark.parametrize("held", [0, 20])
@pytest.mark.parametrize("case", [PADDED, CASES[1], Case("rotary", 2, 2), WITHIN], ids=str)
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_is_what_it_was_with_a_whole_mask(
    kind: str, name: str, case: Case, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_window = {"window": 9, "first_window_layer": 1} if case == WITHIN else {}
    dtype = torch.float32 if name == "exact" else torch.float64
    model = random_model(
        0, dtype, vocab_size=VOCAB, positions=case.positions, n_kv_heads=case.n_kv_heads,
        context=256, **of_window,
    )  # fmt: skip
    ids = tokens(case.batch, 80, 1)
    expected = fed(caches(kind, model, case, make_kernels(name)), model, ids, held)
    made = []
    monkeypatch.setattr(masks, "MIN_PAIRS", 0)
    monkeypatch.setattr(query_blocks, "BLOCK", 16)
    monkeypatch.setattr(query_blocks, "EDGE", 5)
    real = query_blocks._block
    monkeypatch.setattr(query_blocks, "_block", lambda *args: made.append(1) or real(*args))
    found = fed(caches(kind, model, case, make_kernels(name)), model, ids, held)
    if name == "exact":
        assert torch.equal(found, expected)
    else:
        assert float((found - expected).abs().max()) < TOLERANCE
    needs = caches(kind, model, case, DEFAULT)
    # A token of fp8 meets itself as it is stored, so that rounding needs no mask.
    rounds = needs.loses and not isinstance(needs.quantization, Float8)
    needs_mask = bool(rounds or case.padding or of_window or (held and not needs.recompute))
    # Native code needs no mask where it can do all by itself.
    assert made or not needs_mask or name == "exact", "no block was made"


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made within."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return made


SITUATIONS = ("plain", "padded", "behind others", "within a window")


@pytest.mark.parametrize("way", SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_for_a_prompt_grows_with_its_length_and_not_with_the_square(
    kind: str, way: str
) -> None:
    def largest(n: int) -> int:
        model = random_model(
            0, vocab_size=VOCAB, positions="rotary", n_layers=1, d_model=16, n_heads=1,
            n_kv_heads=1, context=2 * n, window=100 if way == "within a window" else 0,
        )  # fmt: skip
        batch = 2 if way == "padded" else 1
        spec = CacheSpec.of(model.config, batch, n + 100)
        padding = torch.tensor([0, 50]) if way == "padded" else None
        cache = cache_class(kind)(spec, padding)
        ids = tokens(batch, n, 1)
        with torch.inference_mode():
            if way == "behind others" and not cache.recompute:
                advance(model, cache, ids[:, :50])
            with Largest() as found:
                advance(model, cache, ids, last=True)
        return found.nbytes

    assert largest(3200) < 2.5 * largest(1600)


@pytest.mark.parametrize(
    "of", [{"window": 100, "sinks": 4}, {"quantization": Quantization(8, 32, 32)}], ids=str
)
def test_the_pass_without_a_cache_that_a_cache_is_compared_with_needs_no_more(
    of: dict[str, Any],
) -> None:
    model = random_model(
        0, vocab_size=VOCAB, positions="rotary", n_layers=1, d_model=16, n_heads=1, n_kv_heads=1,
        context=6000,
    )  # fmt: skip

    def largest(n: int) -> int:
        with torch.inference_mode(), Largest() as found:
            model(tokens(1, n, 1), Step.full(1, n, **of), last=True)
        return found.nbytes

    assert largest(3200) < 2.5 * largest(1600)


def test_another_mask_takes_the_place_of_a_large_one() -> None:
    pos = torch.arange(1500)[None]
    step = Step(pos, pos, pos[0], make_mask(pos, pos), False)
    assert isinstance(step.mask, LazyMask)
    near = step.within(10).mask
    assert isinstance(near, LazyMask)
    assert torch.equal(near.mask(), visible(pos, pos, 10))
    assert mask_tensor(replace(step, mask=None).mask) is None
