"""The task of training an encoder-decoder on pairs: batches, loss, and scores of decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.checkpoint import checkpoint
from kvtool.core.decoding.beam import Beam
from kvtool.core.decoding.sources import pad, search, translate
from kvtool.core.machine import derived_seed
from kvtool.core.models import Model
from kvtool.core.native import context
from kvtool.core.text.tokenizer import BOS, EOS, Tokenizer
from kvtool.core.training import scoring
from kvtool.core.training.pairs import Pair, Splits
from kvtool.core.training.scoring import Score, TextScore
from kvtool.core.training.team import WHOLE, Share
from kvtool.errors import FileError

Rows = Sequence[tuple[list[int], list[int]]]  # the ids of a source and of its target
DEV_SAMPLE = 1000  # sources decoded at each evaluation during training


class Translation:
    """The task of training on pairs, with label-smoothed cross-entropy (Szegedy 2016).

    Batches have rows of similar length. Scores come from greedy decoding: error rates for targets
    of characters or symbols, BLEU and chrF for other text. The loss of held-out pairs is computed
    in the same way. Raises FileError for a source or training target longer than the context.
    """

    loss_name = "loss"

    in_percent = ("per", "cer", "ser", "wer")

    def __init__(
        self,
        splits: Splits,
        source_tokenizer: Tokenizer,
        tokenizer: Tokenizer,
        context: int,
        batch_tokens: int,
        smoothing: float,
        seed: int,
        device: torch.device,
    ) -> None:
        self.splits = splits
        self.source_tokenizer = source_tokenizer
        self.tokenizer = tokenizer
        self.context = context
        self.batch_tokens = batch_tokens
        self.smoothing = smoothing
        self.seed = seed
        self.device = device
        self.rows = self._encode(splits.train)
        self.dev = splits.valid[:: max(1, len(splits.valid) // DEV_SAMPLE)]
        self.is_text = scoring.scores_text(tokenizer)
        self.dev_rows = [row for row in self._ids(self.dev) if max(map(len, row)) <= context]
        for pairs, name in ((splits.valid, splits.valid_name), (splits.test, splits.test_name)):
            texts = [pair.source for pair in pairs]
            for text, source in zip(texts, source_tokenizer.encode_batch(texts), strict=True):
                self._check_length(name, text, len(source))

    @cached_property
    def error_rate(self) -> str:
        """The name of the token error rate."""
        targets = (target for pair in self.splits.train for target in pair.targets)
        return scoring.error_rate_name(self.tokenizer, targets)

    @property
    def loss_floor(self) -> float:
        """The lowest loss possible with label smoothing, in nats: the entropy of the targets."""
        n = self.tokenizer.vocab_size
        wrong = self.smoothing / n
        right = 1 - (n - 1) * wrong
        return -sum(m * p * math.log(p) for m, p in ((1, right), (n - 1, wrong)) if p)

    @property
    def score_name(self) -> str:
        """bleu for text, chrf for short text, and the error rate for sequences."""
        if not self.is_text:
            return self.error_rate
        # BLEU is 0 even for perfect outputs if no target has four words.
        long = any(len(target.split()) >= 4 for pair in self.dev for target in pair.targets)
        return "bleu" if long else "chrf"

    @property
    def higher_is_better(self) -> bool:
        """True for the scores of text, False for error rates."""
        return self.is_text

    def _encode(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """As `_ids`. Raises FileError for a source or target that is too long."""
        found = self._ids(pairs)
        texts = (pair.source for pair in pairs for _ in pair.targets)
        for text, row in zip(texts, found, strict=True):
            self._check_length(self.splits.name, text, max(map(len, row)))
        return found

    def _ids(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
        """The ids of each source with each of its targets; targets end with EOS."""
        flat = [(pair.source, target) for pair in pairs for target in pair.targets]
        sources = self.source_tokenizer.encode_batch([source for source, _ in flat])
        targets = self.tokenizer.encode_batch([target for _, target in flat])
        return [(source, [*target, EOS]) for source, target in zip(sources, targets, strict=True)]

    def _check_length(self, where: str, text: str, n: int) -> None:
        """Raise FileError for a source or target of more tokens than the context."""
        if n > self.context:
            raise FileError(
                f"{where}: {text[:40]!r} makes {n} tokens (the model holds {self.context})",
                f"Give --context {n} or more, or leave it out.",
            )

    def batches(self, epoch: int) -> Sequence[list[int]]:
        """The batches of an epoch, as indices of rows.

        A batch has at most `batch_tokens` tokens, sources, targets and padding together. Only a
        single longer row may exceed this.
        """
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        found = self._packed(self.rows, order)
        shuffled = torch.randperm(len(found), generator=generator).tolist()
        return [found[i] for i in shuffled]

    def _packed(self, rows: Rows, order: list[int]) -> list[list[int]]:
        """Divide the indices of `order` into batches of rows of similar length."""
        order = sorted(
            order, key=lambda i: (len(rows[i][1]), len(rows[i][0]))
        )  # ties stay shuffled
        found: list[list[int]] = []
        batch: list[int] = []
        n_source = n_target = 0  # tokens of the longest in the batch
        for i in order:
            source, target = map(len, rows[i])
            n_source, n_target = max(n_source, source), max(n_target, target)
            if batch and (n_source + n_target) * (len(batch) + 1) > self.batch_tokens:
                found.append(batch)
                batch, n_source, n_target = [], source, target
            batch.append(i)
        return [*found, batch]

    def loss(self, model: Model, batch: list[int], share: Share = WHOLE) -> tuple[Tensor, int]:
        """As Task.loss: the cross-entropy of the target with label smoothing."""
        source, mask = pad([self.rows[i][0] for i in batch], self.device)
        target, real = pad([self.rows[i][1] for i in batch], self.device)
        n_targets = real.sum()
        rows = share.rows(len(batch))
        source, mask, target, real = (part[rows] for part in (source, mask, target, real))
        with context.within(first_row=rows.start):
            nats = self._nats(model, source, mask, target, real)
        return nats / n_targets, int(mask.sum() + real.sum())

    def _nats(
        self, model: Model, source: Tensor, mask: Tensor, target: Tensor, real: Tensor
    ) -> Tensor:
        """The smoothed loss of target (B,T) from source (B,S), summed over its real tokens.

        mask (B,S) and real (B,T) bool: True = a real token.
        """
        shifted = F.pad(target[:, :-1], (1, 0), value=BOS)
        logits = model(shifted, source=model.encode(source, mask))
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            target.masked_fill(~real, -100).flatten(),
            label_smoothing=self.smoothing,
            reduction="sum",
        )

    def evaluate(self, model: Model) -> dict[str, float]:
        """As Task.evaluate: the scores and the loss on a sample of the dev pairs."""
        figures = self.figures(self.score(model, self.dev))
        return figures if not self.dev_rows else {**figures, "loss": self._held_out_loss(model)}

    @torch.inference_mode()
    def _held_out_loss(self, model: Model) -> float:
        """The loss of the dev sample, in nats per token."""
        nats = n = 0.0
        for batch in self._packed(self.dev_rows, list(range(len(self.dev_rows)))):
            source, target = (
                pad([self.dev_rows[i][side] for i in batch], self.device) for side in (0, 1)
            )
            nats += float(self._nats(model, *source, *target))
            n += float(target[1].sum())
        return nats / n

    def figures(self, score: Score | TextScore) -> dict[str, float]:
        """As `scoring.figures`."""
        return scoring.figures(score, self.error_rate)

    def score(
        self, model: Model, pairs: Sequence[Pair], beam: Beam | None = None
    ) -> Score | TextScore:
        """Decode all sources, greedily or by beam search, and score them against their targets.

        Raises UsageError if there are no pairs.
        """
        sources = self.source_tokenizer.encode_batch([pair.source for pair in pairs])
        if beam is None:
            targets = translate(model, sources)
        else:
            targets = [best[0].ids for best in search(model, sources, beam)]
        texts = [self.tokenizer.decode(ids) for ids in targets]
        return scoring.score_outputs(self.tokenizer, [pair.targets for pair in pairs], texts)

    def files(self, model: Model) -> dict[str, bytes]:
        """As Task.files."""
        return checkpoint.files(model, self.tokenizer, self.source_tokenizer)

    def facts(self) -> dict[str, Any]:
        """As Task.facts."""
        return {
            "task": "train-seq2seq",
            "data_sha256": self.splits.sha256,
            "source_tokenizer_sha256": self.source_tokenizer.fingerprint,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "batch_tokens": self.batch_tokens,
            "label_smoothing": self.smoothing,
        }
