"""Keys and values of an encoded source, projected once and read by every decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvtool.core import native
from kvtool.core.kernels import Kernels
from kvtool.core.native import Array


class InPlaceSource(NamedTuple):
    """Where a source's keys and values are, and which of them each row sees."""

    addresses: Array  # (layers,2) of keys and values, (B,Hkv,columns,D)
    columns: int
    seen: Array  # (B,2) the first column and the one behind the last


@dataclass
class CrossCache:
    """Filled once per source by `Seq2Seq.encode`; decoding never lengthens it.

    layers: k, v (B,Hkv,S,D) for each decoder layer; mask (B,S) bool, True = a real source token.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor

    def __post_init__(self) -> None:
        if not torch.is_grad_enabled():  # halves of a projection, which every step would gather
            self.layers = [(k.contiguous(), v.contiguous()) for k, v in self.layers]

    def attend(self, layer: int, q: Tensor, kernels: Kernels) -> Tensor:
        """q (B,H,T,D) -> (B,H,T,D)"""
        k, v = self.layers[layer]
        return kernels.attention(q, k, v, self.mask[:, None, None, :], False)

    def in_place(self) -> InPlaceSource | None:
        """For code that reads memory itself; None if keys and values or what a row sees of them
        do not stand side by side."""
        pairs, seen = self.layers, native.spans_of(self.mask.numpy())
        first = pairs[0][0]
        dense = all(x.is_contiguous() and x.shape == first.shape for kv in pairs for x in kv)
        if seen is None or not dense:
            return None
        addresses = np.array([(k.data_ptr(), v.data_ptr()) for k, v in pairs])
        return InPlaceSource(addresses, first.shape[2], seen)

    def select(self, rows: Tensor) -> CrossCache:
        """The sources of `rows` (n,), in that order; repeats are allowed."""
        layers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers]
        return CrossCache(layers, self.mask.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        storages = (t.untyped_storage() for pair in self.layers for t in pair)
        # Keys and values are halves of one projection, and share its memory.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
