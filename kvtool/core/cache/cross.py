"""Keys and values of an encoded source, projected once and read by every decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.cache.base import CacheSpec
from kvtool.core.cache.direct_access import buffer_addresses
from kvtool.core.kernels.default import Kernels
from kvtool.core.native import arrays as native
from kvtool.core.native.arrays import Array


class SourceAddresses(NamedTuple):
    """Where a source's keys and values are, and which columns each row sees."""

    addresses: Array  # (2,layers) of keys and values, (B,Hkv,columns,D)
    columns: int
    seen: Array  # (B,2) the first column and the one after the last


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

    def step_addresses(self, spec: CacheSpec, batch: int) -> SourceAddresses | None:
        """For compiled code; None if this is not a source for `batch` rows of a cache with that
        spec, or if the columns that a row sees are not one range."""
        mask, pairs = self.mask, self.layers
        if not self._is_unpatched() or len(pairs) != spec.n_layers:
            return None
        if mask.dtype is not torch.bool or len(mask) != batch or not mask.is_cpu:
            return None
        shape = batch, spec.n_kv_heads, mask.shape[1], spec.head_dim
        keys, values = zip(*pairs, strict=True)
        addresses = buffer_addresses(keys, values, shape, spec.dtype)
        seen = native.spans_of(mask.numpy())
        if addresses is None or seen is None:
            return None
        return SourceAddresses(addresses, mask.shape[1], seen)

    def memory(self) -> list[Tensor] | None:
        """All tensors that `attend` reads; None if that is another method than ours."""
        return [self.mask, *chain(*self.layers)] if self._is_unpatched() else None

    def _is_unpatched(self) -> bool:
        ours = type(self) is CrossCache and CrossCache.attend is ATTEND
        return ours and "attend" not in vars(self)

    def select(self, rows: Tensor) -> CrossCache:
        """The sources of `rows` (n,), in that order; repeats are allowed."""
        layers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers]
        return CrossCache(layers, self.mask.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        storages = (t.untyped_storage() for pair in self.layers for t in pair)
        # Where gradients are wanted they are halves of one projection, and share its memory.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


ATTEND = CrossCache.attend  # a patch of it is not passed over
