"""Keys and values of a source: made once, only read by decoding, and reordered with the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding.engine import feed
from kvtool.core.models import Model
from kvtool.core.models.attention import CrossAttention
from kvtool.registry import CACHES
from small_models import random_model

LENGTHS = (7, 4, 6)  # of the sources
TARGETS = torch.tensor([[1, 9, 10, 11, 12], [1, 3, 3, 20, 5], [1, 0, 22, 7, 6]])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def seq2seq(**changes: Any) -> Model:
    sizes = {"n_encoder_layers": 1, "source_vocab_size": 17, "n_kv_heads": 2, **changes}
    return random_model(4, torch.float64, **sizes)


def sources(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (3,7) and the mask of what is real."""
    ids = torch.randint(17, (3, 7), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def decode(model: Model, kind: str, source: CrossCache, ids: Tensor) -> Tensor:
    """Logits of `ids`, fed to a cache one by one."""
    cache = make_cache(kind, CacheSpec.of(model.config, len(ids), 8, torch.float64))
    ends = range(1, ids.shape[1] + 1)
    return torch.stack([feed(model, cache, ids[:, :end], source)[:, -1] for end in ends], dim=1)


def whole(model: Model, kind: str, source: CrossCache, ids: Tensor) -> Tensor:
    """Logits of `ids` without a cache, rounded as that kind rounds."""
    cache = make_cache(kind, CacheSpec.of(model.config, 1, 8, torch.float64))
    return model(ids, Step.full(*ids.shape, quantization=cache.quantization), source=source)


@pytest.mark.parametrize("kind", CACHES)
def test_decoding_reads_it_and_leaves_it_as_it_was(kind: str) -> None:
    model = seq2seq()
    source = model.encode(*sources())
    before = [(k.data_ptr(), k.clone(), v.clone()) for k, v in source.layers]
    close(decode(model, kind, source, TARGETS), whole(model, kind, source, TARGETS))
    assert len(source.layers) == model.config.n_layers
    for (address, old_k, old_v), (k, v) in zip(before, source.layers, strict=True):
        assert (k.data_ptr(), tuple(k.shape)) == (address, (3, 2, 7, 4))  # heads not expanded
        assert k.equal(old_k) and v.equal(old_v)


def test_it_is_projected_once_and_not_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    projected: list[int] = []
    project = CrossAttention.project

    def counted(self: CrossAttention, *args: Any) -> Any:
        projected.append(self.layer)
        return project(self, *args)

    monkeypatch.setattr(CrossAttention, "project", counted)
    model = seq2seq()
    source = model.encode(*sources())
    decode(model, "dynamic", source, TARGETS)
    assert projected == [0, 1]


def test_two_sources_do_not_mix() -> None:
    """A cache that is filled for a first source must not serve a second one."""
    model = seq2seq()
    first, second = model.encode(*sources(0)), model.encode(*sources(1))
    expected = model(TARGETS, source=model.encode(*sources(0)))
    other = decode(model, "dynamic", second, TARGETS)
    close(decode(model, "dynamic", first, TARGETS), expected)
    assert float((other - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 1, 2, 2, 1]], ids=str)
def test_selected_rows_keep_their_own_sources_and_masks(rows: list[int]) -> None:
    model, picked = seq2seq(), torch.tensor(rows)
    source = model.encode(*sources())
    found = source.select(picked)
    ids, mask = sources()
    alone = torch.cat([model(TARGETS[[r]], source=one_source(model, r)) for r in rows])
    assert found.mask.equal(mask[picked])
    close(model(TARGETS[picked], source=found), alone)
    close(model(TARGETS, source=source), model(TARGETS, source=model.encode(ids, mask)))


def one_source(model: Model, row: int) -> CrossCache:
    """A source by itself, without any padding."""
    ids = sources()[0][row : row + 1, : LENGTHS[row]]
    return model.encode(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0]], ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_it_is_reordered_together_with_the_self_cache(kind: str, rows: list[int]) -> None:
    """As beam search does at every step."""
    model, picked = seq2seq(), torch.tensor(rows)
    source = model.encode(*sources())
    cache = make_cache(kind, CacheSpec.of(model.config, 3, 8, torch.float64))
    feed(model, cache, TARGETS[:, :3], source)
    cache.select(picked)
    ids = torch.cat([TARGETS[picked, :3], TARGETS[:, 3:]], dim=1)
    found = feed(model, cache, ids, source.select(picked))[:, -2:]
    alone = [(ids[[i]], one_source(model, row)) for i, row in enumerate(rows)]
    expected = [whole(model, kind, source, one) for one, source in alone]
    close(found, torch.cat(expected)[:, -2:])


def test_its_bytes_are_those_of_its_keys_and_values() -> None:
    """Both are halves of one projection, whose memory counts once."""
    source = seq2seq().encode(*sources())
    keys_and_values = 2 * 2 * 3 * 7 * 2 * 4 * 8  # two, layers, rows, columns, heads, width, bytes
    assert source.nbytes() == keys_and_values
    assert source.select(torch.tensor([2, 0, 1])).nbytes() == keys_and_values
    assert source.select(torch.tensor([1])).nbytes() == keys_and_values // 3
