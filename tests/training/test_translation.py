"""Translation: batches, the loss, decoding many sources at once, and scores."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import translation_cases
from kvtool.core.cache import cache_class
from kvtool.core.decoding import beam
from kvtool.core.decoding import sources as decoding
from kvtool.core.decoding.sources import check_sources, pad, target_limit, translate
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.kernels.exact import EXACT
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS, EOS, PAD
from kvtool.core.training.pairs import Pair
from kvtool.core.training.translation import Translation
from kvtool.errors import CapacityError
from kvtool.registry import CACHES
from translation_cases import CONTEXT, CPU, model, sources, splits, task

calm = translation_cases.calm


# Batches


@pytest.mark.parametrize("batch_tokens", [30, 80, 400, 10**6])
def test_an_epoch_has_every_pair_once_in_batches_of_bounded_size(batch_tokens: int) -> None:
    subject = task(batch_tokens=batch_tokens)
    for epoch in range(5):
        batches = subject.batches(epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(90))
        assert max(padded(subject, batch) for batch in batches) <= batch_tokens


def padded(subject: Translation, batch: list[int]) -> int:
    """Tokens of a batch, both sides with their padding."""
    sides = zip(*(subject.rows[i] for i in batch), strict=True)
    return sum(len(batch) * max(map(len, side)) for side in sides)


@pytest.mark.parametrize("batch_tokens", range(70, 200, 13))
def test_the_bound_holds_where_long_sources_have_short_targets(batch_tokens: int) -> None:
    pairs = [Pair("a" * (1 + 7 * n % 31), (" ".join("A" * (1 + n % 4)),)) for n in range(60)]
    subject = task(splits(pairs), batch_tokens=batch_tokens)
    sizes = [padded(subject, batch) for batch in subject.batches(0)]
    assert 0.6 * batch_tokens < sum(sizes) / len(sizes) <= max(sizes) <= batch_tokens


def test_a_pair_larger_than_a_batch_is_a_batch_of_its_own() -> None:
    assert [len(batch) for batch in task(batch_tokens=1).batches(0)] == [1] * 90


def test_a_batch_holds_pairs_of_similar_length() -> None:
    subject = task(batch_tokens=200)
    lengths = [sorted(len(subject.rows[i][1]) for i in batch) for batch in subject.batches(0)]
    shortest = [row[0] for row in lengths]
    assert shortest != sorted(shortest)  # the batches themselves are shuffled
    lengths.sort()
    assert all(one[-1] <= other[0] for one, other in pairwise(lengths))


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    subject = task()
    first = subject.batches(3)
    torch.manual_seed(99)
    subject.batches(4)
    assert subject.batches(3) == first == task().batches(3)
    assert subject.batches(4) != first != task(seed=1).batches(3)
    assert task(seed=2**63 - 1).batches(0)


# Padding and the loss


def test_padding_stands_behind_and_is_masked() -> None:
    ids, mask = pad([[7, 8, 9], [5]], CPU)
    assert ids.tolist() == [[7, 8, 9], [5, PAD, PAD]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("positions", ["sinusoidal", "rotary"])
def test_the_loss_of_a_pair_is_the_same_beside_longer_ones(
    smoothing: float, positions: str
) -> None:
    subject, network = task(smoothing=smoothing), model(positions=positions)
    batch = max(subject.batches(0), key=lambda rows: len({len(subject.rows[i][1]) for i in rows}))
    batch = [*batch, max(range(90), key=lambda i: len(subject.rows[i][0]))]
    with torch.no_grad():
        loss, n = subject.loss(network, batch)
        alone = [subject.loss(network, [i]) for i in batch]
    lengths = [len(subject.rows[i][1]) for i in batch]
    assert len(set(lengths)) > 1 and n == sum(size for _, size in alone)
    mean = sum(float(one) * n for (one, _), n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert float(loss) == pytest.approx(mean, rel=1e-5)


def test_the_loss_is_smoothed_cross_entropy_of_the_shifted_target() -> None:
    subject, network = task(smoothing=0.25), model()
    source, target = subject.rows[3]
    with torch.no_grad():
        found, n = subject.loss(network, [3])
        encoded = network.encode(torch.tensor([source]), torch.ones(1, len(source), dtype=bool))
        logits = network(torch.tensor([[BOS, *target[:-1]]]), source=encoded)[0]
    costs = -F.log_softmax(logits, -1)
    right = costs[range(len(target)), target]
    assert target[-1] == EOS and n == len(source) + len(target)
    expected = float((0.75 * right + 0.25 * costs.mean(-1)).mean())
    assert float(found) == pytest.approx(expected, rel=1e-6)


# Decoding


@pytest.mark.parametrize("kind", CACHES)
def test_many_sources_at_once_give_the_targets_of_each_alone_in_any_order(kind: str) -> None:
    network, given = model(7), sources()
    together = translate(network, given, kind=kind)
    rounds = cache_class(kind).quantization is not None  # every token, so that others are chosen
    alone = kind if rounds else "none"
    assert together == [translate(network, [ids], kind=alone)[0] for ids in given]
    lengths = [len(ids) for ids in together]
    limits = [target_limit(len(ids), CONTEXT) for ids in given]
    ended = [n < limit for n, limit in zip(lengths, limits, strict=True)]
    assert any(ended) and not all(ended)  # both ways to end are tried
    order = random.Random(1).sample(range(len(given)), len(given))
    assert translate(network, [given[i] for i in order], kind=kind) == [together[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_kernels_give_each_source_its_target_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """In bfloat16 too, where rounding by the size of the batch may choose another token."""
    monkeypatch.delattr(DefaultKernels, "per_token")  # not asked for anything
    monkeypatch.delattr(DefaultKernels, "attention")
    network, given = model(7).to(dtype), sources()[::4]
    together = translate(network, given, kernels=EXACT)
    assert together == [translate(network, [ids], kernels=EXACT)[0] for ids in given]


def test_more_sources_than_are_decoded_together_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, given = model(7), sources()
    expected = translate(network, given)
    monkeypatch.setattr(decoding, "DECODING_BATCH", 7)
    assert translate(network, given) == expected
    assert translate(network, []) == []


@pytest.mark.parametrize("max_tokens", [1, 3, CONTEXT - 1])
def test_a_target_ends_before_eos_or_at_the_limit(max_tokens: int) -> None:
    network, given = model(7), sources()
    targets = translate(network, given, max_tokens)
    assert all(EOS not in ids and len(ids) <= max_tokens for ids in targets)
    longest = translate(network, given, CONTEXT - 1)
    assert targets == [ids[:max_tokens] for ids in longest]


def test_targets_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, network, given = [], model(7), sources()
    feed = beam.feed

    def counting(model: Model, cache: object, ids: Tensor, *rest: object, **named: object):
        rows.append(len(ids))
        return feed(model, cache, ids, *rest, **named)

    monkeypatch.setattr(beam, "feed", counting)
    lengths = [len(ids) for ids in translate(network, given, CONTEXT - 1)]
    steps = [min(n + 1, CONTEXT - 1) for n in lengths]  # the end token has one
    assert rows == [sum(n > step for n in steps) for step in range(max(steps))]
    assert len(set(rows)) > 2


@pytest.mark.parametrize(("n", "context", "limit"), [(1, 99, 22), (10, 99, 40), (50, 99, 98)])
def test_a_target_may_be_twice_its_source_and_twenty_but_fits(
    n: int, context: int, limit: int
) -> None:
    assert target_limit(n, context) == limit


def test_more_tokens_than_the_context_holds_are_refused() -> None:
    with pytest.raises(CapacityError, match="the model holds 32"):
        translate(model(), [[4]], CONTEXT)


@pytest.mark.parametrize(("source", "said"), [([], "is empty"), ([4] * 33, "is 33 tokens long")])
def test_a_source_that_the_model_cannot_hold_is_refused_by_its_number(
    source: list[int], said: str
) -> None:
    with pytest.raises(CapacityError, match=f"source 2: {said}"):
        translate(model(), [[4] * 32, source])
    with pytest.raises(CapacityError, match=f"source 12: {said}"):
        check_sources([[4], source], CONTEXT, first=10)
