"""Hypotheses: the window is another than it should be, or what is kept for it."""

from __future__ import annotations

from torch import Tensor

from kvtool.core.verify.diagnosis.hypothesis import Column, Hypothesis
from kvtool.core.verify.subject import Start


class WiderWindow(Hypothesis):
    hint = "the window is one token too wide"
    needs = ("window",)
    n_wider = 1

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        window, sinks = self.subject.window + self.n_wider, self.subject.sinks
        causal = 0 <= column.at <= query.at or column is query
        return causal and (query.at - column.at < window or column.at < sinks)


class NarrowerWindow(WiderWindow):
    hint = "the window is one token too narrow: it does not count the query's own"
    n_wider = -1


class NoWindow(WiderWindow):
    hint = "the window is dropped after the prompt"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        self.n_wider = 2**30 if any(self.rows) else 0
        return super().sees(i, query, column, new)


class NoWindowSingly(WiderWindow):
    hint = "the window is dropped at steps of one token"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        self.n_wider = 2**30 if self.n_new == 1 and any(self.rows) else 0
        return super().sees(i, query, column, new)


class NoWindowInPrompt(WiderWindow):
    hint = "the window is dropped in steps of several tokens"

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        self.n_wider = 2**30 if self.n_new > 1 else 0
        return super().sees(i, query, column, new)


class StoredFirst(Hypothesis):
    hint = "a step of several tokens is stored before it is read: it overwrites keys still needed"
    needs = ("window",)

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        last = query.at + self.n_new - 1 - i
        kept = last - column.at < self.subject.window or column.at < self.subject.sinks
        return kept and super().sees(i, query, column, new)


class SinksLost(Hypothesis):
    hint = "the first tokens are evicted although they are sinks"
    needs = ("window",)

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        near = query.at - column.at < self.subject.window
        return near and super().sees(i, query, column, new)


class KeptTooFew(Hypothesis):
    hint = "eviction keeps one key too few after the prompt"
    needs = ("window",)

    def past_columns(self, layer: int, row: int) -> list[Column]:
        held = self.rows[row]
        first = len(held) - (self.subject.window - 2)
        return [c for i, c in enumerate(held) if i >= first or c.at < self.subject.sinks]


class PromptAtSlotZero(Hypothesis):
    hint = (
        "a prompt longer than the ring is stored from slot 0 on: then needed keys are overwritten"
    )
    needs = ("window",)

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.ring: list[dict[int, Column]] = [{} for _ in self.rows]
        self.long = False  # whether the prompt was longer than the ring

    def feed(self, ids: Tensor) -> Tensor:
        first = not any(self.rows)
        self.long = ids.shape[1] > self.subject.window if first else self.long
        logits = super().feed(ids)
        for ring, row in zip(self.ring, self.rows, strict=True):
            new = row[-self.n_new :][-self.subject.window :]
            ring.update({i if first else c.at % self.subject.window: c for i, c in enumerate(new)})
        return logits

    def past_columns(self, layer: int, row: int) -> list[Column]:
        if not self.long:
            return self.rows[row]
        written = {c.at % self.subject.window for c in self.new[row]}
        return [c for slot, c in self.ring[row].items() if slot not in written]

    def sees(self, i: int, query: Column, column: Column, new: bool) -> bool:
        return (self.long and not new) or super().sees(i, query, column, new)


WINDOWS: tuple[type[Hypothesis], ...] = (
    WiderWindow, NarrowerWindow, NoWindow, NoWindowSingly, NoWindowInPrompt, StoredFirst, SinksLost,
    KeptTooFew, PromptAtSlotZero,
)  # fmt: skip
