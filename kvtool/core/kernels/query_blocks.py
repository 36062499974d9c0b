"""The queries of a long prompt in blocks, so that the mask of the whole prompt is never made.

A prompt's mask has one entry for each pair of tokens: 1 GiB for 32,768 tokens. PyTorch converts it
to float32, which takes four times as much. But a block of queries attends to a few ranges of
columns. All of its queries see most of these columns, and only the others need a mask.
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
EDGE = 256  # queries of a block that share the mask of its other columns


class MaskedPart(NamedTuple):
    """A few queries and the columns that some of them see; attention between them needs a mask."""

    queries: slice
    columns: slice | Tensor


class QueryBlock(NamedTuple):
    """A block of queries and the columns that they see."""

    queries: slice
    columns: slice | Tensor  # all columns that some of them see
    shared: slice  # a range of columns that all of them see in every row; it may be empty
    masked: Sequence[MaskedPart]  # all other columns; () if `shared` is empty


def query_blocks(
    n_queries: int, seen_by: Callable[[slice], tuple[Flags, Flags]], device: torch.device
) -> Sequence[QueryBlock]:
    """Divide all queries into blocks of `BLOCK`.

    seen_by: for a range of queries, the columns that some of them see, and the columns before them
    that all see, (S,) bool each. Columns that form no range become an index tensor on `device`.
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
    """Cut a slice into pieces of at most n."""
    for at in range(queries.start, queries.stop, n):
        yield slice(at, min(at + n, queries.stop))


def _longest_range(seen: Flags) -> slice:
    """The longest run of True in (n,), and the first of several."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8)))
    if not len(ends):
        return slice(0, 0)
    begin, end = ends[0::2], ends[1::2]
    at = int((end - begin).argmax())
    return slice(int(begin[at]), int(end[at]))


def _indices(seen: Flags, device: torch.device) -> slice | Tensor:
    """The indices of True in (n,), as a slice if they form a range."""
    columns = seen.nonzero()[0]
    if len(columns) and columns[-1] - columns[0] + 1 == len(columns):
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return torch.from_numpy(columns).to(device)
