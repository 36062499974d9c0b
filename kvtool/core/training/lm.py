"""Language modelling: the task of predicting the next token of a text, and its scores."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool import ending
from kvtool.core import footprint
from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.engine import advance
from kvtool.core.machine import derived_seed
from kvtool.core.models import Model
from kvtool.core.native import context
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.core.training.team import WHOLE, Share
from kvtool.errors import FileError

IGNORED = -100  # as a target of PyTorch's cross-entropy
SHARES = (8, 4, 2, 1)  # blocks are context/8, context/4, context/2 or context long


@dataclass(frozen=True)
class LMScore:
    """The scores of predictions of held-out text."""

    nats_per_token: float
    bits_per_char: float
    n_tokens: int
    n_chars: int
    n_bytes: int = 0  # of these characters in UTF-8

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: Tensor, nats: float) -> LMScore:
        """The scores where predicting all `ids` (n,) cost `nats` in sum."""
        text = tokenizer.decode(ids.tolist())
        bits_per_char = nats / math.log(2) / len(text)
        n_bytes = len(text.encode(errors="replace"))
        return cls(nats / len(ids), bits_per_char, len(ids), len(text), n_bytes)

    @property
    def perplexity(self) -> float:
        """e to the nats per token, or infinity."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of UTF-8, which compares models of different tokenizers."""
        return self.bits_per_char * self.n_chars / self.n_bytes


def split_text(text: str) -> tuple[str, str]:
    """Split a text: 90 % of the characters for training, the rest for validation (as nanoGPT)."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


@torch.inference_mode()
def score_text(
    model: Model,
    tokenizer: Tokenizer,
    ids: Tensor,
    context: int,
    on_window: Callable[[int, float], None] = lambda n_tokens, nats: None,
) -> LMScore:
    """Score the predictions of all tokens of `ids` (n,) except the first.

    Windows of `context` tokens overlap by half. So each token is predicted from half a context or
    more, except for the first tokens of the text. on_window: called after each window with the
    number of tokens that it predicted, and their loss in nats.
    """
    size, half = max(context, 2), max(context // 2, 1)  # a window of 1 would predict nothing
    total = 0.0
    n_done = 1  # the first token is given
    start = 0
    while n_done < len(ids):
        end = min(start + size, len(ids))
        nats = _nats(model, ids[start:end], n_done - start)
        on_window(end - n_done, nats)
        total += nats
        n_done = end
        start = max(end - half, 0)
    return LMScore.of(tokenizer, ids[1:], total)


def _nats(model: Model, window: Tensor, first: int) -> float:
    """The loss of the tokens of a window (n,) from the `first` on, summed. A cache holds what was
    read where the logits of all would take too much memory."""
    n = len(window) - 1
    size = footprint.piece(model.config.vocab_size, n)
    if size >= n:
        logits = model(window[None, :-1])[0, first - 1 :]
        return float(F.cross_entropy(logits.double(), window[first:], reduction="sum"))
    weight = next(model.parameters())
    spec = CacheSpec.of(model.config, 1, n, weight.dtype, weight.device)
    cache, total = make_cache("dynamic", spec), 0.0
    wanted = window[1:].clone()
    wanted[: first - 1] = IGNORED
    for read, right in zip(window[:-1].split(size), wanted.split(size), strict=True):
        logits = advance(model, cache, read[None])[0]
        total += float(F.cross_entropy(logits.double(), right, reduction="sum"))
    return total


class Blocks(NamedTuple):
    """One batch: blocks of the text, all of one length."""

    starts: Tensor  # (rows,) where each block begins in the text
    offsets: Tensor  # (rows,) the position that its first token is given
    length: int  # tokens


class LanguageModelling:
    """The task of training on one text; an epoch draws about as many tokens as the text has.

    Each batch has `batch_tokens` tokens in blocks of one length, the context or a part of it. Few
    blocks are long enough to reach late positions. So short blocks are also placed at late
    positions; otherwise late tokens would be predicted worse than early ones. Raises FileError for
    a text that is too short.
    """

    score_name = "bits_per_char"
    loss_name = "nats_per_token"
    loss_floor = 0.0
    higher_is_better = False
    in_percent = ()

    def __init__(
        self,
        text: str,
        tokenizer: Tokenizer,
        context: int,
        batch_tokens: int,
        seed: int,
        device: torch.device,
    ) -> None:
        train, valid = split_text(text)
        self.tokenizer = tokenizer
        self.context = context
        self.seed = seed
        # A signal may end the process here, since there is nothing to save yet. The tokenizer's
        # library would not return before it is done.
        with ending.signals_at_default():
            ids = tokenizer.encode(train), tokenizer.encode(valid)
        self.train_ids, self.valid_ids = (torch.tensor(part, device=device) for part in ids)
        self.batch_tokens = batch_tokens
        self.text_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.lengths = sorted({max(1, context // share) for share in SHARES})
        self._check()

    def _check(self) -> None:
        if len(self.valid_ids) < 2:
            raise FileError(
                f"--data: the text is too short (found {len(self.train_ids)} tokens to train on "
                f"and {len(self.valid_ids)} to measure with)",
                "Its last 10 % must hold two tokens or more, to measure with.",
            )
        self.lengths = [n for n in self.lengths if n < len(self.train_ids)]
        if not self.lengths:
            raise FileError(
                f"--data: the text is too short ({len(self.train_ids)} tokens to train on, "
                f"expected more than {max(1, self.context // SHARES[0])})"
            )

    def batches(self, epoch: int) -> Sequence[Blocks]:
        """The batches of an epoch: random blocks, half of them at random positions.

        The same for every call with the same epoch and seed.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))

        def draw(below: int, n: int) -> Tensor:
            return torch.randint(below, (n,), generator=generator)

        found = []
        for _ in range(max(1, len(self.train_ids) // self.batch_tokens)):
            length = self.lengths[int(draw(len(self.lengths), 1))]
            rows = max(1, self.batch_tokens // length)
            offsets = draw(self.context - length + 1, rows) * draw(2, rows)
            found.append(Blocks(draw(len(self.train_ids) - length, rows), offsets, length))
        return found

    def loss(self, model: Model, batch: Blocks, share: Share = WHOLE) -> tuple[Tensor, int]:
        """As Task.loss: the cross-entropy of the next token."""
        device = self.train_ids.device
        rows = share.rows(len(batch.starts))
        columns = torch.arange(batch.length + 1)
        ids = self.train_ids[(batch.starts[rows, None] + columns).to(device)]
        positions = (batch.offsets[rows, None] + columns[:-1]).to(device)
        step = Step.full(len(ids), batch.length, device=device)
        with context.within(first_row=rows.start):
            logits = model(ids[:, :-1], replace(step, q_pos=positions, k_pos=positions))
        wanted = ids[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="sum")
        return loss / (len(batch.starts) * batch.length), positions.numel()

    def evaluate(self, model: Model) -> dict[str, float]:
        """As Task.evaluate: bits per character and nats per token."""
        score = self.score(model)
        return {"bits_per_char": score.bits_per_char, "nats_per_token": score.nats_per_token}

    def score(self, model: Model) -> LMScore:
        """The scores on the last 10 % of the text."""
        return score_text(model, self.tokenizer, self.valid_ids, self.context)

    def files(self, model: Model) -> dict[str, bytes]:
        """As Task.files."""
        return checkpoint.files(model, self.tokenizer)

    def facts(self) -> dict[str, Any]:
        """As Task.facts."""
        return {
            "task": "train-lm",
            "data_sha256": self.text_sha256,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "batch_tokens": self.batch_tokens,
        }
