"""Learning vocabularies from texts: byte-pair encoding, or whole pieces by frequency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvtool.core.text.rules import LONGEST_TOKEN
from kvtool.errors import UsageError
from kvtool.reading import short

LARGEST_WORD_VOCAB = 30_000

# How each kind of tokenizer splits a text.
SPLITTERS: dict[str, Any] = {
    "char": lambda: pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated"),
    "symbol": pre_tokenizers.WhitespaceSplit,
    "word": pre_tokenizers.Whitespace,
    "bpe": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}


def learn_bpe(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str]
) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the specials first.

    Raises UsageError if `vocab_size` is smaller than the number of bytes and specials.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(specials)
    if vocab_size < smallest:
        raise UsageError(
            f"--vocab-size: {vocab_size} is too small (expected {smallest} or more)",
            "Every byte has a token of its own.",
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = SPLITTERS["bpe"]()
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=list(specials),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def learn_pieces(
    kind: str, texts: Iterable[str], specials: Sequence[str], unknown: str
) -> tokenizers.Tokenizer:
    """A vocabulary of whole pieces: the specials, then the pieces by falling frequency.

    unknown: the special token for pieces that are not in it. Raises UsageError for texts without a
    piece, or with a piece that is too long.
    """
    splitter = SPLITTERS[kind]()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    if not counts:
        raise UsageError("the texts hold no token to learn from")
    longest = max(counts, key=len)
    if len(longest) > LONGEST_TOKEN:
        raise UsageError(
            f"--tokenizer {kind}: a token of {len(longest):,} characters, {short(longest, 20)!r} "
            f"(expected {LONGEST_TOKEN:,} or fewer)",
            "Use --tokenizer char or bpe.",
        )
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))[:LARGEST_WORD_VOCAB]
    names = [*specials, *(piece for piece in ranked if piece not in specials)]
    vocab = {name: index for index, name in enumerate(names)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    inner.pre_tokenizer = splitter
    if kind == "char":
        inner.decoder = decoders.Fuse()
    return inner
