"""Hypotheses: the new tokens stand at wrong positions."""

from __future__ import annotations

from kvtool.core.verify.diagnosis.hypothesis import Hypothesis
from kvtool.core.verify.subject import Start


class NotAdvanced(Hypothesis):
    hint = "positions start at 0 again in each step: the length of the past is not added"

    def positions(self, row: int, n: int) -> list[int]:
        return list(range(n)) if self.rows[row] else super().positions(row, n)


class OneTooFar(Hypothesis):
    hint = "positions after the first step are one too high"
    shift = 1

    def positions(self, row: int, n: int) -> list[int]:
        shift = self.shift if self.rows[row] else 0
        return [p + shift for p in super().positions(row, n)]


class OneTooNear(OneTooFar):
    hint = "positions after the first step are one too low"
    shift = -1


class AfterAdvance(Hypothesis):
    hint = "positions are a step too high: the length is read after the step has advanced it"

    def positions(self, row: int, n: int) -> list[int]:
        return (
            [p + n for p in super().positions(row, n)]
            if self.rows[row]
            else super().positions(row, n)
        )


class AfterAdvanceAlways(AfterAdvance):
    """In the first step too."""

    def positions(self, row: int, n: int) -> list[int]:
        return [p + n for p in Hypothesis.positions(self, row, n)]


class ByStep(Hypothesis):
    hint = "the position counts steps, not tokens: a step of several tokens advances it by one"

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.n_calls = self.first = 0

    def positions(self, row: int, n: int) -> list[int]:
        if row == 0:
            self.n_calls += 1
            self.first = n if self.n_calls == 1 else self.first
        past = self.first + self.n_calls - 2 if self.n_calls > 1 else 0
        return [past + i - self.padding[row] for i in range(n)]


class StepAtOnePlace(Hypothesis):
    hint = "all tokens of a step after the first get the position of its first one"

    def positions(self, row: int, n: int) -> list[int]:
        places = super().positions(row, n)
        return places[:1] * n if self.rows[row] else places


class PaddingIgnored(Hypothesis):
    hint = "positions after the prompt ignore the left padding: the length is taken instead"
    needs = ("padding",)

    def positions(self, row: int, n: int) -> list[int]:
        pad = self.padding[row] if self.rows[row] else 0
        return [p + pad for p in super().positions(row, n)]


class PaddingIgnoredAlways(Hypothesis):
    hint = "positions ignore the left padding, in the prompt too"
    needs = ("padding",)

    def positions(self, row: int, n: int) -> list[int]:
        return [p + self.padding[row] for p in super().positions(row, n)]


class HeldRows(Hypothesis):
    hint = "after eviction the position is the number of keys held, not of tokens seen"
    needs = ("window",)
    less = 0

    def positions(self, row: int, n: int) -> list[int]:
        past = len(self.rows[row]) - self.padding[row]
        held = min(past, self.subject.window + self.subject.sinks - self.less)
        return [held + i for i in range(n)]


class HeldRowsBefore(HeldRows):
    """The token that will need the room has been evicted already."""

    less = 1


class WithinWindow(HeldRows):
    hint = "the position is the slot in the ring: it starts at 0 again when the ring wraps"

    def positions(self, row: int, n: int) -> list[int]:
        return [p % self.subject.window for p in Hypothesis.positions(self, row, n)]


POSITIONS: tuple[type[Hypothesis], ...] = (
    NotAdvanced, OneTooFar, OneTooNear, AfterAdvance, AfterAdvanceAlways, ByStep, StepAtOnePlace,
    PaddingIgnored, PaddingIgnoredAlways, HeldRows, HeldRowsBefore, WithinWindow,
)  # fmt: skip
