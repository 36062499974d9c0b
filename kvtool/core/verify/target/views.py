"""A map of what tokens see, row by row, as tensors for the rules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify.target.influence import Sight


class View(NamedTuple):
    """One row of the map: Q queries by K keys; column vectors of queries, row vectors of keys."""

    seen: Tensor  # (Q,K) bool, through the cache
    right: Tensor  # (Q,K) bool, uncached
    at: Tensor  # (Q,1) the query's column in the history
    past: Tensor  # (Q,1) tokens before its step
    end: Tensor  # (Q,1) tokens after its step
    key: Tensor  # (1,K) the key's column
    first: int  # tokens of the segment's first step
    before: Tensor  # (Q,1) where the step before begins
    padding: int
    paddings: frozenset[int]  # of all rows
    window: int  # keys that a query sees without the cache, its own included; 0: all

    @property
    def causal(self) -> Tensor:
        return self.key <= self.at

    def within(self, window: int) -> Tensor:
        """The keys within a window of this width, without padding."""
        near = self.key > self.at - window if window else torch.ones_like(self.right)
        return self.causal & near & (self.key >= self.padding)


def views(sight: Sight) -> list[View]:
    """The rows of a map. A query's own key counts as seen: its token moves it without attention."""
    at, past, end = (
        torch.tensor([[getattr(q, name)] for q in sight.queries])
        for name in ("column", "past", "end")
    )
    key = torch.tensor([sight.columns])
    first = sight.queries[0].end - sight.queries[0].past
    begins = sorted({q.past for q in sight.queries})
    before = torch.tensor([[max([b for b in begins if b < q.past] or [0])] for q in sight.queries])
    found = []
    for row, padding in enumerate(sight.padding):
        own = key == at
        pads = (at < padding).expand_as(own)  # what a token of padding sees means nothing
        right = (sight.uncached[row] | own) & ~pads
        seen = (sight.cached[row] | own) & ~pads
        of_all = frozenset(sight.padding)
        view = View(seen, right, at, past, end, key, first, before, padding, of_all, 0)
        found.append(view._replace(window=width(view, right)))
    return found


def width(view: View, seen: Tensor, rows: Tensor | None = None) -> int:
    """The window that all queries (of `rows`) see through, 0 if there is none or it is not one."""
    widths, known = set(), set(view.key[0].tolist())
    for i in range(len(view.at)) if rows is None else rows.tolist():
        keys = view.key[0][seen[i]]
        oldest = int(keys.min()) if len(keys) else int(view.at[i])
        if oldest > view.padding and oldest - 1 in known:  # else it may be older
            widths.add(int(view.at[i]) - oldest + 1)
    if len(widths) != 1:
        return 0
    (found,) = widths
    band = view.within(found) | (view.key == view.at)
    picked = slice(None) if rows is None else rows
    real = (view.at >= view.padding)[picked]
    return found if torch.equal(seen[picked] & real, band[picked] & real) else 0
