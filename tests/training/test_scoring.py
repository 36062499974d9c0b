"""Error rates, BLEU and chrF against one or several references."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from math import exp
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli_probe import Ran
from kvtool.core.training import scoring
from kvtool.core.training.scoring import Score, detokenize, score_sequences, score_translations
from kvtool.errors import UsageError

steady = settings(derandomize=True, deadline=None, database=None)
PHONES = st.sampled_from(["AA", "AH", "B", "EY", "K", "Z"])
SEQUENCE = st.lists(PHONES, min_size=1, max_size=8).map(tuple)
REFERENCES = st.lists(SEQUENCE, min_size=1, max_size=4)
CORPUS = st.lists(st.tuples(REFERENCES, st.lists(PHONES, max_size=8)), min_size=1, max_size=6)


def edits(a, b) -> int:
    """The textbook recurrence, one row at a time: a second opinion on rapidfuzz."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def test_rates_are_percentages_over_the_corpus_not_means_over_words():
    references = [(("AH", "B", "K", "Z"),), (("EY",),)]
    score = score_sequences(references, [("AH", "B", "K", "Z"), ("AA",)])
    assert score == Score(n=2, n_wrong=1, n_edits=1, n_reference_tokens=5)
    assert score.wer == 50.0
    assert score.token_error_rate == 20.0


@pytest.mark.parametrize(
    ("missing", "said"),
    [(["sacrebleu"], "sacrebleu is"), (["rapidfuzz", "sacrebleu"], "rapidfuzz and sacrebleu are")],
)
def test_training_that_could_not_be_scored_is_refused_before_it_begins(
    kv: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: list[str],
    said: str,
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    ran = kv("--steps", "1", "--out", str(tmp_path / "run"), command="train-seq2seq")
    assert ran.code == 2 and not (tmp_path / "run").exists()
    assert f"train-seq2seq: {said} not installed" in ran.err
    assert "pip install 'kvtool[train]'" in ran.err


def test_nothing_but_scores_uses_the_libraries_of_the_extra() -> None:
    package = Path(scoring.__file__).parents[2]
    users = {
        path.name
        for path in package.rglob("*.py")
        for name in scoring.LIBRARIES
        if re.search(rf"^\s*(from|import) {name}\b", path.read_text("utf-8"), re.MULTILINE)
    }
    assert users == {"scoring.py"}


def test_a_sequence_that_equals_any_reference_is_right():
    references = [(("AH",), ("EY", "B"), ("K", "Z", "Z"))]
    for right in references[0]:
        score = score_sequences(references, [list(right)])
        assert (score.wer, score.token_error_rate) == (0.0, 0.0)
        assert score.n_reference_tokens == len(right)


def test_the_closest_reference_has_the_fewest_edits_even_if_a_longer_one_has_a_lower_rate():
    short, long = ("B",), ("Z", "B", "K", "K")
    score = score_sequences([(long, short)], [("Z", "B")])  # 1 edit of 1, or 2 edits of 4
    assert (score.n_edits, score.n_reference_tokens) == (1, 1)
    score = score_sequences([(long, short)], [("Z", "B", "K")])
    assert (score.n_edits, score.n_reference_tokens) == (1, 4)


@pytest.mark.parametrize("order", [1, -1])
def test_of_equally_close_references_the_longest_counts_in_any_order(order):
    references = (("B",), ("B", "Z", "Z"))[::order]
    score = score_sequences([references], [("B", "Z")])
    assert (score.n_edits, score.n_reference_tokens) == (1, 3)


def test_an_output_of_nothing_costs_its_whole_reference_and_a_long_one_more_than_all_of_it():
    assert score_sequences([(("AH", "B"),)], [()]).token_error_rate == 100.0
    assert (
        score_sequences([(("AH", "B"),)], [("AH", "B", "Z", "Z", "Z", "Z")]).token_error_rate
        == 200.0
    )


def test_tokens_are_compared_whole():
    score = score_sequences([(("AH", "B"),)], [("AA", "B")])
    assert (score.n_edits, score.n_reference_tokens) == (1, 2)


@steady
@given(REFERENCES, st.lists(PHONES, max_size=8))
def test_both_rates_are_zero_exactly_if_some_reference_is_equal(references, hypothesis):
    score = score_sequences([references], [hypothesis])
    equal = tuple(hypothesis) in references
    assert (score.wer == 0, score.token_error_rate == 0) == (equal, equal)


@steady
@given(CORPUS)
def test_counts_agree_with_the_textbook_recurrence(corpus):
    closest = [min((edits(r, h), -len(r)) for r in references) for references, h in corpus]
    assert score_sequences(*zip(*corpus, strict=True)) == Score(
        n=len(corpus),
        n_wrong=sum(tuple(h) not in references for references, h in corpus),
        n_edits=sum(n_edits for n_edits, _ in closest),
        n_reference_tokens=sum(-minus_length for _, minus_length in closest),
    )


@steady
@given(REFERENCES, SEQUENCE, st.randoms(use_true_random=False))
def test_the_order_of_references_does_not_matter(references, hypothesis, random):
    shuffled = random.sample(references, len(references))
    assert score_sequences([references], [hypothesis]) == score_sequences([shuffled], [hypothesis])


@steady
@given(CORPUS, CORPUS)
def test_scores_of_two_parts_add_up_to_the_score_of_the_whole(first, second):
    parts = [score_sequences(*zip(*corpus, strict=True)) for corpus in (first, second)]
    assert parts[0] + parts[1] == score_sequences(*zip(*first, *second, strict=True))


def test_nothing_to_score_is_a_usage_error():
    with pytest.raises(UsageError, match="nothing to score"):
        score_sequences([], [])
    with pytest.raises(UsageError, match="nothing to score"):
        score_translations([], [])


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([(("B",),)], [("B",), ("B",)], "2 hypotheses for 1 lists"),
        ([(("B",),), ()], [("B",), ("B",)], "item 1: no reference"),
        ([(("B",), ())], [("B",)], "item 0: an empty reference"),
    ],
)
def test_references_and_hypotheses_that_do_not_pair_up_are_refused(references, hypotheses, message):
    with pytest.raises(ValueError, match=message):
        score_sequences(references, hypotheses)


def test_a_str_is_not_taken_for_a_sequence_of_its_characters():
    with pytest.raises(TypeError, match="item 0: a str"):
        score_sequences([(("B", "Z"),)], ["B Z"])
    with pytest.raises(TypeError, match="item 0: a str"):
        score_sequences([("AH", "B")], [("AH", "B")])


# Translations


def test_bleu_is_the_mean_of_the_precisions_of_one_to_four_words():
    score = score_translations([("the cat sat on a mat",)], ["the cat sat on the mat"])
    assert score.figures["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))


def test_an_output_that_equals_any_reference_is_right():
    references = [("a b c d",), ("k l m n o", "e f g h", "p q r s t u")]
    for right in references[1]:
        score = score_translations(references, ["a b c d", right])
        assert score.n == 2
        assert score.figures == pytest.approx({"bleu": 100, "bleu_lc": 100, "chrf": 100})


@pytest.mark.parametrize("order", [1, -1])
def test_references_of_unequal_number_are_all_used_and_a_missing_one_is_none_at_all(order):
    references = [("a b c d e f g h i",), ("p q r s t", "k l m n o")][::order]
    score = score_translations(references, ["a b c d", "k l m n o"][::order])
    # All n-grams are right: what is left is the penalty of 9 words for 14. To the four words of the
    # short output, a missing reference taken for an empty one would be closer in length than 9.
    assert score.figures["bleu"] == pytest.approx(100 * exp(1 - 14 / 9))
    assert all(signature.startswith("nrefs:var|") for signature in score.signatures.values())


def test_case_counts_but_for_the_figure_that_leaves_it_out():
    score = score_translations([("Ein Hund läuft im Schnee.",)], ["ein hund läuft im schnee."])
    assert score.figures["bleu_lc"] == pytest.approx(100)
    assert score.figures["bleu"] < 60 and score.figures["chrf"] < 90


def test_signatures_say_how_each_figure_was_measured():
    signatures = score_translations([("a",)], ["a"]).signatures
    assert list(signatures) == ["bleu", "bleu_lc", "chrf"]
    form = "nrefs:1|case:{}|eff:no|tok:13a|smooth:exp|version:"
    assert signatures["bleu"].startswith(form.format("mixed"))
    assert signatures["bleu_lc"].startswith(form.format("lc"))
    assert signatures["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_blanks_round_punctuation_cost_nothing_and_nothing_is_said_of_them(caplog):
    spaced, text = "Ein Mann , der ( wohl ) schläft .", "Ein Mann, der (wohl) schläft."
    score = score_translations([(text,)] * 200, [spaced] * 200)
    assert score.figures == pytest.approx({"bleu": 100, "bleu_lc": 100, "chrf": 100})
    assert not caplog.records


@pytest.mark.parametrize(
    ("spaced", "text"),
    [
        ("she doesn ' t , it ’ s hers", "she doesn't , it’s hers"),
        ("a T - Shirt - und - Hemd", "a T-Shirt-und-Hemd"),
        ("1 , 000 men , 2 . 5 m", "1,000 men , 2.5 m"),
        ("the end . A 3 - legged dog . 4", "the end . A 3 - legged dog . 4"),
        ("", ""),
    ],
)
def test_only_punctuation_inside_words_and_numbers_joins_them_again(spaced, text):
    assert detokenize(spaced) == text


def test_outputs_of_nothing_score_nothing():
    score = score_translations([("a b c d",), ("e",)], ["", ""])
    assert score.figures == {"bleu": 0, "bleu_lc": 0, "chrf": 0}


@pytest.mark.parametrize(
    ("references", "hypotheses", "error", "message"),
    [
        ([("a",)], ["a", "b"], ValueError, "2 hypotheses for 1 lists"),
        ([("a",), ()], ["a", "b"], ValueError, "item 1: no reference"),
        ([("a", "")], ["a"], ValueError, "item 0: an empty reference"),
        ([("a",), "bc"], ["a", "bc"], TypeError, "item 1: the references are one str"),
    ],
)
def test_translations_that_cannot_be_compared_are_refused(references, hypotheses, error, message):
    with pytest.raises(error, match=message):
        score_translations(references, hypotheses)
