"""Language modelling: predict the next token of a text, and measure how well."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core import checkpoint
from kvtool.core.text import Tokenizer
from kvtool.errors import FileError

SHARES = (8, 4, 2, 1)  # blocks of context/8, context/4, context/2 and the whole context


@dataclass(frozen=True)
class LMScore:
    """How well held-out text is predicted."""

    nats_per_token: float
    bits_per_char: float
    n_tokens: int
    n_chars: int


def split_text(text: str) -> tuple[str, str]:
    """The first 90 % of the characters to train on and the rest to measure with, as nanoGPT does."""
    cut = int(0.9 * len(text))
    return text[:cut], text[cut:]


@torch.inference_mode()
def score_text(model: nn.Module, tokenizer: Tokenizer, ids: Tensor, context: int) -> LMScore:
    """Predict every token of `ids` (n,) but the first, each from half a context or more before it.

    Windows of `context` tokens overlap by half, and only the first one's early tokens see less.
    """
    half = max(context // 2, 1)
    total = 0.0
    done = 1  # the first token is given
    start = 0
    while done < len(ids):
        end = min(start + context, len(ids))
        window = ids[start:end]
        logits = model(window[None, :-1])[0, done - start - 1 :]
        total += float(F.cross_entropy(logits.double(), window[done - start :], reduction="sum"))
        done = end
        start = max(end - half, 0)
    n_chars = len(tokenizer.decode(ids[1:].tolist()))
    n_tokens = len(ids) - 1
    return LMScore(total / n_tokens, total / math.log(2) / n_chars, n_tokens, n_chars)


class LanguageModelling:
    """The training task over one text; an epoch draws about as many tokens as the text has.

    Each batch holds `batch_tokens` tokens in blocks of one length, a part of the context or the
    whole of it: short ones are cheap, long ones teach late positions.
    """

    score_name = "bits_per_char"

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
        self.train_ids = torch.tensor(tokenizer.encode(train), device=device)
        self.valid_ids = torch.tensor(tokenizer.encode(valid), device=device)
        self.batch_tokens = batch_tokens
        self.text_sha256 = hashlib.sha256(text.encode()).hexdigest()
        self.lengths = sorted({max(1, context // share) for share in SHARES})
        self._check()

    def _check(self) -> None:
        if len(self.valid_ids) < 2:
            raise FileError(
                f"--data: the text is too short ({len(self.train_ids) + len(self.valid_ids)} tokens)",
                "Its last 10 % must hold two tokens or more, to measure with.",
            )
        self.lengths = [n for n in self.lengths if n < len(self.train_ids)]
        if not self.lengths:
            raise FileError(
                f"--data: the text is too short ({len(self.train_ids)} tokens to train on, expected "
                f"more than {max(1, self.context // SHARES[0])})"
            )

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The starts of the blocks (rows,) of each batch, and in the last element their length."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        n_batches = max(1, len(self.train_ids) // self.batch_tokens)
        found = []
        for _ in range(n_batches):
            pick = int(torch.randint(len(self.lengths), (1,), generator=generator))
            length = self.lengths[pick]
            rows = max(1, self.batch_tokens // length)
            starts = torch.randint(len(self.train_ids) - length, (rows,), generator=generator)
            found.append(torch.cat([starts, torch.tensor([length])]))
        return found

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        starts, length = batch[:-1], int(batch[-1])
        columns = torch.arange(length + 1)
        blocks = self.train_ids[(starts[:, None] + columns).to(self.train_ids.device)]
        logits = model(blocks[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())
        return loss, length * len(starts)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        score = self.score(model)
        return {"bits_per_char": score.bits_per_char, "nats_per_token": score.nats_per_token}

    def score(self, model: nn.Module) -> LMScore:
        """The score on the last 10 % of the text."""
        return score_text(model, self.tokenizer, self.valid_ids, self.context)

    def save(self, folder: Path, model: nn.Module) -> str:
        return checkpoint.save(folder, model, self.tokenizer)

    def facts(self) -> dict[str, Any]:
        return {
            "task": "train-lm",
            "data_sha256": self.text_sha256,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "batch_tokens": self.batch_tokens,
        }
