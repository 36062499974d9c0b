"""Hypotheses: a page is shared when it should not be, or a token is looked for in the wrong one."""

from __future__ import annotations

from torch import Tensor

from kvtool.core.verify.diagnosis.hypotheses.rollback import ForkShares
from kvtool.core.verify.diagnosis.hypothesis import ZERO, Column, Hypothesis
from kvtool.core.verify.subject import Start


class PageShared(ForkShares):
    hint = "a page that is filled in part is not copied before one of its forks writes to it"
    needs: tuple[str, ...] = ("fork", "pages")

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.shared = 0  # tokens that a page which all forks have may hold

    def fork(self) -> Hypothesis:
        page = self.subject.page
        self.shared = -(-len(self.rows[0]) // page) * page
        return super().fork()

    def past_columns(self, layer: int, row: int) -> list[Column]:
        return [*super().past_columns(layer, row)[: self.shared], *self.rows[row][self.shared :]]


class _SamePlace(Hypothesis):
    """Some tokens are read in the place of others, by their numbers in a row."""

    needs: tuple[str, ...] = ("pages",)

    def as_read(self, part: str, layer: int, stored: Tensor, columns: list[list[Column]]) -> Tensor:
        if not any(self.rows):
            return stored  # the step's own tokens are all that there is
        name = "key" if part == "k" else "value"
        tokens = []
        for row, padding in zip(columns, self.padding, strict=True):
            there = {c.at + padding: getattr(c, name) for c in row if getattr(c, name) != ZERO}
            tokens.append([self.stored_at(c.at + padding, there) for c in row])
        return self.store.get(part, layer, tokens)

    def stored_at(self, number: int, there: dict[int, int]) -> int:
        """The stored token that stands where token `number` of a row should; `there` has all."""
        return there.get(number, ZERO)


class PageBefore(_SamePlace):
    hint = "the first token of a page is stored in the page before, over the first one there"

    def stored_at(self, number: int, there: dict[int, int]) -> int:
        page = self.subject.page
        if number % page:
            return super().stored_at(number, there)
        return there.get(number + page, there[0] if number == 0 else ZERO)


class PageFreed(_SamePlace):
    hint = "crop frees a page that still holds tokens: it becomes the next page too"
    needs = ("crop", "pages")

    def _begin(self, start: Start) -> None:
        super()._begin(start)
        self.freed: set[int] = set()  # numbers of the pages of a row

    def crop(self, length: int) -> None:
        super().crop(length)
        if length % self.subject.page:
            self.freed.add(length // self.subject.page)

    def stored_at(self, number: int, there: dict[int, int]) -> int:
        page = self.subject.page
        later = number + page if number // page in self.freed else number
        return there.get(later, there.get(number, ZERO))


PAGES: tuple[type[Hypothesis], ...] = (PageShared, PageBefore, PageFreed)
