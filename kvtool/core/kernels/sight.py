"""Which keys each query sees: one rule, and for long prompts a mask that is never made whole.

The mask of a prompt has a place for each pair of tokens: 1 GiB at 32,768, and PyTorch makes numbers
of it, which take four times as much. But all that a block of queries sees are stretches of columns,
most of which every query of the block sees; a mask is needed for the others alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Flags = NDArray[np.bool_]

LARGE = 2**21  # pairs of a query and a key; the masks of fewer are made whole
LEAST = 16  # queries; fewer are no prompt
BLOCK = 1024  # queries that are looked after together
EDGE = 256  # and of those, what share a mask, where most columns need none


def visible(q_pos: Tensor, k_pos: Tensor, window: int = 0, sinks: int = 0) -> Tensor:
    """The one mask rule: which key columns each query may attend to.

    q_pos (B,T) and k_pos (B,S) are absolute positions -> (B,1,T,S) bool, True = attend. A query
    sees the keys at its own position and before, at most `window` of them counting its own (0:
    all), and always the first `sinks` positions. Negative positions are left padding or empty
    columns: nobody sees them, except that a padding query sees itself, since a row without a key
    would be NaN.
    """
    q = q_pos[:, None, :, None]
    k = k_pos[:, None, None, :]
    rule = (k <= q) & ((k >= 0) | (k == q))
    if window:
        rule = rule & ((q - k < window) | ((k >= 0) & (k < sinks)))
    return rule


class Met(NamedTuple):
    """Which columns a query meets by how many tokens are quantized when it comes (T,): at least
    `since` and fewer than `until` of its column (S,)."""

    n_quantized: Tensor
    since: Tensor
    until: Tensor

    def mask(self, queries: slice, columns: slice | Tensor) -> Tensor:
        """(t,s) bool"""
        n_quantized = self.n_quantized[queries, None]
        return (self.since[columns] <= n_quantized) & (n_quantized < self.until[columns])

    def to(self, device: torch.device) -> Met:
        return Met(*(x.to(device) for x in self))


class Edge(NamedTuple):
    """Some queries, and columns that some of them see."""

    queries: slice
    columns: slice | Tensor


class Part(NamedTuple):
    """A block of queries, and the columns that they see."""

    queries: slice
    columns: slice | Tensor  # that some of them see
    run: slice  # a stretch of those, that all of them see in every row; it may be empty
    edges: Sequence[Edge]  # the others, for a few of the queries each; none without a run


@dataclass(frozen=True)
class Sight:
    """A mask by its rule, as `visible` has it.

    near: a second window, without sinks. met: what quantization adds to the rule.
    """

    q_pos: Tensor  # (B,T)
    k_pos: Tensor  # (B,S)
    window: int = 0
    sinks: int = 0
    near: int = 0
    met: Met | None = None

    def within(self, near: int) -> Sight:
        """The same where a query sees `near` positions at most, its own included."""
        return replace(self, near=min(near, self.near or near))

    def mask(self, queries: slice = slice(None), columns: slice | Tensor = slice(None)) -> Tensor:
        """The mask of these queries and columns, (B,1,t,s) bool, True = attend."""
        q, k = self.q_pos[:, queries], self.k_pos[:, columns]
        rule = visible(q, k, self.window, self.sinks)
        if self.near:
            rule &= (q[:, :, None] - k[:, None] < self.near)[:, None]
        if self.met is not None:
            rule &= self.met.mask(queries, columns)
        return rule

    @cached_property
    def parts(self) -> Sequence[Part]:
        """All queries, `BLOCK` at a time."""
        return [self._part(queries) for queries in _cut(slice(0, self.q_pos.shape[1]), BLOCK)]

    def _part(self, queries: slice) -> Part:
        some, every = self._seen_by(queries)
        run, edges = _longest(every), []
        if run.stop - run.start < queries.stop - queries.start:
            run = slice(0, 0)  # a second call of attention costs more than the mask
        for few in _cut(queries, EDGE) if run.stop else ():
            columns = self._seen_by(few)[0]
            columns[run] = False
            edges.append(Edge(few, _stretch(columns, self.k_pos.device)))
        return Part(queries, _stretch(some, self.k_pos.device), run, edges)

    def _seen_by(self, queries: slice) -> tuple[Flags, Flags]:
        """Which columns some of the queries see, or a few more, and which all of them see behind
        themselves, or fewer: (S,) bool each."""
        q, k = self.q_pos[:, queries], self.k_pos
        first, last = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
        some = (k <= last) & (k >= first.clamp(max=0))
        # Not even the first query's own: each is to see one of the others.
        every = (k < first) & (k >= 0)
        if self.window:
            sink = (k >= 0) & (k < self.sinks)
            some &= (first - k < self.window) | sink
            every &= (last - k < self.window) | sink
        if self.near:
            some &= first - k < self.near
            every &= last - k < self.near
        if self.met is not None:
            n_quantized = self.met.n_quantized[queries]
            fewest, most = n_quantized.min(), n_quantized.max()
            some &= (self.met.since <= most) & (fewest < self.met.until)
            every &= (self.met.since <= fewest) & (most < self.met.until)
        return some.any(0).cpu().numpy(), every.all(0).cpu().numpy()


def sees(
    q_pos: Tensor, k_pos: Tensor, window: int = 0, sinks: int = 0, met: Met | None = None
) -> Tensor | Sight:
    """What `visible` says, as a mask (B,1,T,S) if that is small."""
    n, n_keys = q_pos.shape[1], k_pos.shape[1]
    sight = Sight(q_pos, k_pos, window, sinks, met=met)
    return sight if n >= LEAST and n * n_keys > LARGE else sight.mask()


def whole(mask: Tensor | Sight | None) -> Tensor | None:
    """The mask as a tensor, however large it is."""
    return mask.mask() if isinstance(mask, Sight) else mask


def _cut(queries: slice, n: int) -> Iterator[slice]:
    """A slice in pieces of at most n."""
    for at in range(queries.start, queries.stop, n):
        yield slice(at, min(at + n, queries.stop))


def _longest(seen: Flags) -> slice:
    """The longest stretch of True in (n,), the first of equals."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8)))
    if not len(ends):
        return slice(0, 0)
    begin, end = ends[0::2], ends[1::2]
    at = int((end - begin).argmax())
    return slice(int(begin[at]), int(end[at]))


def _stretch(seen: Flags, device: torch.device) -> slice | Tensor:
    """Which of (n,) are True: their numbers, or a slice if none is left out."""
    columns = seen.nonzero()[0]
    if len(columns) and columns[-1] - columns[0] + 1 == len(columns):
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return torch.from_numpy(columns).to(device)
