"""Latent attention: what a cache holds of a token, and settings that contradict each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtool import registry
from kvtool.core.cache import CacheSpec, cache_class, make_cache, predicted_nbytes
from kvtool.core.decoding.engine import feed
from kvtool.core.models import build_model
from kvtool.core.models.general import GeneralConfig
from kvtool.core.models.latent import LatentConfig
from kvtool.errors import UsageError

CONFIG = LatentConfig(
    23, n_layers=3, d_model=32, n_heads=4, context=64, positions="rotary", kv_rank=10, rotary_dim=6,
    still_dim=8, value_dim=12,
)  # fmt: skip
SHARING = ("dynamic", "static", "sliding:window=9:sinks=2", "paged:page=4")
N = 13


@pytest.mark.parametrize("kind", SHARING)
def test_a_token_takes_its_latent_and_what_turns_and_no_more(kind: str) -> None:
    model = build_model(CONFIG).eval()
    cache = make_cache(kind, CacheSpec.of(CONFIG, 2, N))
    with torch.no_grad():
        feed(model, cache, torch.randint(23, (2, N)))
    held = cache.snapshot(0)[0].shape[2]
    assert cache.nbytes().live == held * 2 * 3 * (10 + 6) * 4  # rows, layers, numbers, bytes
    keys, values, _ = cache.snapshot(1)
    assert keys.shape == (2, 1, held, 16) and values.equal(keys)


@pytest.mark.parametrize("kind", [kind for kind in registry.CACHES if kind != "none"])
def test_predicted_bytes_of_latents_are_those_allocated(kind: str) -> None:
    spec = CacheSpec.of(CONFIG, 2, 40)
    cache = make_cache(kind, spec)
    with torch.no_grad():
        feed(build_model(CONFIG).eval(), cache, torch.randint(23, (2, N)))
    assert cache.nbytes().allocated == predicted_nbytes(kind, spec, N, N)
    shares = kind in {cache_class(other).kind for other in (*SHARING, "fp8")}
    assert cache.spec.shared == shares  # int8 and int4 round values in another way than keys


def test_crop_and_select_move_shared_columns_once() -> None:
    model, ids = build_model(CONFIG).double().eval(), torch.randint(23, (2, N))
    for kind in SHARING:
        cache = make_cache(kind, CacheSpec.of(CONFIG, 2, N + 1, torch.float64))
        with torch.no_grad():
            feed(model, cache, ids[:, :8])
            cache.select(torch.tensor([1, 0]))
            for end in range(9, N + 1):
                found = feed(model, cache, ids.flip(0)[:, :end])
            whole = make_cache(kind, CacheSpec.of(CONFIG, 2, N + 1, torch.float64))
            right = feed(model, whole, ids.flip(0))
        gap = float((found - right[:, -1:]).abs().max())
        assert gap < 1e-12, kind


def test_key_value_heads_are_refused_where_there_are_none() -> None:
    with pytest.raises(UsageError, match="--n-kv-heads: 2 is not for latent attention"):
        replace(CONFIG, n_kv_heads=2)
    assert replace(CONFIG, n_kv_heads=4) == CONFIG


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_plus_one": True}, "norm_plus_one: is for --norm rmsnorm"),
        ({"qk_norm_whole": True}, "qk_norm_whole: needs qk_norm"),
        ({"rotary_dim": 2}, "need rotary positions"),
        ({"unrotated_layers": [0]}, "need rotary positions"),
        ({"positions": "rotary", "rotary_dim": 3}, "rotary_dim: 3 is odd"),
        ({"positions": "rotary", "rotary_dim": 64}, "rotary_dim: 64 is too large"),
        ({"positions": "rotary", "unrotated_layers": [2]}, "unrotated_layers: 2 is too large"),
        ({"full_layers": 3}, "full_layers: 3 is no list of layers"),
        ({"full_layers": [-1]}, "full_layers: -1 is too small"),
        ({"attention_cap": -1.0}, "attention_cap: -1.0 is out of range"),
        ({"logits_scale": 0.0}, "logits_scale: 0.0 is out of range"),
        ({"norm_place": "beside"}, "norm_place: 'beside' is not known"),
        ({"n_encoder_layers": 1, "source_vocab_size": 9}, "is for decoder-only models"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        GeneralConfig(23, n_layers=2, d_model=32, n_heads=4, **fields)
    assert message in str(refusal.value)
