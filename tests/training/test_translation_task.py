"""The task of translation: what it takes, how it judges, what is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import translation_cases
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.sources import translate
from kvtool.core.text.tokenizer import KINDS
from kvtool.core.training import translation
from kvtool.core.training.pairs import PHONES, Pair, Splits, load_cmudict
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.scoring import Score
from kvtool.core.training.train import Trainer
from kvtool.core.training.translation import Translation
from kvtool.errors import FileError, KvtoolError
from kvtool.ui.progress import Progress
from small_models import random_model
from training_cases import config
from translation_cases import CONTEXT, CPU, PAIRS, model, splits, task

calm = translation_cases.calm


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
