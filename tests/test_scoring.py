"""Word error rate and phone error rate against one or several references."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.core.scoring import Score, score_sequences, score_texts
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
    assert score.per == 20.0


def test_a_sequence_that_equals_any_reference_is_right():
    references = [(("AH",), ("EY", "B"), ("K", "Z", "Z"))]
    for right in references[0]:
        score = score_sequences(references, [list(right)])
        assert (score.wer, score.per) == (0.0, 0.0)
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
    assert score_sequences([(("AH", "B"),)], [()]).per == 100.0
    assert score_sequences([(("AH", "B"),)], [("AH", "B", "Z", "Z", "Z", "Z")]).per == 200.0


def test_tokens_are_compared_whole():
    score = score_sequences([(("AH", "B"),)], [("AA", "B")])
    assert (score.n_edits, score.n_reference_tokens) == (1, 2)


def test_texts_are_compared_by_their_characters():
    score = score_texts([("ein Hund",), ("zwei", "Katzen")], ["ein  Hund", "Katze"])
    assert score == Score(n=2, n_wrong=2, n_edits=2, n_reference_tokens=14)


@steady
@given(REFERENCES, st.lists(PHONES, max_size=8))
def test_both_rates_are_zero_exactly_if_some_reference_is_equal(references, hypothesis):
    score = score_sequences([references], [hypothesis])
    equal = tuple(hypothesis) in references
    assert (score.wer == 0, score.per == 0) == (equal, equal)


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
        score_texts([], [])


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
    with pytest.raises(TypeError, match="item 1: the references are one str"):
        score_texts([("a",), "bc"], ["a", "bc"])
