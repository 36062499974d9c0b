"""Translation: batches, the loss, decoding many sources at once, and scores."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding import beam
from kvtool.core.decoding import sources as decoding
from kvtool.core.decoding.sources import check_sources, pad, target_limit, translate
from kvtool.core.kernels.default import DefaultKernels
from kvtool.core.kernels.exact import EXACT
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import BOS, EOS, KINDS, PAD, Tokenizer
from kvtool.core.training import translation
from kvtool.core.training.pairs import PHONES, Pair, Splits, load_cmudict
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.scoring import Score
from kvtool.core.training.train import Trainer
from kvtool.core.training.translation import Translation
from kvtool.errors import CapacityError, FileError, KvtoolError
from kvtool.registry import CACHES
from kvtool.ui.progress import Progress
from small_models import random_model
from training_cases import config, one_thread

CPU = torch.device("cpu")
CONTEXT = 32
VOCAB = 11
words = random.Random(0)
PAIRS = tuple(
    Pair(word, (" ".join(word.upper()), " ".join(reversed(word.upper())))[: 1 + n % 2])
    for n in range(60)
    for word in ["".join(words.choices("abcdef", k=words.randint(1, 9)))]
)


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with one_thread():
        yield


def splits(
    train: Sequence[Pair] = PAIRS, valid: Sequence[Pair] = PAIRS[:5], test: Sequence[Pair] = ()
) -> Splits:
    return Splits(tuple(train), tuple(valid), tuple(test), "train.tsv", "hash", "v.tsv", "t.tsv")


def task(parts: Splits | None = None, kinds: str = "char symbol", **changes: Any) -> Translation:
    parts = parts or splits()
    texts = [p.source for p in parts.train], [t for p in parts.train for t in p.targets]
    source, target = map(Tokenizer.train, kinds.split(), texts, (300, 300))
    given = {"context": CONTEXT, "batch_tokens": 80, "smoothing": 0.1, "seed": 0, **changes}
    return Translation(parts, source, target, device=CPU, **given)


def model(seed: int = 0, **changes: Any) -> Model:
    """In float64, so that no choice between two tokens depends on the order of a sum."""
    sizes = {
        "vocab_size": VOCAB,
        "source_vocab_size": VOCAB,
        "n_encoder_layers": 1,
        "n_layers": 1,
        "tied": False,
    }
    return random_model(seed, torch.float64, **{**sizes, "context": CONTEXT, **changes})


def sources(n: int = 30, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, VOCAB) for _ in range(draw.randint(1, 12))] for _ in range(n)]


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
    assert together == [translate(network, [ids], kind="none")[0] for ids in given]
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
    monkeypatch.delattr(DefaultKernels, "rows")  # not asked for anything
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


# The task


LONG = Pair("a" * 33, ("A",))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (splits([*PAIRS, LONG]), "train.tsv: 'aaaaaaaaaa.*' makes 33 tokens"),
        (splits([*PAIRS, Pair("ab", ("A " * 32,))]), "train.tsv: 'ab' makes 33 tokens"),
        (splits(valid=[LONG]), "v.tsv: 'aaaaaaaaaa.*' makes 33 tokens"),
        (splits(test=[PAIRS[0], LONG]), "t.tsv: 'aaaaaaaaaa.*' makes 33 tokens"),
    ],
    ids=["source", "target with its end", "dev", "test"],
)
def test_what_the_model_cannot_hold_is_refused_before_any_training(
    parts: Splits, said: str
) -> None:
    with pytest.raises(FileError, match=rf"{said} \(the model holds 32\)\. Give --context 33"):
        task(parts)


def test_what_just_fits_is_taken() -> None:
    subject = task(splits([*PAIRS, Pair("a" * 32, ("A " * 31,))]))
    assert tuple(map(len, subject.rows[-1])) == (32, 32)


def answered(monkeypatch: pytest.MonkeyPatch, subject: Translation, *texts: str) -> None:
    """Have every model give these targets."""
    ids = subject.tokenizer.encode_batch(texts)
    monkeypatch.setattr(translation, "translate", lambda *_: ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_answer_has_no_errors_whatever_the_tokenizer(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    texts = ["Don't  panic, it's 1,000.5!", "a b c", "naïve?! (no) well-known"]
    pairs = [Pair(text, ("something else", text)[n % 2 :]) for n, text in enumerate(texts)]
    subject = task(splits(pairs, pairs), f"{kind} {kind}")
    answered(monkeypatch, subject, *texts)
    vocabularies = subject.tokenizer.vocab_size, subject.source_tokenizer.vocab_size
    network = model(vocab_size=vocabularies[0], source_vocab_size=vocabularies[1])
    figures = subject.evaluate(network)
    assert figures.pop("loss") > 0
    if kind in ("char", "symbol"):
        assert figures == {{"char": "cer", "symbol": "ser"}[kind]: 0, "wer": 0}
    else:
        assert figures == pytest.approx({"bleu": 100, "bleu_lc": 100, "chrf": 100})


@pytest.mark.parametrize("kind", ["symbol", "word"])
def test_unknown_words_of_a_reference_are_errors(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    subject = task(splits([Pair("a", ("the old cat sat down",))]), f"char {kind}")
    answered(monkeypatch, subject, "the old cat sat")
    figures = subject.figures(subject.score(model(), [Pair("a", ("the old cat sat outside",))]))
    if kind == "symbol":
        assert figures == {"ser": 20, "wer": 100}
    else:
        assert figures["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 4))


SENTENCES = [Pair("a", ("one two three",)), Pair("b", ("one", "one two three four"))]


@pytest.mark.parametrize(
    ("kind", "valid", "name"),
    [
        ("char", SENTENCES, "cer"),
        ("symbol", SENTENCES, "ser"),
        ("word", SENTENCES, "bleu"),
        ("bpe", SENTENCES, "bleu"),
        ("bpe", SENTENCES[:1], "chrf"),  # no four words: BLEU would be 0 for ever
    ],
)
def test_text_is_judged_by_bleu_and_symbols_by_their_error_rate(
    kind: str, valid: Sequence[Pair], name: str
) -> None:
    subject = task(splits(SENTENCES, valid), f"char {kind}")
    assert (subject.score_name, subject.higher_is_better) == (name, kind in ("word", "bpe"))
    sizes = {"vocab_size": subject.tokenizer.vocab_size}
    assert name in subject.evaluate(model(**sizes))


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (("R EH N", "AW T"), "per"),
        (("R EH1 N", "AW0 T"), "per"),  # with stress
        (("R EH N", "c4 d4"), "ser"),  # notes
        (("r e n", "a u"), "ser"),
    ],
)
def test_only_errors_of_phones_are_called_so(targets: tuple[str, ...], name: str) -> None:
    subject = task(splits([Pair("a", targets)]), "char symbol")
    assert subject.score_name == name and subject.figures(Score(4, 1, 2, 8)) == {
        name: 25,
        "wer": 25,
    }


def test_the_phones_that_are_known_are_those_of_the_dictionary() -> None:
    pairs = load_cmudict().train
    assert {phone for p in pairs for target in p.targets for phone in target.split()} == PHONES


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_held_out_loss_is_that_of_training_for_the_same_pairs(smoothing: float) -> None:
    subject = task(splits(PAIRS, PAIRS[:7]), smoothing=smoothing, batch_tokens=60)
    network, rows = model(), range(sum(len(pair.targets) for pair in PAIRS[:7]))
    with torch.no_grad():
        expected = float(subject.loss(network, list(rows))[0])
    assert subject.evaluate(network)["loss"] == pytest.approx(expected, rel=1e-5)
    assert subject.loss_floor <= expected


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_no_logits_have_a_loss_below_the_floor_and_some_have_it(smoothing: float) -> None:
    subject = task(smoothing=smoothing)
    n = subject.tokenizer.vocab_size
    aimed = torch.full((n,), smoothing / n, dtype=torch.float64)
    aimed[5] += 1 - smoothing
    lowest = F.cross_entropy(
        aimed.clamp(min=1e-300).log()[None], torch.tensor([5]), label_smoothing=smoothing
    )
    assert subject.loss_floor == pytest.approx(float(lowest), abs=1e-12)


def test_a_held_out_target_that_the_model_cannot_hold_has_no_loss_but_a_score() -> None:
    long = Pair("ab", ("A " * CONTEXT,))
    both = task(splits(PAIRS, [*PAIRS[:3], long])).evaluate(model())
    assert both["loss"] == task(splits(PAIRS, PAIRS[:3])).evaluate(model())["loss"]
    assert "loss" not in task(splits(PAIRS, [long])).evaluate(model())


def test_a_large_dev_set_is_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "DEV_SAMPLE", 10)
    assert task(splits(valid=PAIRS[:40])).dev == PAIRS[:40:4]
    assert task(splits(valid=PAIRS[:9])).dev == PAIRS[:9]


def test_its_facts_tell_data_tokenizers_and_batches_apart() -> None:
    facts = task().facts()
    assert facts == task().facts() and facts["task"] == "train-seq2seq"
    assert task(smoothing=0.2).facts() == {**facts, "label_smoothing": 0.2}
    other = task(kinds="bpe symbol").facts()
    assert {name for name in facts if facts[name] != other[name]} == {"source_tokenizer_sha256"}


def test_twenty_pairs_are_learned_by_heart_and_the_best_checkpoint_knows_them(
    tmp_path: Path,
) -> None:
    pairs = tuple(Pair(pair.source, pair.targets[:1]) for pair in PAIRS[:20])
    subject = task(splits(pairs, pairs), batch_tokens=200)
    sizes = {
        "vocab_size": subject.tokenizer.vocab_size,
        "source_vocab_size": subject.source_tokenizer.vocab_size,
        "n_encoder_layers": 1,
        "n_layers": 1,
        "d_model": 32,
        "d_ff": 64,
        "context": CONTEXT,
    }
    network = random_model(**sizes).float()
    before = subject.evaluate(network)["wer"]
    settings = config(tmp_path, steps=240, eval_every=80, lr=0.01, warmup=20)
    with RunFolder(tmp_path, False, print) as folder:
        Trainer(network, subject, settings, folder, Progress(), print).run()
    best = checkpoint.load(str(tmp_path / "best"), CPU, torch.float32)
    after = subject.evaluate(best.model)
    assert before == 100 and after == {"ser": 0, "wer": 0, "loss": after["loss"]}
    assert best.source_tokenizer is not None
    ids = translate(best.model, best.source_tokenizer.encode_batch([pairs[0].source]))
    assert best.tokenizer.decode(ids[0]) == pairs[0].targets[0]


def test_what_cannot_be_decoded_is_an_error_of_kvtool() -> None:
    network = model()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(KvtoolError, match="not finite"):
        translate(network, [[4, 5]])
