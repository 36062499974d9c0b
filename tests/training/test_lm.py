"""Language modelling: which tokens are seen, from how much before them, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.cache import Step
from kvtool.core.checkpoint import checkpoint
from kvtool.core.models import Model
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.core.training.lm import Blocks, LanguageModelling, score_text, split_text
from kvtool.errors import FileError
from small_models import random_model
from training_cases import one_thread

CPU = torch.device("cpu")
TEXT = "To be, or not to be: that is the question. " * 12
TOKENIZER = Tokenizer.train("char", [TEXT])
BYTES = Tokenizer.train("bpe", [], 256, specials=False)


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    with one_thread():
        yield


def lm(text: str = TEXT, context: int = 32, batch_tokens: int = 64, seed: int = 0) -> Any:
    return LanguageModelling(text, TOKENIZER, context, batch_tokens, seed, CPU)


def model(context: int = 32, **changes: Any) -> Model:
    """In float64, so that sums in another order agree."""
    sizes = {"vocab_size": 256, "n_layers": 1, "context": context, **changes}
    return random_model(dtype=torch.float64, **sizes)


@torch.no_grad()
def surprise(model: Model, ids: Tensor, first: int, last: int) -> float:
    """What token `last` costs in nats after those from `first` on, computed by itself."""
    logits = model(ids[None, first:last])[0, -1]
    return -float(logits.log_softmax(-1)[ids[last]])


class Watched(torch.nn.Module):
    """A model that remembers how long its inputs were, and knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []
        self.config = ModelConfig(vocab_size=256)

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.shape[1])
        return torch.zeros(*tokens.shape, 256)


# Scoring


def test_a_text_within_the_context_is_scored_in_one_pass() -> None:
    ids = torch.tensor(BYTES.encode("Was it a cat I saw?"))
    subject = model()
    expected = sum(surprise(subject, ids, 0, i) for i in range(1, len(ids)))
    score = score_text(subject, BYTES, ids, 32)
    assert (score.n_tokens, score.n_chars) == (18, 18)
    assert score.nats_per_token == pytest.approx(expected / 18, rel=1e-12)
    assert score.bits_per_char == pytest.approx(expected / 18 / math.log(2), rel=1e-12)


@pytest.mark.parametrize("context", [1, 2, 3, 5, 8, 9, 16])
def test_every_token_but_the_first_is_scored_once_after_half_a_context_or_more(
    context: int,
) -> None:
    ids = torch.tensor(BYTES.encode("A man, a plan, a canal: Panama!"))
    subject = model(context, positions="rotary")
    half = max(context // 2, 1)
    expected, start, end = 0.0, 0, 0
    for i in range(1, len(ids)):
        if i >= end:  # a new window begins half a context before the end of the last
            start = max(end - half, 0)
            end = start + max(context, 2)
        assert i - start >= min(half, i) and i - start <= max(context, 2) - 1
        expected += surprise(subject, ids, start, i)
    score = score_text(subject, BYTES, ids, context)
    assert score.n_tokens == len(ids) - 1
    assert score.nats_per_token == pytest.approx(expected / score.n_tokens, rel=1e-12)


@pytest.mark.parametrize("n", [2, 31, 32, 33, 47, 48, 49, 200])
def test_who_knows_nothing_pays_for_the_whole_vocabulary(n: int) -> None:
    watched = Watched()
    score = score_text(watched, BYTES, torch.arange(n) % 90 + 5, 32)  # type: ignore[arg-type]
    assert score.nats_per_token == pytest.approx(math.log(256))
    assert max(watched.lengths) < 32


def test_characters_and_not_bytes_are_counted() -> None:
    ids = torch.tensor(BYTES.encode("aé🦉"))
    score = score_text(model(), BYTES, ids, 32)
    assert (score.n_tokens, score.n_chars) == (6, 2)
    ratio = score.bits_per_char / score.nats_per_token
    assert ratio == pytest.approx(6 / 2 / math.log(2))


# The split


def test_the_last_tenth_is_held_out() -> None:
    assert split_text("0123456789" * 7) == (("0123456789" * 7)[:63], "3456789")
    task = lm()
    assert TOKENIZER.decode(task.train_ids.tolist() + task.valid_ids.tolist()) == TEXT
    assert len(task.train_ids) == int(0.9 * len(TEXT))


@pytest.mark.parametrize("text", ["", "a", "ab", "0123456789"])
def test_a_text_without_two_tokens_to_measure_with_is_refused(text: str) -> None:
    with pytest.raises(FileError, match=r"--data: the text is too short .*two tokens or more"):
        lm(text)


def test_a_text_shorter_than_the_shortest_block_is_refused() -> None:
    with pytest.raises(FileError, match=r"too short \(18 tokens to train on, expected more than"):
        lm("ab" * 10, context=8 * 18)
    assert lm("ab" * 10, context=8 * 17).lengths == [17]


# Blocks


@pytest.mark.parametrize("context", [1, 2, 3, 7, 32])
def test_blocks_lie_within_the_text_and_the_context(context: int) -> None:
    task = lm(context=context)
    seen = set()
    for epoch in range(20):
        for starts, offsets, length in task.batches(epoch):
            seen.add(length)
            assert len(starts) == len(offsets) == max(1, 64 // length)
            assert int(starts.min()) >= 0
            assert int(starts.max()) + length < len(task.train_ids)  # a target for each
            assert int(offsets.min()) >= 0 and int(offsets.max()) + length <= context
    assert seen == {max(1, context // share) for share in (8, 4, 2, 1)}


def test_every_position_of_the_context_and_every_token_is_trained() -> None:
    task = lm()
    positions, targets = set(), set()
    for epoch in range(30):
        for starts, offsets, length in task.batches(epoch):
            for start, offset in zip(starts.tolist(), offsets.tolist(), strict=True):
                positions |= set(range(offset, offset + length))
                targets |= set(range(start + 1, start + length + 1))
    assert positions == set(range(32))
    assert targets == set(range(1, len(task.train_ids)))


def test_half_of_the_short_blocks_stand_at_random_positions() -> None:
    task = lm()
    batches = [batch for epoch in range(40) for batch in task.batches(epoch)]
    offsets = torch.cat([batch.offsets for batch in batches if batch.length == 4]).tolist()
    assert 0.4 < sum(offset > 0 for offset in offsets) / len(offsets) < 0.6
    assert set(offsets) == set(range(32 - 4 + 1))


def test_an_epoch_draws_about_as_many_tokens_as_the_text_has() -> None:
    task = lm()
    drawn = sum(len(batch.starts) * batch.length for batch in task.batches(0))
    assert 0.8 * len(task.train_ids) < drawn <= len(task.train_ids)
    assert len(lm(batch_tokens=10**6).batches(0)) == 1


def flat(batches: Any) -> list[Any]:
    return [(b.starts.tolist(), b.offsets.tolist(), b.length) for b in batches]


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    task = lm()
    first = flat(task.batches(3))
    torch.manual_seed(99)
    task.batches(4)
    assert flat(task.batches(3)) == flat(lm().batches(3)) == first
    assert flat(task.batches(4)) != first and flat(lm(seed=1).batches(3)) != first


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
def test_the_loss_is_that_of_each_token_at_its_position(positions: str) -> None:
    task = lm()
    subject = model(positions=positions)
    batch = Blocks(torch.tensor([0, 40]), torch.tensor([0, 20]), 8)
    with torch.no_grad():
        loss, n = task.loss(subject, batch)
    costs = []
    for start, offset in ((0, 0), (40, 20)):
        ids = task.train_ids[start : start + 9]
        step = Step.full(1, 8)
        moved = step.q_pos + offset
        placed = Step(moved, moved, step.slots, step.mask, step.causal)
        with torch.no_grad():
            logits = subject(ids[None, :-1], placed)[0]
        costs.append(float(F.cross_entropy(logits, ids[1:])))
    assert n == 16 and float(loss) == pytest.approx(sum(costs) / 2, rel=1e-6)


# The task


def test_its_score_is_that_of_the_held_out_text() -> None:
    task, subject = lm(), model()
    score = score_text(subject, TOKENIZER, task.valid_ids, 32)
    figures = {"bits_per_char": score.bits_per_char, "nats_per_token": score.nats_per_token}
    assert task.evaluate(subject) == figures and task.score_name in figures
    assert task.score(subject) == score


def test_its_facts_tell_texts_tokenizers_and_batches_apart() -> None:
    facts = lm().facts()
    assert facts == lm().facts() and facts["task"] == "train-lm"
    assert lm(TEXT + "!").facts()["data_sha256"] != facts["data_sha256"]
    assert lm(batch_tokens=65).facts() == {**facts, "batch_tokens": 65}


def test_it_saves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    subject = random_model(vocab_size=TOKENIZER.vocab_size, context=32)
    for name, data in lm().files(subject).items():
        (tmp_path / name).write_bytes(data)
    loaded = checkpoint.load(str(tmp_path), CPU, torch.float32)
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    for name, weight in subject.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)
