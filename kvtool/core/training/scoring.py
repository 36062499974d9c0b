"""How far outputs are from the right ones: error rates of sequences, BLEU and chrF of translations.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest

from kvtool.errors import UsageError

Tokens = Sequence[str]
LIBRARIES = ("rapidfuzz", "sacrebleu")  # of the extra `train`: nothing else of kvtool uses them

# What 13a does not part from a word or number, where it stands in one.
_INNER = re.compile(r"(?<=[^\W\d]) ([-'’]) (?=[^\W\d])|(?<=\d) ([.,]) (?=\d)")


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
    def token_error_rate(self) -> float:
        """Edits per reference token, in percent; above 100 if outputs are much too long."""
        return 100 * self.n_edits / self.n_reference_tokens

    @property
    def signatures(self) -> dict[str, str]:
        """None: counts of errors have no settings."""
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
    """BLEU (Papineni 2002), BLEU of lowercased text, and chrF (Popović 2015) of a corpus.

    `figures` has each by its name, bleu, bleu_lc or chrf, from 0 to 100, higher is better;
    `signatures` has by the same names what sacreBLEU needs to repeat it (Post 2018).
    """

    n: int
    figures: dict[str, float]
    signatures: dict[str, str]


def require_libraries() -> None:
    """Raise UsageError unless both can be scored, sequences and texts: before there is any work to
    lose."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        names, are = " and ".join(missing), "are" if missing[1:] else "is"
        raise UsageError(
            f"train-seq2seq: {names} {are} not installed",
            "Install what scores need with: pip install 'kvtool[train]'",
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

    `references[i]` are all the right texts for `hypotheses[i]`, as many as there are. A hypothesis
    may be empty, a reference may not.

    Raises UsageError if there is nothing to score, ValueError if the two do not pair up or a
    reference is missing or empty, TypeError if one str stands where several references should.
    """
    _check_pairing(references, hypotheses)
    for index, texts in enumerate(references):
        _check_references(index, texts)
    from sacrebleu.metrics import BLEU, CHRF  # takes 0.1 s, and only text needs it

    # Stream k has the k-th reference of every source. None is no reference; "" would be an empty
    # one, and the closest in length to many a short hypothesis.
    streams = list(zip_longest(*references))
    # force: no warning of text that looks tokenized.
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
    """Undo the blanks round punctuation inside words and numbers: hyphens, apostrophes, points.

    Sentence punctuation keeps its blanks: 13a puts them into hypotheses and references alike.

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

    # A str is a sequence too, and would be compared by its characters without a word.
    if isinstance(hypothesis, str) or any(isinstance(tokens, str) for tokens in references):
        raise TypeError(f"item {index}: a str (expected a sequence of tokens)")
    _check_references(index, references)
    edits, minus_length = min(
        (Levenshtein.distance(tokens, hypothesis), -len(tokens)) for tokens in references
    )
    return edits, -minus_length
