"""A cache in pages: rows take memory a page at a time, and share the pages of a common past."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvtool.config import check_int
from kvtool.core import cache_bytes
from kvtool.core.cache.base import EMPTY, Bytes, Cache, CacheSpec, Step
from kvtool.core.cache.direct_access import DirectAccess, GraphStep, StepAddresses, no_sinks
from kvtool.core.cache.pool import Pool
from kvtool.core.kernels.masks import make_mask
from kvtool.errors import CapacityError


@dataclass(frozen=True)
class PagedStep(Step):
    """A step of a paged cache.

    slots (B,T): where in the pool each new token is stored, counted in tokens.
    pages (B,n): the pages of each row, in the order of their tokens; None for a first step, which
        reads only its own tokens.
    first: the first page if there is one row and its pages are contiguous in the pool; else None.
    empty (page,1) bool: the empty columns of the last page.
    """

    pages: Tensor | None = None
    first: int | None = None
    empty: Tensor | None = None


class PagedCache(DirectAccess, Cache):
    """Pages of `page` tokens from one pool, with a table of each row's pages (vLLM, Kwon 2023).

    A row takes a page when its tokens reach it. `select` and `fork` copy tables, not tokens. If
    several rows use a partly filled page, it is copied before one of them writes to it (copy on
    write). One table serves all layers.

        page=2; two rows, three tokens each: [0 1] [2 3], one page in two is half empty
        select([0, 0]):  [0 1] [0 1]    pages 2 and 3 are free
        one more token:  [0 2] [0 1]    page 1 was copied to 2, then each row wrote to its own

    The pool has `pages` pages. By default these let all rows, and at least `rows` rows, reach the
    capacity without sharing. Rows that `select` adds, and forks, take pages from the same pool. A
    fork returns its pages when it is reset or deleted.

    PyTorch's attention needs contiguous keys. The pages of a single row that never shared any are
    contiguous in the pool, and are read in place. Otherwise each layer of a later step gathers the
    pages of its rows into new tensors, and drops them after use. vLLM's kernel reads pages in
    place.
    """

    kind: ClassVar[str] = "paged"
    compilable: ClassVar[bool] = True
    small: ClassVar[Mapping[str, int]] = {"page": 4, "rows": 2}

    def __init__(
        self,
        spec: CacheSpec,
        left_padding: Tensor | None = None,
        page: int = cache_bytes.PAGE,
        rows: int = 1,
        pages: int = 0,
    ) -> None:
        """An empty cache. Raises UsageError for a page or rows below 1, or negative pages."""
        check_int("page", page, 1)
        check_int("rows", rows, 1)
        check_int("pages", pages, 0)
        self.page = page
        self.pool = Pool(spec, page, pages or pages_for(spec, page, rows))
        self._keep_table([])
        super().__init__(spec, left_padding)

    def _keep_table(self, table: list[list[int]]) -> None:
        """Use `table` for the pages of each row; the pool gets them back when this is deleted."""
        self._table = table  # changed in place only
        weakref.finalize(self, self.pool.drop_all, table).atexit = False

    def reset(self, left_padding: Tensor | None = None) -> None:
        """As Cache.reset; returns all pages to the pool."""
        super().reset(left_padding)
        self.pool.drop_all(self._table)
        self._table[:] = [[] for _ in range(self.batch)]
        self._most_pages = 0  # the most pages that a row has had

    def _trim(self) -> None:
        """Forget tokens that are not committed, and return their pages."""
        self._begun = 0
        n = self._n_pages(self.length)
        for row in self._table:
            self.pool.drop(row[n:])
            del row[n:]

    def _n_pages(self, length: int) -> int:
        return cache_bytes.n_pages(length, self.page)

    def make_room(self, n_new: int) -> int:
        """As Cache.make_room; takes pages. Raises CapacityError also if the pool is empty."""
        start = super().make_room(n_new)
        self._trim()
        self._take_pages(start, start + n_new)
        return start

    def _make_step(self, start: int, n_new: int) -> Step:
        pages = self._pages()
        numbers = torch.arange(start, start + n_new, device=self.spec.device)
        if start:
            return self._device_step(
                numbers, self.left_padding, pages, _first_contiguous(self._table)
            )
        q_pos, slots = self._at(numbers, self.left_padding), self._slots(pages, numbers)
        mask = None if self.left_padding is None else make_mask(q_pos, q_pos)
        return PagedStep(q_pos, q_pos, slots, mask, mask is None, self.spec.kernels)

    def _pages(self) -> Tensor:
        """The table (B,n) on the device."""
        return torch.tensor(self._table, device=self.spec.device)

    def _device_step(
        self, numbers: Tensor, padding: Tensor | None, pages: Tensor, first: int | None
    ) -> PagedStep:
        """The step of the tokens with `numbers` (T,) after others, made on the device alone."""
        columns = torch.arange(pages.shape[1] * self.page, device=self.spec.device)
        empty = columns > numbers[-1]
        q_pos = self._at(numbers, padding)
        k_pos = self._at(columns, padding).masked_fill(empty, EMPTY)
        return PagedStep(
            q_pos, k_pos, self._slots(pages, numbers),
            make_mask(q_pos, k_pos),  # always made, or a full page would need another capture
            causal=False, kernels=self.spec.kernels,
            pages=pages, first=first, empty=empty[-self.page :, None],
        )  # fmt: skip

    def graph_step(self) -> GraphStep | None:
        """As DirectAccess.graph_step; the tables are the pages (B,n), then the padding."""
        if not self.length or not self._is_unpatched():
            return None
        start = self.make_room(1)
        tables = (self._pages(), *self._padding_table())
        form = (_first_contiguous(self._table),)
        self._begun = 1
        return GraphStep(start, tables, form, list(self.pool.stored))

    def step_at(
        self, start: Tensor, tables: tuple[Tensor, ...], form: tuple[int | None, ...]
    ) -> Step:
        """As DirectAccess.step_at."""
        padding = tables[1] if len(tables) > 1 else None
        return self._device_step(start, padding, tables[0], *form)

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """As DirectAccess.step_addresses; None too unless one row has contiguous pages."""
        if len(self._table) != 1 or not self._is_unpatched():
            return None
        start = self.make_room(n_new)
        first = _first_contiguous(self._table)
        padding, addresses = self._padding(), self._addresses_of(self.pool.keys, self.pool.values)
        if first is None or padding is None or addresses is None:
            return None
        columns = self.pool.n_pages * self.page
        if first:  # column 0 of the row is the first of that page
            page_nbytes = self.page * self.spec.head_dim * self.spec.dtype.itemsize
            addresses = addresses + first * page_nbytes
        self._begun = n_new
        return StepAddresses(start, padding, addresses, columns, start, 0, no_sinks(1))

    def _slots(self, pages: Tensor, numbers: Tensor) -> Tensor:
        """The slots in the pool of tokens `numbers` (T,), by the rows' pages (B,n) -> (B,T)."""
        taken = pages.index_select(1, numbers // self.page)
        return taken * self.page + numbers % self.page

    def _take_pages(self, start: int, end: int) -> None:
        """Give each row pages of its own for tokens start..end-1. Raises CapacityError."""
        shared = self._shared_by_others() if start % self.page else []
        n_more = self._n_pages(end) - self._n_pages(start)  # for each row
        n_needed = len(shared) + n_more * self.batch
        if n_needed > self.pool.n_free:
            raise CapacityError(
                f"{self.kind} cache has run out of pages: {start} tokens held in {self.batch} rows "
                f"and {end - start} new ones need {n_needed} more pages of {self.page} tokens "
                f"({self.pool.n_free} of {self.pool.n_pages} are free)",
                "Make it with more rows or pages, or let go of rows and forks.",
            )
        taken = self.pool.take(n_needed, [row[-1] for row in shared])
        for row in shared:
            self.pool.drop(row[-1:])
            row[-1] = taken.pop(0)
        for i, row in enumerate(self._table):
            row += taken[i * n_more : (i + 1) * n_more]
        self._most_pages = max(self._most_pages, self._n_pages(end))

    def _shared_by_others(self) -> list[list[int]]:
        """The rows whose last page must be copied before they write to it.

        If all users of a page are rows of this cache, the last of them keeps the page itself.
        """
        found = []
        users = {row[-1]: self.pool.users[row[-1]] for row in self._table}
        for row in self._table:
            if users[row[-1]] > 1:
                users[row[-1]] -= 1
                found.append(row)
        return found

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """As Cache.write; returns views of the pool for a single row with contiguous pages, and
        gathers the pages otherwise."""
        assert isinstance(step, PagedStep)
        buffers = self.pool.keys[layer], self.pool.values[layer]
        for buffer, new in zip(buffers, (k, v), strict=True):
            tokens = new.transpose(0, 1).flatten(1, 2)  # (Hkv,B*T,D)
            buffer.flatten(1, 2).index_copy_(1, step.slots.flatten(), tokens)
        if step.pages is None or step.empty is None:
            return k, v
        keys, values = (self._gather(buffer, step.pages, step.first) for buffer in buffers)
        for found in (keys, values):
            # Other sequences may have left NaN there, and a mask does not help: 0 x NaN is NaN. If
            # this is a view, the page belongs to this row alone.
            found[:, :, -self.page :].masked_fill_(step.empty, 0.0)
        return keys, values

    def _gather(self, buffer: Tensor, pages: Tensor, first: int | None = None) -> Tensor:
        """The tokens of pages (B,n) -> (B,Hkv,n*page,D); a view with `first`, else a copy."""
        batch, n = pages.shape
        if first is not None:
            return buffer[:, first : first + n].flatten(1, 2)[None]
        found = buffer.index_select(1, pages.flatten())  # (Hkv,B*n,page,D)
        return found.view(buffer.shape[0], batch, n * self.page, buffer.shape[3]).transpose(0, 1)

    def commit(self, n_new: int) -> None:
        """As Cache.commit; returns the pages of tokens beyond `n_new`."""
        super().commit(n_new)
        self._trim()

    def crop(self, length: int) -> None:
        """As Cache.crop; returns the pages after `length`."""
        super().crop(length)
        self._trim()

    def select(self, rows: Tensor) -> None:
        """As Cache.select, without copying tokens.

        There may be more rows than before, if the pool has pages for their new tokens.
        """
        super().select(rows)
        self._trim()
        picked = [list(self._table[row]) for row in rows.tolist()]
        for row in picked:
            self.pool.share(row)
        self.pool.drop_all(self._table)
        self._table[:] = picked

    def fork(self) -> PagedCache:
        """As Cache.fork; it shares the pages of all committed tokens."""
        other = copy.copy(self)
        n = self._n_pages(self.length)
        other._keep_table([row[:n] for row in self._table])
        for row in other._table:
            other.pool.share(row)
        other._begun = 0
        return other

    def __deepcopy__(self, memo: object) -> PagedCache:
        return self.fork()

    def vacuous(self) -> str | None:
        """As Cache.vacuous: a check within one page reaches no table."""
        if self._most_pages > 1:
            return None
        return f"no row needed a second page of {self.page} tokens ({self.length} tokens held)"

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Cache.snapshot."""
        n = self._n_pages(self.length)
        table = [row[:n] for row in self._table]
        pages = torch.tensor(table, dtype=torch.long, device=self.spec.device)
        keys, values = (
            self._gather(buffers[layer], pages)[:, :, : self.length].clone()
            for buffers in (self.pool.keys, self.pool.values)
        )
        return keys, values, self._positions(0, self.length).clone()

    def nbytes(self) -> Bytes:
        """As Cache.nbytes; a fork counts the same pool, and shared pages count once.

        A step that gathers its pages reads them twice, to copy and to attend. Meanwhile the copies
        take the memory of one layer's rows besides.
        """
        token = self.spec.token_nbytes // self.spec.batch  # of one row
        buffers = self.pool.stored
        allocated = sum(t.untyped_storage().nbytes() for t in buffers) + self._padding_nbytes()
        n = self._n_pages(self.length)
        filled = {
            page: min(self.page, self.length - i * self.page)
            for row in self._table
            for i, page in enumerate(row[:n])
        }
        times = 2 if _first_contiguous(self._next_table()) is None else 1
        read = times * self._n_pages(self.length + 1) * self.page * self.batch
        return Bytes(allocated, sum(filled.values()) * token, read * token)

    def _next_table(self) -> list[list[int]]:
        """The table at the next token, for a single row; the present table for several rows."""
        if len(self._table) != 1:
            return self._table
        row, n_full = self._table[0], self.length // self.page
        if self.length % self.page and self.pool.users[row[n_full]] == 1:
            return [row[: n_full + 1]]
        begun = row[self._n_pages(self.length) :]  # returned to the pool first
        return [row[:n_full] + sorted(self.pool.next_free + begun)[:1]]

    @classmethod
    def predict_nbytes(
        cls,
        spec: CacheSpec,
        length: int,
        prompt: int = 1,
        page: int = cache_bytes.PAGE,
        rows: int = 1,
        pages: int = 0,
    ) -> int:
        """As Cache.predict_nbytes: the whole pool, whatever `length` is."""
        pages = pages or pages_for(spec, page, rows)
        sizes = spec.batch, spec.capacity, length
        held = cache_bytes.paged(spec.kept, *sizes, page=page, pages=pages)
        return spec.n_layers * held.allocated


PagedCache.freeze_methods("_device_step", "_slots", "_gather", "_pages")


def _first_contiguous(table: list[list[int]]) -> int | None:
    """The first page if there is one row and its pages are contiguous in the pool; else None."""
    if len(table) != 1 or not table[0]:
        return None
    first, n = table[0][0], len(table[0])
    return first if table[0] == list(range(first, first + n)) else None


def pages_for(spec: CacheSpec, page: int, rows: int = 1) -> int:
    """How many pages the rows of the spec, and at least `rows` rows, need if they share nothing."""
    return max(spec.batch, rows) * cache_bytes.n_pages(spec.capacity, page)
