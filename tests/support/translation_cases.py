"""Pairs of letters, and a task and a model of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from kvtool.core.models import Model
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.core.training.pairs import Pair, Splits
from kvtool.core.training.translation import (
    Translation,
)
from small_models import random_model
from training_cases import one_thread

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
