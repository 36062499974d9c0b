"""Attention of a few queries in native code, each computed alone, over the columns that it sees."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvtool.core.native import arrays as native
from kvtool.core.native.arrays import Array


def can_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether `attention` can compute this call; shapes as `Kernels.attention`."""
    sizes = k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]
    masked = mask is None or (
        mask.dtype is torch.bool and (mask.shape[1], mask.shape[3]) == (1, k.shape[2])
    )
    if not (sizes and masked and q.numel() and k.numel()):
        return False
    if q.dtype in native.HALVES and k.dtype is torch.float32:  # what a cache had rounded
        return native.can_read(q) and native.numpy_can_read(k, v)
    return native.can_read(q, k, v)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """`Kernels.attention`, computed for each query alone, over the keys that it sees in order.

    Ask `can_attend` first.
    """
    batch, _, n_queries, _ = q.shape
    queries, n_keys = native.computed(q.transpose(1, 2)), k.shape[2]  # (B,T,H,D)
    y, read = np.empty_like(queries), (Stored.of(k), Stored.of(v))
    if mask is None:
        spans = np.zeros((batch, n_queries, 2), np.int64)
        spans[:, :, 1] = np.arange(1, n_queries + 1) if causal else n_keys
        _attend(queries, read, spans, y)
    else:
        _attend_seen(queries, read, mask[:, 0].expand(batch, n_queries, n_keys).numpy(), y)
    return torch.from_numpy(y).transpose(1, 2).to(q.dtype)


def _attend_seen(q: Array, read: tuple[Stored, Stored], seen: Array, y: Array) -> None:
    """`_attend` over the columns that are True in `seen` (B,T,S)."""
    spans = two_spans_of(seen)
    if spans is not None:
        _attend(q, read, spans, y)
        return
    k, v = read
    for row, i in np.ndindex(*seen.shape[:2]):
        columns = seen[row, i].nonzero()[0]
        native.loaded().attend_columns(
            q[row, i], row, k.tensor.shape[1], k.layout, v.layout, columns, y[row, i]
        )


def two_spans_of(seen: Array) -> Array | None:
    """Begin and end of up to two runs of True in each (...,n) -> (...,4); None if one has more.

    The last run comes first, then the run before it, or 0, 0 if there is none.
    """
    flags = np.zeros((*seen.shape[:-1], seen.shape[-1] + 2), bool)
    flags[..., 1:-1] = seen
    begins, ends = flags[..., 1:] & ~flags[..., :-1], flags[..., :-1] & ~flags[..., 1:]
    if (begins.sum(-1) > 2).any():
        return None
    whole = np.zeros((*seen.shape[:-1], 4), np.int64)
    last, n = begins.shape[-1] - 1, begins.sum(-1)
    whole[..., 0] = np.where(n > 0, last - begins[..., ::-1].argmax(-1), 0)
    whole[..., 1] = np.where(n > 0, last - ends[..., ::-1].argmax(-1), 0)
    whole[..., 2] = np.where(n > 1, begins.argmax(-1), 0)
    whole[..., 3] = np.where(n > 1, ends.argmax(-1), 0)
    return whole


def spans_of(seen: Array) -> Array | None:
    """Begin and end of the run of True in each (...,n) -> (...,2); None if one has several runs."""
    if not seen.shape[-1]:
        return np.zeros((*seen.shape[:-1], 2), np.int64)
    n, first = seen.sum(-1), seen.argmax(-1)
    last = seen.shape[-1] - seen[..., ::-1].argmax(-1)
    if ((last - first != n) & (n > 0)).any():
        return None
    return np.stack([first, first + n], axis=-1)


def _attend(q: Array, read: tuple[Stored, Stored], spans: Array, y: Array) -> None:
    """Attention of queries q (B,T,H,D) over the columns of `spans` (B,T,2 or 4) -> y (B,T,H,D).

    A query reads columns spans[...,2] to spans[...,3], if given, then spans[...,0] to spans[...,1].
    """
    k, v = read
    batch, n_queries, n_heads, width = q.shape
    flat = batch * n_queries, n_heads, width
    n_groups = k.tensor.shape[1]
    with_sinks = np.zeros((batch * n_queries, 4), np.int64)  # none
    with_sinks[:, : spans.shape[-1]] = spans.reshape(batch * n_queries, -1)
    n_seen = int((with_sinks[:, 1::2] - with_sinks[:, ::2]).sum())
    threads = native.threads_for(2 * n_groups * width * n_seen)
    native.loaded().attend(
        q.reshape(flat), n_queries, n_groups, k.layout, v.layout, with_sinks, y.reshape(flat),
        threads, native.MIN_SHARED,
    )  # fmt: skip


class Stored(NamedTuple):
    """Keys or values (B,G,S,D) and their layout in memory."""

    tensor: Tensor  # keeps the memory alive
    # Address, bytes to the next row, columns of a head, an empty array of the same type, no codes.
    layout: tuple[int, int, int, Array, Array]

    @classmethod
    def of(cls, x: Tensor) -> Stored:
        """The layout of a tensor, which is copied only if a head's columns are not contiguous."""
        n, width = x.shape[2:]
        if x.stride()[2:] != (width, 1) or x.stride(1) % width or x.stride(1) < n * width:
            x = x.contiguous()
        at = x.data_ptr(), x.stride(0) * x.itemsize, x.stride(1) // width
        return cls(x, (*at, native.kind_of(x.dtype), native.NO_CODES))
