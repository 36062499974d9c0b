"""Planted bugs of paged caches: the owners of pages, and the places of tokens in them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kvtool.core.cache import Cache
from kvtool.core.cache.paged import PagedCache
from kvtool.core.verify.diagnosis.hypotheses import pages, rollback
from kvtool.core.verify.mutants.mutant import Mutant

KEYS = "stored K"


class NeverCopies(PagedCache):
    """Writes to a page that others have, too."""

    def _shared_by_others(self) -> list[list[int]]:
        return []


class ForksUncounted(PagedCache):
    """A fork's pages are not counted, so that each fork takes them for its own."""

    def fork(self) -> PagedCache:
        other = super().fork()
        for row in other._table:
            self.pool.drop(row)
        return other


class PageBefore(PagedCache):
    """Tokens are counted from 1 in the table, and from 0 within a page."""

    def _slots(self, pages: Tensor, numbers: Tensor) -> Tensor:
        page = (numbers - 1).clamp(min=0) // self.page
        return pages[:, page] * self.page + numbers % self.page


class SelectsNoTable(PagedCache):
    """Reorders the rows of everything but the table."""

    def select(self, rows: Tensor) -> None:
        Cache.select(self, rows)


class SelectsInverse(PagedCache):
    """Scatters the table where it should gather."""

    def select(self, rows: Tensor) -> None:
        is_permutation = len(rows.unique()) == self.batch == len(rows)
        super().select(torch.argsort(rows) if is_permutation else rows)


class FreesCutPage(PagedCache):
    """Rounds down when it counts the pages to keep, and leaves the last one in the table."""

    def crop(self, length: int) -> None:
        super().crop(length)
        if length % self.page:
            for row in self._table:
                self.pool.drop(row[-1:])


PAGES = (
    Mutant(
        "a shared page is not copied on write", partial(NeverCopies, page=4, rows=2),
        bug_class=16, scenario="fork", step=11, layer=0, part=KEYS, hint=pages.PageShared.hint,
    ),
    Mutant(
        "a fork's pages are not counted", partial(ForksUncounted, page=5, rows=2),
        model="learned", bug_class=16, scenario="fork", step=11, layer=0, part=KEYS,
        hint=pages.PageShared.hint,
    ),
    Mutant(
        "first token of a page in the page before", partial(PageBefore, page=4),
        model="sinusoidal", layer=0, part=KEYS, hint=pages.PageBefore.hint,
    ),
    Mutant(
        "page table not reordered", partial(SelectsNoTable, page=4),
        model="seq2seq, rotary", bug_class=17, scenario="permuted", step=3, layer=0, part=KEYS,
        hint=rollback.SelectIgnored.hint,
    ),
    Mutant(
        "page table reordered backwards", partial(SelectsInverse, page=4),
        model="rotary, one KV head", bug_class=17, scenario="permuted", step=3, layer=0, part=KEYS,
        hint=rollback.SelectInverse.hint,
    ),
    Mutant(
        "crop frees a page that holds tokens", partial(FreesCutPage, page=4),
        bug_class=12, scenario="crop", step=9, layer=0, part=KEYS, hint=pages.PageFreed.hint,
    ),
)  # fmt: skip
