"""Beam search: it finds what a search through everything finds, whatever the cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.cache import cache_class
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding import beam as beam_module
from kvtool.core.decoding.beam import Beam, Hypothesis, beam_search
from kvtool.core.decoding.engine import generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.exact import ExactKernels
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS, EOS
from kvtool.errors import CapacityError, CheckFailed
from kvtool.registry import CACHES
from small_models import SIZES, random_model

N = 3
VOCAB = 6
# Those that the command takes, from none to the strongest, and one that favours short targets.
PENALTIES = [0.0, 0.1, 0.6, 1.0, 1.7, 4.0, 10.0, -1.5]


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


def by_score(beam: Beam, found: Iterable[Hypothesis]) -> list[Hypothesis]:
    """Best first, scored as the beam says."""
    scored = [replace(h, score=beam.score(h.log_prob, len(h.ids) + h.ended)) for h in found]
    return sorted(scored, key=lambda h: -h.score)


@torch.inference_mode()
def log_prob(model: Model, source: CrossCache, ids: list[int], ended: bool) -> float:
    """Of a target from one pass over it, without a cache."""
    whole = [*ids, EOS] if ended else ids
    logits = model(torch.tensor([[BOS, *whole[:-1]]]), source=source)[0]
    return float(logits.log_softmax(-1)[range(len(whole)), whole].sum())


@pytest.fixture(scope="module")
def everything(model: Model) -> list[list[Hypothesis]]:
    """All targets of each source up to a length, not scored."""
    found: list[list[Hypothesis]] = []
    others = [t for t in range(VOCAB) if t != EOS]
    for i in range(3):
        source = sources(model).select(torch.tensor([i]))
        found.append([])
        for n in range(N + 1):
            for ids in itertools.product(others, repeat=n):
                value = log_prob(model, source, list(ids), n < N)
                found[-1].append(Hypothesis(list(ids), value, 0.0, n < N))
    return found


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_beam_as_wide_as_all_there_is_finds_what_a_full_search_finds(
    model: Model, everything: list[list[Hypothesis]], penalty: float
) -> None:
    beam = Beam(size=5**N, n_best=20, length_penalty=penalty)
    found = beam_search(model, start(), "dynamic", [N] * 3, beam, EOS, sources(model))
    for hypotheses, targets in zip(found, everything, strict=True):
        expected = by_score(beam, targets)[:20]
        assert [h.ids for h in hypotheses] == [h.ids for h in expected]
        for one, other in zip(hypotheses, expected, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-12)
            assert (one.score, one.ended) == (pytest.approx(other.score, rel=1e-12), other.ended)


def test_targets_that_ended_and_those_cut_at_the_limit_are_all_there_is(model: Model) -> None:
    """So that their probabilities may be compared: together they make one."""
    beam = Beam(size=5**N, n_best=10**6)
    for found in beam_search(model, start(), "dynamic", [N] * 3, beam, EOS, sources(model)):
        assert len(found) == 1 + 5 + 5**2 + 5**3
        assert {h.ended for h in found} == {True, False}
        assert math.fsum(math.exp(h.log_prob) for h in found) == pytest.approx(1, rel=1e-12)


# --- beams that are too narrow to see everything

LIMIT = 9


class Chance(torch.nn.Module):
    """What comes next is drawn at random for each history: here it is nearly sure, there anything,
    and ends are seldom likely. So greed is often right where it looks bad at first."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=VOCAB, **{**SIZES, "context": LIMIT + 2})
        generator = torch.Generator().manual_seed(seed)
        sure = torch.rand(997, 1, generator=generator) < 0.3
        logits = torch.randn(997, VOCAB, generator=generator, dtype=torch.float64)
        logits *= torch.where(sure, 5, 1)
        logits[:, EOS] -= 3 * (seed % 2)
        self.table = torch.nn.Parameter(logits)
        self.log_probs: list[list[float]] = logits.log_softmax(-1).tolist()

    def forward(self, ids: Tensor, *rest: object) -> Tensor:
        """All of a history (B,T) -> logits (B,1,V)"""
        return self.table[[self.place(row) for row in ids.tolist()]][:, None]

    def after(self, ids: Sequence[int]) -> list[float]:
        """The log-probabilities of what comes next."""
        return self.log_probs[self.place(ids)]

    def place(self, ids: Sequence[int]) -> int:
        return sum((token + 7) * (i + 3) ** 4 for i, token in enumerate(ids)) % 997


def search(
    model: Chance,
    prompts: list[list[int]],
    beam: Beam,
    eos: int | list[int] = EOS,
    limits: Sequence[int] = (LIMIT,),
) -> list[list[Hypothesis]]:
    """With the cache that holds nothing, and so is given whole histories."""
    return beam_search(cast(Model, model), torch.tensor(prompts), "none", limits, beam, eos)


def plain_search(model: Chance, prompt: list[int], size: int, limit: int) -> list[Hypothesis]:
    """All that beam search meets without bounds, greed or anything shared, not scored."""
    ended, live = [], [Hypothesis([], 0.0, 0.0, False)]
    for _ in range(limit):
        longer = []
        for h in live:
            for token, value in enumerate(model.after(prompt + h.ids)):
                if token == EOS:
                    ended.append(Hypothesis(h.ids, h.log_prob + value, 0.0, True))
                else:
                    longer.append(Hypothesis([*h.ids, token], h.log_prob + value, 0.0, False))
        live = sorted(longer, key=lambda h: -h.log_prob)[:size]
    return [*ended, *live]


def greedy_search(model: Chance, prompt: list[int], limit: int) -> Hypothesis:
    ids: list[int] = []
    value = 0.0
    while len(ids) < limit:
        after = model.after(prompt + ids)
        token = after.index(max(after))
        value += after[token]
        if token == EOS:
            return Hypothesis(ids, value, 0.0, True)
        ids.append(token)
    return Hypothesis(ids, value, 0.0, False)


class Found(NamedTuple):
    best: list[Hypothesis]
    plain: list[Hypothesis]  # by plain beam search, best first
    greedy: Hypothesis
    n_best: int


@pytest.fixture(scope="module")
def searched() -> list[Found]:
    """Over random models, prompts, limits, sizes and penalties."""
    found = []
    for seed, size in itertools.product(range(12), (2, 3, 5)):
        model, prompts = Chance(seed), [[a, b] for a in range(3) for b in range(3)]
        limits = [LIMIT - i % 4 for i in range(len(prompts))]
        given = list(zip(prompts, limits, strict=True))
        plain = [plain_search(model, prompt, size, limit) for prompt, limit in given]
        greedy = [greedy_search(model, prompt, limit) for prompt, limit in given]
        for i, penalty in enumerate(PENALTIES):
            beam = Beam(size, penalty, n_best=1 if (i + seed) % 2 else size)
            best = search(model, prompts, beam, EOS, limits)
            for each, met, one in zip(best, plain, greedy, strict=True):
                found.append(Found(each, by_score(beam, met), *by_score(beam, [one]), beam.n_best))
    return found


def test_no_beam_scores_below_greedy_though_plain_beam_search_does(searched: list[Found]) -> None:
    assert all(found.best[0].score >= found.greedy.score - 1e-12 for found in searched)
    below = sum(found.plain[0].score < found.greedy.score - 1e-12 for found in searched)
    assert below > 10  # it is a thing that happens


def test_ending_early_loses_nothing_of_what_plain_beam_search_finds(searched: list[Found]) -> None:
    """Whatever the penalty: the n best of that and of the greedy continuation, in their order."""
    ways = set()
    for best, plain, greedy, n_best in searched:
        met = [greedy, *(h for h in plain if (h.ids, h.ended) != (greedy.ids, greedy.ended))]
        expected = sorted(met, key=lambda h: -h.score)[:n_best]
        assert [(h.ids, h.ended) for h in best] == [(h.ids, h.ended) for h in expected]
        for one, other in zip(best, expected, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-12)
            assert one.score == pytest.approx(other.score, rel=1e-12)
        ways |= {(h.ended, len(h.ids) < LIMIT // 2) for h in best}
    assert ways == {(True, True), (True, False), (False, False)}  # short, long, and at the limit


def test_more_of_the_best_begin_with_fewer_of_them(model: Model) -> None:
    def best(n: int) -> list[list[Hypothesis]]:
        beam = Beam(5, n_best=n)
        return beam_search(model, start(), "static", [9] * 3, beam, EOS, sources(model))

    five = best(5)
    for n in range(1, 5):
        for few, many in zip(best(n), five, strict=True):
            assert [h.ids for h in few] == [h.ids for h in many[:n]]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_continuation_surpasses_its_bound(penalty: float) -> None:
    beam = Beam(length_penalty=penalty)
    for length, limit, value in itertools.product((1, 4, 30), (31, 200), (0.0, -0.01, -7.0, -90.0)):
        bound = beam.bound(value, length, limit)
        reached = [beam.score(value, n) for n in range(length + 1, limit + 1)]
        assert max(reached) == bound  # not below it, and not far above either


def test_of_several_ways_to_end_a_target_is_found_once_by_the_likeliest() -> None:
    model, ends = Chance(1), [EOS, 4, 5]
    (found,) = search(model, [[3, 1]], Beam(30, n_best=30), ends, [4])
    assert len({tuple(h.ids) for h in found}) == len(found) == 30
    assert {h.ended for h in found} == {True, False}
    for h in found:
        steps = [model.after([3, 1, *h.ids[:i]]) for i in range(len(h.ids) + h.ended)]
        value = sum(after[token] for after, token in zip(steps, h.ids, strict=False))
        value += max(steps[-1][end] for end in ends) if h.ended else 0.0
        assert h.log_prob == pytest.approx(value, rel=1e-12)


# --- caches and batches


# fp8 rounds every token, and so finds others.
@pytest.mark.parametrize(
    "kind", [kind for kind in CACHES if cache_class(kind).quantization is None]
)
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


@pytest.mark.parametrize("eos", [None, 4])
def test_a_beam_of_one_is_greedy(eos: int | None) -> None:
    model = random_model(3, torch.float64, tied=False, positions="learned")
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8]])
    found = beam_search(model, prompt, "dynamic", [8] * 4, Beam(1), eos)
    make = beam_module.make_cache
    cache = make("dynamic", beam_module.CacheSpec.of(model.config, 4, 11, torch.float64))
    greedy = torch.stack(list(generate(model, prompt, cache, 8, Sampler())), dim=1).tolist()
    if eos is not None:
        greedy = [row[: row.index(eos)] if eos in row else row for row in greedy]
        assert sorted(map(len, greedy)) == [3, 4, 7, 8]
    assert [h.ids for each in found for h in each] == greedy


def test_a_prompt_finds_the_same_alone_and_among_others(model: Model) -> None:
    beam = Beam(size=3, n_best=3)
    together = beam_search(model, start(), "dynamic", [9, 3, 6], beam, EOS, sources(model))
    for i, limit in enumerate([9, 3, 6]):
        source = sources(model).select(torch.tensor([i]))
        (alone,) = beam_search(model, start(1), "dynamic", [limit], beam, EOS, source)
        assert [h.ids for h in alone] == [h.ids for h in together[i]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each step has."""
    counted: list[int] = []
    feed: Callable[..., Tensor] = beam_module.feed

    def counting(model: Model, cache: object, ids: Tensor, *rest: object, **named: object):
        counted.append(len(ids))
        return feed(model, cache, ids, *rest, **named)

    monkeypatch.setattr(beam_module, "feed", counting)
    yield counted


def test_one_row_reads_a_prompt_and_those_of_one_that_is_done_leave_the_batch(
    model: Model, rows: list[int]
) -> None:
    beam_search(model, start(), "dynamic", [2, 4, 6], Beam(2), None, sources(model))
    assert rows == [3, 6, 4, 4, 2, 2]


def test_rows_that_cannot_win_any_more_leave_the_batch(rows: list[int]) -> None:
    """The stronger the penalty, the later that is known."""
    counts, seen = [], set()
    for penalty in (0.0, 0.6, 10.0):
        rows.clear()
        for seed in range(10):
            search(Chance(seed), [[3, 1]], Beam(4, penalty))
        seen |= set(rows)
        counts.append((len(rows), sum(rows)))
    assert seen == {1, 2, 3, 4, 5}  # one by one
    assert counts == sorted(counts)
    (fewest, _), *_, (most, _) = counts
    assert fewest <= most / 2 and most == 10 * LIMIT


def test_the_greedy_continuation_has_a_row_of_its_own_only_where_it_needs_one(
    rows: list[int],
) -> None:
    widest = []
    for seed in range(10):
        rows.clear()
        search(Chance(seed), [[3, 1]], Beam(2))
        widest.append(max(rows))
    assert {2, 3} <= set(widest) <= {1, 2, 3}


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
