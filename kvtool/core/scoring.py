"""How far output sequences are from the right ones: word error rate and phone error rate.

Imports no torch. The same counts over characters score plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from kvtool.errors import UsageError

Tokens = Sequence[str]


@dataclass(frozen=True)
class Score:
    """Counts over a corpus of sequences; add two of them to score both together.

    `n_edits` are the insertions, deletions and substitutions from each output to its closest
    reference, `n_reference_tokens` the lengths of those references.
    """

    n: int
    n_wrong: int
    n_edits: int
    n_reference_tokens: int

    @property
    def wer(self) -> float:
        """Sequences that equal none of their references, in percent (0 to 100)."""
        return 100 * self.n_wrong / self.n

    @property
    def per(self) -> float:
        """Edits per reference token, in percent; above 100 if outputs are much too long."""
        return 100 * self.n_edits / self.n_reference_tokens

    def __add__(self, other: Score) -> Score:
        return Score(
            self.n + other.n,
            self.n_wrong + other.n_wrong,
            self.n_edits + other.n_edits,
            self.n_reference_tokens + other.n_reference_tokens,
        )


def score_sequences(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> Score:
    """Compare each hypothesis with its closest reference.

    `references[i]` are all the right token sequences for `hypotheses[i]`. The closest is the one
    with the fewest edits and, among those, the longest: the lower error rate, whatever their order.
    A hypothesis may be empty, a reference may not.

    >>> score_sequences([(("AH", "B"), ("EY", "B"))], [("EY", "B", "Z")])
    Score(n=1, n_wrong=1, n_edits=1, n_reference_tokens=2)

    Raises UsageError if there is nothing to score, ValueError if the two do not pair up or a
    reference is missing or empty, TypeError if a str stands where a sequence of tokens should.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} lists of references")
    if not hypotheses:
        raise UsageError("nothing to score (0 sequences, expected 1 or more)")
    n_wrong = n_edits = n_tokens = 0
    for index, (right, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        edits, length = _closest(index, right, hypothesis)
        n_wrong += edits > 0
        n_edits += edits
        n_tokens += length
    return Score(len(hypotheses), n_wrong, n_edits, n_tokens)


def score_texts(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> Score:
    """`score_sequences` over characters (Unicode code points, spaces included).

    `wer` counts the texts that are not right to the last character, `per` is the character error
    rate, both in percent. Raises the same errors.
    """
    for index, texts in enumerate(references):
        if isinstance(texts, str):
            raise TypeError(f"item {index}: the references are one str (expected several)")
    return score_sequences(
        [[list(text) for text in texts] for texts in references],
        [list(text) for text in hypotheses],
    )


def _closest(index: int, references: Sequence[Tokens], hypothesis: Tokens) -> tuple[int, int]:
    """Edits to the closest reference, and its length in tokens."""
    # A str is a sequence too, and would be compared by its characters without a word.
    if isinstance(hypothesis, str) or any(isinstance(tokens, str) for tokens in references):
        raise TypeError(f"item {index}: a str (expected a sequence of tokens)")
    if not references or not all(len(tokens) for tokens in references):
        raise ValueError(f"item {index}: {'an empty' if references else 'no'} reference")
    edits, minus_length = min(
        (Levenshtein.distance(tokens, hypothesis), -len(tokens)) for tokens in references
    )
    return edits, -minus_length
