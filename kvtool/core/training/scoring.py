"""Scores of outputs against references: error rates of sequences, BLEU and chrF of translations.

This file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest

from kvtool.errors import UsageError

Tokens = Sequence[str]
LIBRARIES = ("rapidfuzz", "sacrebleu")  # of the extra `train`; only scores use them

# Punctuation with blanks around it that tokenizer 13a does not separate from a word or number.
_INNER = re.compile(r"(?<=[^\W\d]) ([-'’]) (?=[^\W\d])|(?<=\d) ([.,]) (?=\d)")


@dataclass(frozen=True)
class Score:
    """Counts of errors over a corpus of sequences; add two of them to score both together."""

    n: int  # sequences
    n_wrong: int  # sequences that equal none of their references
    n_edits: int  # insertions, deletions and substitutions to the closest references
    n_reference_tokens: int  # tokens of these references

    @property
    def wer(self) -> float:
        """The word error rate: sequences that equal none of their references, 0 to 100 %."""
        return 100 * self.n_wrong / self.n

    @property
    def token_error_rate(self) -> float:
        """Edits per reference token, in percent; above 100 for outputs that are far too long."""
        return 100 * self.n_edits / self.n_reference_tokens

    @property
    def signatures(self) -> dict[str, str]:
        """{}: counts of errors have no settings to record."""
        return {}

    def __add__(self, other: Score) -> Score:
        return Score(
            self.n + other.n,
            self.n_wrong + other.n_wrong,
            self.n_edits + other.n_edits,
            self.n_reference_tokens + other.n_reference_tokens,
        )


@dataclass(frozen=True)
class TextScore:
    """BLEU (Papineni 2002), BLEU of lowercased text, and chrF (Popović 2015) of a corpus."""

    n: int  # texts
    figures: dict[str, float]  # bleu, bleu_lc and chrf, 0 to 100; higher is better
    signatures: dict[str, str]  # by the same names: the settings of sacreBLEU (Post 2018)


def require_libraries() -> None:
    """Raise UsageError unless the libraries of both scores are installed; call it before work that
    would be lost."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        names, are = " and ".join(missing), "are" if missing[1:] else "is"
        raise UsageError(
            f"train-seq2seq: {names} {are} not installed",
            "Install what scores need with: pip install 'kvtool[train]'",
        )


def score_sequences(references: Sequence[Sequence[Tokens]], hypotheses: Sequence[Tokens]) -> Score:
    """Compare each hypothesis with its closest reference.

    `references[i]` are all right token sequences for `hypotheses[i]`. The closest has the fewest
    edits; among several of these it is the longest, which gives the lower error rate. A hypothesis
    may be empty, a reference may not.

    >>> score_sequences([(("AH", "B"), ("EY", "B"))], [("EY", "B", "Z")])
    Score(n=1, n_wrong=1, n_edits=1, n_reference_tokens=2)

    Raises UsageError if there is nothing to score, ValueError if the lengths of the two differ or a
    reference is missing or empty, and TypeError for a str in place of a sequence of tokens.
    """
    _check_pairing(references, hypotheses)
    n_wrong = n_edits = n_tokens = 0
    for index, (right, hypothesis) in enumerate(zip(references, hypotheses, strict=True)):
        edits, length = _closest(index, right, hypothesis)
        n_wrong += edits > 0
        n_edits += edits
        n_tokens += length
    return Score(len(hypotheses), n_wrong, n_edits, n_tokens)


def score_translations(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> TextScore:
    """Compare each detokenized hypothesis with all its references by sacreBLEU, tokenizer 13a.

    `references[i]` are all right texts for `hypotheses[i]`, any number of them. A hypothesis may be
    empty, a reference may not.

    Raises UsageError if there is nothing to score, ValueError if the lengths of the two differ or a
    reference is missing or empty, and TypeError for a str in place of several references.
    """
    _check_pairing(references, hypotheses)
    for index, texts in enumerate(references):
        _check_references(index, texts)
    from sacrebleu.metrics import BLEU, CHRF  # takes 0.1 s, and only text needs it

    # Stream k has the k-th reference of every source, or None. "" would count as a reference, and
    # be the closest in length to short hypotheses.
    streams = list(zip_longest(*references))
    # force: do not warn about text that looks tokenized.
    metrics = {
        "bleu": BLEU(force=True),
        "bleu_lc": BLEU(lowercase=True, force=True),
        "chrf": CHRF(),
    }
    figures = {
        name: float(metric.corpus_score(hypotheses, streams).score)
        for name, metric in metrics.items()
    }
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    return TextScore(len(hypotheses), figures, signatures)


def detokenize(text: str) -> str:
    """Remove the blanks around hyphens, apostrophes, points and commas in words and numbers.

    Sentence punctuation keeps its blanks, since 13a adds them to hypotheses and references alike.

    >>> detokenize("1 . 5 T - shirts , aren ' t they ?")
    "1.5 T-shirts , aren't they ?"
    """
    return _INNER.sub(lambda match: match[1] or match[2], text)


def _check_pairing(references: Sequence[object], hypotheses: Sequence[object]) -> None:
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} lists of references")
    if not hypotheses:
        raise UsageError("nothing to score (0 sequences, expected 1 or more)")


def _check_references(index: int, references: Sequence[Tokens]) -> None:
    if isinstance(references, str):
        raise TypeError(f"item {index}: the references are one str (expected several)")
    if not references or not all(len(tokens) for tokens in references):
        raise ValueError(f"item {index}: {'an empty' if references else 'no'} reference")


def _closest(index: int, references: Sequence[Tokens], hypothesis: Tokens) -> tuple[int, int]:
    """Edits to the closest reference, and its length in tokens."""
    from rapidfuzz.distance import Levenshtein

    # A str is a sequence of characters too, and would be compared without an error.
    if isinstance(hypothesis, str) or any(isinstance(tokens, str) for tokens in references):
        raise TypeError(f"item {index}: a str (expected a sequence of tokens)")
    _check_references(index, references)
    edits, minus_length = min(
        (Levenshtein.distance(tokens, hypothesis), -len(tokens)) for tokens in references
    )
    return edits, -minus_length
