"""Hypotheses: the new tokens see keys that they should not, or miss some."""

from __future__ import annotations

from torch import Tensor

from kvtool.core.verify.diagnosis.hypothesis import Column, Hypothesis
from kvtool.core.verify.subject import Start


class PaddingSeen(Hypothesis):
    hint = "the padding mask is dropped after the prompt: tokens attend to left padding"
    needs = ("padding",)

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        return self._wrong(column, new) or super().sees(i, query, column, new)

    def _wrong(self, column: Column, new: bool) -> bool:
        return column.at < 0 and not new


class PaddingSeenInChunks(PaddingSeen):
    hint = "the padding mask is dropped in steps of several tokens after the prompt"

    def _wrong(self, column: Column, new: bool) -> bool:
        return self.n_new > 1 and column.at < 0 and not new


class OnePaddingSeen(PaddingSeen):
    hint = "the padding mask is one column short after the prompt: the last padding token is seen"

    def _wrong(self, column: Column, new: bool) -> bool:
        return column.at == -1 and not new


class TopLeft(Hypothesis):
    hint = "the causal mask is aligned top-left: a step's token sees the first keys, not its past"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        past = any(self.rows)
        return column.at <= i if past else super().sees(i, query, column, new)


class NoCausalMask(Hypothesis):
    hint = "a step of several tokens has no causal mask once there is a past: they see each other"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        later = new and column.at > query.at and any(self.rows)
        return later or super().sees(i, query, column, new)


class NoCausalMaskAlways(Hypothesis):
    hint = "no step of several tokens has a causal mask, the prompt included"

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.prompt = 0

    def feed(self, ids: Tensor) -> Tensor:
        self.prompt = self.prompt or ids.shape[1]
        return super().feed(ids)

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        later = new and column.at > query.at and self.prompt > 1
        return later or super().sees(i, query, column, new)


class NotItself(Hypothesis):
    hint = "a token after the prompt does not see its own key"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        itself = column is query and any(self.rows)
        return not itself and super().sees(i, query, column, new)


class LastOnly(Hypothesis):
    hint = "tokens of a step see only the keys of that step: the past is not read"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        return new and super().sees(i, query, column, new)


class OldestLost(Hypothesis):
    hint = "the oldest key is not read after the prompt"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        lost = column.at == 0 and any(self.rows)
        return not lost and super().sees(i, query, column, new)


MASKS: tuple[type[Hypothesis], ...] = (
    PaddingSeen, PaddingSeenInChunks, OnePaddingSeen, TopLeft, NoCausalMask, NoCausalMaskAlways,
    NotItself, LastOnly, OldestLost,
)  # fmt: skip
