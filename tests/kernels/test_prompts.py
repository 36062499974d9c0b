"""Whole prompts in compiled code, and where PyTorch serves them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.decoding.engine import feed
from kvtool.core.kernels.default import DEFAULT, reference_attention
from kvtool.core.native import arrays as native
from kvtool.core.native import prompts
from small_models import random_model

needs_tiles = pytest.mark.skipif(
    not native.fills_registers(), reason="tiles are for processors with AVX-512"
)
GAPS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of queries that compiled code has served."""
    calls: list[torch.Size] = []
    original = prompts.attention

    def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q.shape)
        return original(q, k, v)

    monkeypatch.setattr(prompts, "attention", watched)
    return calls


def drawn(
    n: int, heads: int = 2, shared_by: int = 1, width: int = 64, batch: int = 1
) -> list[Tensor]:
    """Queries, keys and values of a prompt of n tokens, as a model lays them out."""
    torch.manual_seed(n)
    sizes = heads * shared_by, heads, heads
    return [torch.randn(batch, n, h, width).transpose(1, 2) for h in sizes]


@needs_tiles
@pytest.mark.parametrize("dtype", GAPS)
@pytest.mark.parametrize(
    ("n", "shared_by", "width"),
    [(prompts.LEAST, 1, 64), (201, 3, 64), (200, 8, 128), (130, 97, 64)],
)
@torch.no_grad()
def test_a_prompt_follows_the_formula_however_heads_share_keys(
    n: int, shared_by: int, width: int, dtype: torch.dtype, served: list[torch.Size]
) -> None:
    q, k, v = (x.to(dtype) for x in drawn(n, 2, shared_by, width, batch=2))
    y = DEFAULT.attention(q, k, v, None, True)
    assert served and y.dtype is dtype
    exact = reference_attention(q, k, v, None, True)
    torch.testing.assert_close(y.double(), exact, rtol=GAPS[dtype], atol=GAPS[dtype])


@needs_tiles
@torch.no_grad()
def test_a_token_has_the_same_bits_whatever_comes_after_it_or_shares_the_work() -> None:
    q, k, v = drawn(300, shared_by=3, batch=2)
    whole = prompts.attention(q, k, v)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert prompts.attention(q, k, v).equal(whole)
    finally:
        torch.set_num_threads(before)
    first = [x[1:, :, :200] for x in (q, k, v)]
    assert prompts.attention(*first).equal(whole[1:, :, :200])


@pytest.mark.parametrize("why", ["short", "narrow", "wide format", "gradients", "processor"])
def test_what_compiled_code_cannot_do_faster_is_left_to_pytorch(
    why: str, served: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = drawn(prompts.LEAST - (why == "short"), width=32 if why == "narrow" else 64)
    if why == "wide format":
        q, k, v = q.double(), k.double(), v.double()
    if why == "processor":
        monkeypatch.setattr(native, "fills_registers", lambda: False)
        assert native.most_rows(torch.float32) == native.MAX_STEP_TOKENS
    q.requires_grad_(why == "gradients")
    y = DEFAULT.attention(q, k, v, None, True)
    assert not served
    exact = reference_attention(q, k, v, None, True)
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-6)


@needs_tiles
@torch.inference_mode()
def test_a_prompt_makes_no_mask_and_the_logits_of_its_last_token_alone(
    served: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    n = prompts.LEAST + 3
    model = random_model(0, d_model=128, n_heads=2, context=n)
    rows: list[int] = []
    model.get_submodule("head").register_forward_hook(lambda _, x, y: rows.append(y.shape[1]))
    monkeypatch.setattr("kvtool.core.cache.buffered.make_mask", None)
    cache = make_cache("dynamic", CacheSpec.of(model.config, 1, n))
    feed(model, cache, torch.zeros(1, n, dtype=torch.long), last=True)
    assert served == [(1, 2, n, 64)] * model.config.n_layers and rows == [1]


@pytest.mark.parametrize("rows", [1, native.MAX_STEP_TOKENS, native.MAX_STEP_TOKENS + 1, 40])
@torch.inference_mode()
def test_a_row_has_the_same_bits_beside_any_number_of_rows(rows: int) -> None:
    """Tiles of three rows, of two and of one, and widths of which some are no whole lanes."""
    torch.manual_seed(0)
    assert native.layer_code(torch.float32)
    for width, wide in ((48, 20), (37, 9), (16, 3)):
        weights = native.Weights.of(torch.randn(wide, width), torch.randn(wide))
        layer, x = native.linear(weights), torch.randn(rows, width)
        y = native.on_tensor(layer, x)
        alone = [native.on_tensor(layer, row[None]) for row in x]
        assert y.equal(torch.cat(alone))
        exact = x.double() @ torch.from_numpy(weights.weight).double().T
        exact += torch.from_numpy(weights.bias).double()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
