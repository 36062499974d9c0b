"""Scores of outputs against references: error rates of sequences, BLEU and chrF of translations.

This file imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from typing import TYPE_CHECKING

from kvtool.core.training.pairs import PHONES
from kvtool.errors import UsageError

if TYPE_CHECKING:
    from kvtool.core.text.tokenizer import Tokenizer

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
    def n_exact(self) -> int:
        """Sequences that equal one of their references."""
        return self.n - self.n_wrong

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
    n_exact: int = 0  # texts that equal one of their references


def require_libraries(command: str) -> None:
    """Raise UsageError unless the libraries of both scores are installed; call it before work that
    would be lost. command: whose work."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        names, are = " and ".join(missing), "are" if missing[1:] else "is"
        raise UsageError(
            f"{command}: {names} {are} not installed",
            "Install what scores need with: pip install 'kvtool[train]'",
        )


def scores_text(tokenizer: Tokenizer) -> bool:
    """Whether outputs are text, which BLEU and chrF score; those of characters or symbols are
    sequences, which error rates score."""
    return tokenizer.kind not in ("char", "symbol")


def error_rate_name(tokenizer: Tokenizer, targets: Iterable[str]) -> str:
    """The name of the token error rate: cer of characters, per of phones, ser of others."""
    if tokenizer.kind == "char":
        return "cer"
    symbols = {symbol.rstrip("012") for target in targets for symbol in target.split()}
    return "per" if symbols <= PHONES else "ser"


def score_outputs(
    tokenizer: Tokenizer, references: Sequence[Sequence[str]], outputs: Sequence[str]
) -> Score | TextScore:
    """Score what a model made of each source: `references[i]` are all right targets for
    `outputs[i]`, and `tokenizer` is that of the targets. Raises as `score_sequences`."""
    if scores_text(tokenizer):
        if tokenizer.kind == "word":
            outputs = [detokenize(text) for text in outputs]
        return score_translations(references, outputs)
    units = tokenizer.units
    right = [[units(text) for text in targets] for targets in references]
    return score_sequences(right, [units(text) for text in outputs])


def figures(score: Score | TextScore, error_rate: str) -> dict[str, float]:
    """The figures of a score by name: error rates in percent, BLEU and chrF from 0 to 100.
    error_rate: the name of the token error rate."""
    if isinstance(score, TextScore):
        return score.figures
    return {error_rate: score.token_error_rate, "wer": score.wer}


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
    found = {
        name: float(metric.corpus_score(hypotheses, streams).score)
        for name, metric in metrics.items()
    }
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    n_exact = sum(text in right for text, right in zip(hypotheses, references, strict=True))
    return TextScore(len(hypotheses), found, signatures, n_exact)


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
