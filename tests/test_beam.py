"""Beam search: it finds what a search through everything finds, whatever the cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvtool.core import beam as beam_module
from kvtool.core.beam import Beam, Hypothesis, beam_search
from kvtool.core.cache.cross import CrossCache
from kvtool.core.engine import generate
from kvtool.core.exact import ExactKernels
from kvtool.core.models import Model
from kvtool.core.sampling import Sampler
from kvtool.core.text import BOS, EOS
from kvtool.errors import CapacityError, CheckFailed
from kvtool.registry import CACHES
from small_models import random_model

N = 3
VOCAB = 6


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(
        3, torch.float64, vocab_size=VOCAB, n_encoder_layers=1, source_vocab_size=9, n_kv_heads=2
    )


def sources(model: Model) -> CrossCache:
    ids = torch.tensor([[5, 3, 8, 2], [4, 4, 7, 0], [6, 0, 0, 0]])
    return model.encode(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool())


def start(n: int = 3) -> Tensor:
    return torch.full((n, 1), BOS)


@torch.inference_mode()
def log_prob(model: Model, source: CrossCache, ids: list[int], ended: bool) -> float:
    """Of a target from one pass over it, without a cache."""
    whole = [*ids, EOS] if ended else ids
    logits = model(torch.tensor([[BOS, *whole[:-1]]]), source=source)[0]
    return float(logits.log_softmax(-1)[range(len(whole)), whole].sum())


def everything(model: Model, source: CrossCache, beam: Beam, limit: int) -> list[Hypothesis]:
    """All targets up to a length, best first."""
    found = []
    others = [t for t in range(VOCAB) if t != EOS]
    for n in range(limit + 1):
        for ids in itertools.product(others, repeat=n):
            ended = n < limit
            value = log_prob(model, source, list(ids), ended)
            found.append(Hypothesis(list(ids), value, beam.score(value, n + ended), ended))
    return sorted(found, key=lambda h: -h.score)


@torch.inference_mode()
def test_a_beam_as_wide_as_all_there_is_finds_what_a_full_search_finds(model: Model) -> None:
    beam = Beam(size=200, n_best=20, length_penalty=0.6)
    found = beam_search(model, start(), "dynamic", [N] * 3, beam, EOS, sources(model))
    for i, hypotheses in enumerate(found):
        source = sources(model).select(torch.tensor([i]))
        expected = everything(model, source, beam, N)[:20]
        assert [h.ids for h in hypotheses] == [h.ids for h in expected]
        for one, other in zip(hypotheses, expected, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-12)
            assert (one.score, one.ended) == (pytest.approx(other.score, rel=1e-12), other.ended)


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_finds_the_same(model: Model, kind: str) -> None:
    beam = Beam(size=4, n_best=4)
    expected = beam_search(model, start(), "none", [9, 12, 5], beam, EOS, sources(model))
    found = beam_search(model, start(), kind, [9, 12, 5], beam, EOS, sources(model))
    assert [[h.ids for h in each] for each in found] == [[h.ids for h in e] for e in expected]
    assert all(len(each) == 4 for each in found)


def test_log_probabilities_are_those_of_one_pass_over_the_target(model: Model) -> None:
    found = beam_search(model, start(), "static", [9] * 3, Beam(3, n_best=3), EOS, sources(model))
    for i, hypotheses in enumerate(found):
        source = sources(model).select(torch.tensor([i]))
        for h in hypotheses:
            assert h.log_prob == pytest.approx(log_prob(model, source, h.ids, h.ended), rel=1e-12)


def test_a_beam_of_one_is_greedy() -> None:
    model = random_model(1, torch.float64)
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9]])
    found = beam_search(model, prompt, "dynamic", [8, 8], Beam(1))
    make = beam_module.make_cache
    cache = make("dynamic", beam_module.CacheSpec.of(model.config, 2, 11, torch.float64))
    greedy = torch.stack(list(generate(model, prompt, cache, 8, Sampler())), dim=1)
    assert [h.ids for each in found for h in each] == greedy.tolist()


def test_a_prompt_finds_the_same_alone_and_among_others(model: Model) -> None:
    beam = Beam(size=3, n_best=3)
    together = beam_search(model, start(), "dynamic", [9, 3, 6], beam, EOS, sources(model))
    for i, limit in enumerate([9, 3, 6]):
        source = sources(model).select(torch.tensor([i]))
        (alone,) = beam_search(model, start(1), "dynamic", [limit], beam, EOS, source)
        assert [h.ids for h in alone] == [h.ids for h in together[i]]


def test_rows_of_a_prompt_that_is_done_leave_the_batch(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    feed: Callable[..., Tensor] = beam_module.feed

    def counting(model: Model, cache: object, ids: Tensor, *rest: object, **named: object):
        rows.append(len(ids))
        return feed(model, cache, ids, *rest, **named)

    monkeypatch.setattr(beam_module, "feed", counting)
    beam_search(model, start(), "dynamic", [2, 4, 6], Beam(2), None, sources(model))
    assert rows == [6, 6, 4, 4, 2, 2]


def test_exact_kernels_give_the_same_log_probabilities_in_any_batch(model: Model) -> None:
    model = random_model(3, vocab_size=VOCAB, n_encoder_layers=1, source_vocab_size=9)
    kernels = ExactKernels()
    ids, mask = torch.tensor([[5, 3, 8], [4, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    given = ([7, 7], Beam(3, n_best=3), EOS)
    both = beam_search(model, start(2), "static", *given, model.encode(ids, mask, kernels), kernels)
    source = model.encode(ids[:1], mask[:1], kernels)
    alone = beam_search(model, start(1), "dynamic", [7], *given[1:], source, kernels)
    assert alone[0] == both[0]


def test_a_longer_penalty_prefers_longer_targets() -> None:
    assert Beam(length_penalty=0).score(-3.0, 9) == -3.0
    assert Beam(length_penalty=1.0).score(-3.0, 7) == -1.5
    short, long = Beam(length_penalty=1.0).score(-2.0, 1), Beam(length_penalty=1.0).score(-2.5, 7)
    assert long > short


def test_what_does_not_fit_is_refused_and_nan_is_no_choice(model: Model) -> None:
    with pytest.raises(CapacityError, match="the model holds 64"):
        beam_search(model, start(), "dynamic", [64] * 3, Beam(2), EOS, sources(model))
    broken = random_model(0)
    torch.nn.init.constant_(broken.norm.weight, float("nan"))
    with pytest.raises(CheckFailed, match="step 0: the logits are not finite"):
        beam_search(broken, torch.tensor([[3]]), "dynamic", [4], Beam(2))
