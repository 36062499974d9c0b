"""The pool of a paged cache: its pages, and how many rows use each."""

from __future__ import annotations

from bisect import insort
from operator import neg

import torch

from kvtool.core.cache.base import CacheSpec


class Pool:
    """The pages of a cache and its forks, with the number of rows that use each page.

    Page p of a layer is `keys[layer][:, p]` and `values[layer][:, p]`, each (Hkv,page,D), or both
    the same where values are shared. A page without users is free: `n_live + n_free == n_pages`
    always holds.
    """

    def __init__(self, spec: CacheSpec, page: int, n_pages: int) -> None:
        shape = (spec.n_kv_heads, n_pages, page, spec.head_dim)
        self.keys = [
            torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.n_layers)
        ]
        self.values = self.keys if spec.shared else [torch.zeros_like(k) for k in self.keys]
        self.stored = self.keys if spec.shared else [*self.keys, *self.values]  # each once
        self.n_pages = n_pages
        self.users = [0] * n_pages
        self._free = list(range(n_pages))[::-1]  # the lowest last: it is taken next

    @property
    def n_free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    @property
    def next_free(self) -> list[int]:
        """The page that is taken next, in a list; [] if none is free."""
        return self._free[-1:]

    @property
    def n_live(self) -> int:
        """How many pages are in use."""
        return sum(n > 0 for n in self.users)

    def take(self, n: int, sources: list[int]) -> list[int]:
        """Take `n` free pages for one row each; the first ones become copies of `sources`.

        At least `n` pages must be free.
        """
        taken = self._free[len(self._free) - n :][::-1]
        if sources:
            goals, old = (
                torch.tensor(pages, device=self.keys[0].device)
                for pages in (taken[: len(sources)], sources)
            )
            for buffer in self.stored:
                buffer.index_copy_(1, goals, buffer.index_select(1, old))
        # After the copies: if memory runs out for them, nothing has been taken.
        del self._free[len(self._free) - n :]
        self.share(taken)
        return taken

    def share(self, pages: list[int]) -> None:
        """Add one user to each page."""
        for page in pages:
            self.users[page] += 1

    def drop(self, pages: list[int]) -> None:
        """Take one user from each page; a page without users is free."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                insort(self._free, page, key=neg)

    def drop_all(self, table: list[list[int]]) -> None:
        """Drop the pages of all rows of a table, and empty the rows."""
        for row in table:
            self.drop(row)
            row.clear()
