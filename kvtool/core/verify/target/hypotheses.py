"""What a bug in a user's decoder might be: each hypothesis decodes with it.

A decoder of which nothing is known cannot be decoded by the book. But its uncached pass can be
given another history, and its lookups other positions: what then gives, to rounding, the wrong
logits that the cache gave, is the bug.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.attributes import owned_modules, running_modules
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import Lookup, Tracer


class TracedSession(TargetSession):
    """The user's session, and the trace of its last step."""

    def __init__(self, subject: TargetSubject, start: Start, tracer: Tracer) -> None:
        super().__init__(subject, start)
        self.tracer = tracer

    def feed(self, ids: Tensor) -> Tensor:
        self.tracer.clear()
        with self.tracer.on(running_modules(self.subject.decoder, self.state)):
            return super().feed(ids)


class FedStep(NamedTuple):
    """What the K lookups of one step of n tokens were asked for."""

    past: int  # tokens before the step
    asked: Tensor  # (B,n,K) whole numbers
    right: Tensor  # (B,n) the positions of its tokens


def positions(start: Start, past: int, ids: Tensor) -> Tensor:
    """The positions (B,n) of tokens behind `past` others, where padding counts for nothing."""
    batch, n = ids.shape
    if start.padding is None:
        return torch.arange(past, past + n, device=ids.device).expand(batch, n)
    real = start.real(0, past + n)
    return (real.cumsum(1) - 1).clamp(min=0)[:, past:]


class TargetHypothesis:
    """A session that computes the whole history again at each step, as a right cache answers.

    A subclass gets the history wrong in one way, as a cache might. Beside each id, `tokens`
    (B,T,1+K) has what the lookups were asked for when the user's session was fed it: the pass is
    given the same.
    """

    hint = ""

    def __init__(
        self,
        subject: TargetSubject,
        start: Start,
        lookups: tuple[Lookup, ...] = (),
        log: list[FedStep] | None = None,
    ) -> None:
        self.subject, self.lookups = subject, lookups
        self.log = [] if log is None else log
        self.tracer = Tracer()
        self.inner: TargetSession | None = None
        if lookups:
            self.inner = TracedSession(subject, start, self.tracer)
        self.begin(start)

    def begin(self, start: Start) -> None:
        """Begin with no tokens."""
        self.start = start
        size = (start.batch, 0, 1 + len(self.lookups))
        self.tokens = torch.empty(size, dtype=torch.long, device=self.subject.device)

    def feed(self, ids: Tensor) -> Tensor:
        past, n = self.tokens.shape[1], ids.shape[1]
        asked = self.asked(ids)
        self.log.append(FedStep(past, asked, positions(self.start, past, ids)))
        self.tokens = torch.cat([self.tokens, torch.cat([ids[..., None], asked], dim=2)], dim=1)
        read = self.read(n)
        given = {lookup: read[..., 1 + i] for i, lookup in enumerate(self.lookups)}
        with Tracer(given).on(owned_modules(self.subject.decoder)):
            return self.subject.call_full(read[..., 0], self.start)[:, -n:]

    def asked(self, ids: Tensor) -> Tensor:
        """What the lookups are asked for when the user's session is fed the ids: (B,n,K)."""
        if self.inner is None:
            return ids.new_empty(*ids.shape, 0)
        self.inner.feed(ids)
        columns = [self.tracer.given(lookup).reshape(-1, ids.shape[1]) for lookup in self.lookups]
        return torch.stack([column.expand(ids.shape).long() for column in columns], dim=2)

    def read(self, n: int) -> Tensor:
        """The tokens that a step of n reads, its own included."""
        return self.tokens

    # What is done to the history is done to the user's session too.

    def crop(self, length: int) -> None:
        if self.inner is not None:
            self.inner.crop(length)
        self.cut(length)

    def select(self, rows: Tensor) -> None:
        if self.inner is not None:
            self.inner.select(rows)
        self.pick(rows)

    def reset(self, start: Start) -> None:
        if self.inner is not None:
            self.inner.reset(start)
        self.begin_again(start)

    def reload(self) -> None:
        if self.inner is not None:
            self.inner.reload()

    def fork(self) -> TargetHypothesis:
        other = copy.copy(self)
        other.inner = None if self.inner is None else self.inner.fork()
        return other

    def vacuous(self) -> str | None:
        return None

    # What becomes of it: a subclass changes one of these rules

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.tokens = self.tokens[:, :length]

    def pick(self, rows: Tensor) -> None:
        """Go on from the histories of `rows` (n,), in that order."""
        self.tokens, self.start = self.tokens[rows], self.start.select(rows)

    def begin_again(self, start: Start) -> None:
        """Forget everything."""
        self.begin(start)


class PastLost(TargetHypothesis):
    hint = "the past is not read: each step is computed as if it were the first"

    def read(self, n: int) -> Tensor:
        return self.tokens[:, -n:]


class FirstLost(TargetHypothesis):
    hint = "the first token is lost after the first step"

    def read(self, n: int) -> Tensor:
        return self.tokens[:, 1:] if self.tokens.shape[1] > n else self.tokens


class LatestLost(TargetHypothesis):
    hint = "the token before the step is lost"

    def read(self, n: int) -> Tensor:
        cut = self.tokens.shape[1] - n
        return torch.cat([self.tokens[:, : max(cut - 1, 0)], self.tokens[:, cut:]], dim=1)


class PromptOnly(TargetHypothesis):
    hint = "the first step alone is stored: tokens after it are forgotten"

    def read(self, n: int) -> Tensor:
        cut, first = self.tokens.shape[1] - n, self.log[0].asked.shape[1]
        return torch.cat([self.tokens[:, : min(first, cut)], self.tokens[:, cut:]], dim=1)


class LastStepOnly(TargetHypothesis):
    hint = "the step before replaces the past in place of joining it"

    def read(self, n: int) -> Tensor:
        before = self.log[-2].asked.shape[1] if len(self.log) > 1 else 0
        return self.tokens[:, -(before + n) :]


class CropIgnored(TargetHypothesis):
    hint = "crop does nothing: the tokens taken back stay"

    def cut(self, length: int) -> None:
        pass


class CropShort(TargetHypothesis):
    hint = "crop leaves one token too many"
    n_extra = 1

    def cut(self, length: int) -> None:
        super().cut(length + self.n_extra)


class CropLong(CropShort):
    hint = "crop takes one token too many"
    n_extra = -1


class CropTakes(TargetHypothesis):
    hint = "crop takes as many tokens as it should leave"

    def cut(self, length: int) -> None:
        super().cut(max(self.tokens.shape[1] - length, 0))


class ResetIgnored(TargetHypothesis):
    hint = "reset does nothing: the second sequence goes on after the first"

    def begin_again(self, start: Start) -> None:
        self.start = start


class SelectIgnored(TargetHypothesis):
    hint = "select does nothing: every row goes on from another row's past"

    def pick(self, rows: Tensor) -> None:
        pass


class SelectInverse(TargetHypothesis):
    hint = "select applies the inverse order"

    def pick(self, rows: Tensor) -> None:
        # Rows that leave have no inverse: taking the first ones would look like it.
        super().pick(rows.argsort() if len(rows) == len(self.tokens) else rows)


class SelectFirst(TargetHypothesis):
    hint = "where rows leave the batch, the first ones stay in place of those that should"

    def pick(self, rows: Tensor) -> None:
        leave = len(rows) < len(self.tokens)
        super().pick(torch.arange(len(rows), device=rows.device) if leave else rows)


class PaddingKept(TargetHypothesis):
    hint = "select leaves the padding where it is: rows go on with the padding of others"

    def pick(self, rows: Tensor) -> None:
        padding = self.start.padding
        super().pick(rows)
        if padding is not None:
            self.start = replace(self.start, padding=padding[: len(rows)])


TARGET_HYPOTHESES: tuple[type[TargetHypothesis], ...] = (
    PastLost, FirstLost, LatestLost, PromptOnly, LastStepOnly, CropIgnored, CropShort, CropLong,
    CropTakes, ResetIgnored, SelectIgnored, SelectInverse, SelectFirst, PaddingKept,
)  # fmt: skip
