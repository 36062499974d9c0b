"""The queries of a long prompt in blocks, so that no mask of all of them need be made.

A prompt's mask has an entry for each pair of tokens: 1 GiB at 32,768, and PyTorch makes numbers of
it, which take four times as much. But what a block of queries attends to are a few ranges of
columns, most of which all of its queries share; only the others need a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Flags = NDArray[np.bool_]

BLOCK = 1024  # queries that attend together
EDGE = 256  # queries of a block that share a mask, where most columns need none


class MaskedPart(NamedTuple):
    """A few queries, and columns that some of them see: attention between these needs a mask."""

    queries: slice
    columns: slice | Tensor


class QueryBlock(NamedTuple):
    """A block of queries, and the columns that they see."""

    queries: slice
    columns: slice | Tensor  # that some of them see
    shared: slice  # those of a range that all of them see in every row; it may be empty
    masked: Sequence[MaskedPart]  # all the others; none if `shared` is empty


def query_blocks(
    n_queries: int, seen_by: Callable[[slice], tuple[Flags, Flags]], device: torch.device
) -> Sequence[QueryBlock]:
    """All queries, `BLOCK` at a time.

    seen_by: which columns some of a range of queries see, and which all of them see before their
    own, (S,) bool each. Columns that are no range become an index tensor on `device`.
    """
    return [_block(queries, seen_by, device) for queries in _cut(slice(0, n_queries), BLOCK)]


def _block(
    queries: slice, seen_by: Callable[[slice], tuple[Flags, Flags]], device: torch.device
) -> QueryBlock:
    some, every = seen_by(queries)
    shared, masked = _longest_range(every), []
    if shared.stop - shared.start < queries.stop - queries.start:
        shared = slice(0, 0)  # a second call of attention costs more than the mask
    for few in _cut(queries, EDGE) if shared.stop else ():
        columns = seen_by(few)[0]
        columns[shared] = False
        masked.append(MaskedPart(few, _indices(columns, device)))
    return QueryBlock(queries, _indices(some, device), shared, masked)


def _cut(queries: slice, n: int) -> Iterator[slice]:
    """A slice in pieces of at most n."""
    for at in range(queries.start, queries.stop, n):
        yield slice(at, min(at + n, queries.stop))


def _longest_range(seen: Flags) -> slice:
    """The longest range of True in (n,), the first of equals."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8)))
    if not len(ends):
        return slice(0, 0)
    begin, end = ends[0::2], ends[1::2]
    at = int((end - begin).argmax())
    return slice(int(begin[at]), int(end[at]))


def _indices(seen: Flags, device: torch.device) -> slice | Tensor:
    """Which of (n,) are True: their numbers, or a slice if none is left out."""
    columns = seen.nonzero()[0]
    if len(columns) and columns[-1] - columns[0] + 1 == len(columns):
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return torch.from_numpy(columns).to(device)
