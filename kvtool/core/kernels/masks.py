"""Attention masks: the one rule, and for long prompts a lazy mask, made for a block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.kernels.query_blocks import Flags, QueryBlock, query_blocks

MIN_PAIRS = 2**21  # pairs of a query and a key; smaller masks are made at once
MIN_PREFILL = 16  # queries; with fewer, a step is not a prefill


def visible(q_pos: Tensor, k_pos: Tensor, window: int = 0, sinks: int = 0) -> Tensor:
    """The one mask rule: which key columns each query may attend to.

    q_pos (B,T) and k_pos (B,S) are absolute positions -> (B,1,T,S) bool, True = attend. A query
    sees the keys at its own position and before: at most `window` of them with its own (0: all),
    and always the first `sinks` positions. Negative positions are left padding or empty columns,
    which no query sees. But a padding query sees itself, since a row without a key would be NaN.
    """
    q = q_pos[:, None, :, None]
    k = k_pos[:, None, None, :]
    rule = (k <= q) & ((k >= 0) | (k == q))
    if window:
        rule = rule & ((q - k < window) | ((k >= 0) & (k < sinks)))
    return rule


def make_mask(
    q_pos: Tensor, k_pos: Tensor, window: int = 0, sinks: int = 0, copies: CopyRule | None = None
) -> Tensor | LazyMask:
    """The mask of `visible`, and of `copies` if given: (B,1,T,S) bool, or a LazyMask if large."""
    n, n_keys = q_pos.shape[1], k_pos.shape[1]
    mask = LazyMask(q_pos, k_pos, window, sinks, copies=copies)
    return mask if n >= MIN_PREFILL and n * n_keys > MIN_PAIRS else mask.mask()


def mask_tensor(mask: Tensor | LazyMask | None) -> Tensor | None:
    """The mask as a tensor (B,1,T,S) of any size; None stays None."""
    return mask.mask() if isinstance(mask, LazyMask) else mask


class CopyRule(NamedTuple):
    """Which copy of a key a query reads, for a quantized cache: each key has two columns, one
    quantized and one exact.

    A query reads a column if `since` <= `n_quantized` < `until`.
    """

    n_quantized: Tensor  # (T,) how many tokens are quantized at the query's step
    since: Tensor  # (S,)
    until: Tensor  # (S,)

    def mask(self, queries: slice, columns: slice | Tensor) -> Tensor:
        """The rule for some queries and columns: (t,s) bool, True = read."""
        n_quantized = self.n_quantized[queries, None]
        return (self.since[columns] <= n_quantized) & (n_quantized < self.until[columns])

    def to(self, device: torch.device) -> CopyRule:
        """The same rule on a device."""
        return CopyRule(*(x.to(device) for x in self))


@dataclass(frozen=True)
class LazyMask:
    """A mask that is made in parts, on demand, from the arguments of `visible`."""

    q_pos: Tensor  # (B,T)
    k_pos: Tensor  # (B,S)
    window: int = 0
    sinks: int = 0
    near: int = 0  # a second window, without sinks; 0: none
    copies: CopyRule | None = None

    def within(self, near: int) -> LazyMask:
        """The same mask, but a query sees at most the `near` last positions, with its own."""
        return replace(self, near=min(near, self.near or near))

    def mask(self, queries: slice = slice(None), columns: slice | Tensor = slice(None)) -> Tensor:
        """The mask for some queries and columns: (B,1,t,s) bool, True = attend."""
        q, k = self.q_pos[:, queries], self.k_pos[:, columns]
        rule = visible(q, k, self.window, self.sinks)
        if self.near:
            rule &= (q[:, :, None] - k[:, None] < self.near)[:, None]
        if self.copies is not None:
            rule &= self.copies.mask(queries, columns)
        return rule

    @cached_property
    def blocks(self) -> Sequence[QueryBlock]:
        """All queries in blocks, with the columns that each block sees."""
        return query_blocks(self.q_pos.shape[1], self._seen_by, self.k_pos.device)

    def _seen_by(self, queries: slice) -> tuple[Flags, Flags]:
        """Two sets of columns, (S,) bool each, for some queries.

        The first has every column that any of the queries sees, and maybe more. The second has only
        columns before the queries that all of them see, but maybe not all of these.
        """
        q, k = self.q_pos[:, queries], self.k_pos
        first, last = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
        some = (k <= last) & (k >= first.clamp(max=0))
        # Without the first query's own column, so that each query also sees one of the others.
        every = (k < first) & (k >= 0)
        if self.window:
            sink = (k >= 0) & (k < self.sinks)
            some &= (first - k < self.window) | sink
            every &= (last - k < self.window) | sink
        if self.near:
            some &= first - k < self.near
            every &= last - k < self.near
        if self.copies is not None:
            n_quantized = self.copies.n_quantized[queries]
            fewest, most = n_quantized.min(), n_quantized.max()
            some &= (self.copies.since <= most) & (fewest < self.copies.until)
            every &= (self.copies.since <= fewest) & (most < self.copies.until)
        return some.any(0).cpu().numpy(), every.all(0).cpu().numpy()
