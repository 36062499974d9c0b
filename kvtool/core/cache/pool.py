"""The pages of a paged cache: which are free, and how many rows use each."""

from __future__ import annotations

from bisect import insort
from operator import neg

import torch

from kvtool.core.cache.base import CacheSpec


class Pool:
    """Pages for the rows of a cache and of its forks, with a count of the rows that use each.

    Page p of a layer is `keys[layer][p]` and `values[layer][p]`, each (page,Hkv,D), or both the
    same where values are shared. A page that
    nobody uses is free: `n_live + n_free == n_pages` at every moment.
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
        """How many pages nobody uses."""
        return len(self._free)

    @property
    def next_free(self) -> list[int]:
        """The page that is taken next, if there is one."""
        return self._free[-1:]

    @property
    def n_live(self) -> int:
        """How many pages a row uses, or several."""
        return sum(n > 0 for n in self.users)

    def take(self, n: int, sources: list[int]) -> list[int]:
        """`n` free pages for one row each, the first of them copies of `sources`."""
        taken = self._free[len(self._free) - n :][::-1]
        if sources:
            goals, old = (
                torch.tensor(pages, device=self.keys[0].device)
                for pages in (taken[: len(sources)], sources)
            )
            for buffer in self.stored:
                buffer.index_copy_(1, goals, buffer.index_select(1, old))
        # Only now, when memory for the copies has not run out.
        del self._free[len(self._free) - n :]
        self.share(taken)
        return taken

    def share(self, pages: list[int]) -> None:
        """Count one more row that uses each page."""
        for page in pages:
            self.users[page] += 1

    def drop(self, pages: list[int]) -> None:
        """Count one row less that uses each page; nobody's are free."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                insort(self._free, page, key=neg)

    def drop_all(self, table: list[list[int]]) -> None:
        """Empty every row of a table."""
        for row in table:
            self.drop(row)
            row.clear()
