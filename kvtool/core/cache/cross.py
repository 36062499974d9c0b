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
from kvtool.core.native import few_queries
from kvtool.core.native.arrays import Array


class SourceAddresses(NamedTuple):
    """The memory of a source's keys and values, and the columns that each row sees."""

    addresses: Array  # (2,layers) of keys and values, (B,Hkv,columns,D)
    columns: int
    seen: Array  # (B,2) the first column that a row sees, and the one after the last


@dataclass
class CrossCache:
    """The keys and values of encoded sources for cross-attention, made once by `Seq2Seq.encode`.

    layers: k, v (B,Hkv,S,D) of each decoder layer. mask (B,S) bool, True = a real source token.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor

    def __post_init__(self) -> None:
        if not torch.is_grad_enabled():  # strided halves of a projection: each step would copy them
            self.layers = [(k.contiguous(), v.contiguous()) for k, v in self.layers]

    def attend(self, layer: int, q: Tensor, kernels: Kernels) -> Tensor:
        """Attend to the source with q (B,H,T,D) -> (B,H,T,D)."""
        k, v = self.layers[layer]
        return kernels.attention(q, k, v, self.mask[:, None, None, :], False)

    def step_addresses(self, spec: CacheSpec, batch: int) -> SourceAddresses | None:
        """The addresses for compiled code.

        None if the source does not fit `batch` rows of a cache with that spec, or if the real
        tokens of a row are not one range of columns.
        """
        mask, pairs = self.mask, self.layers
        if not self._is_unpatched() or len(pairs) != spec.n_layers:
            return None
        if mask.dtype is not torch.bool or len(mask) != batch or not mask.is_cpu:
            return None
        shape = batch, spec.n_kv_heads, mask.shape[1], spec.head_dim
        keys, values = zip(*pairs, strict=True)
        addresses = buffer_addresses(keys, values, shape, spec.dtype)
        seen = few_queries.spans_of(mask.numpy())
        if addresses is None or seen is None:
            return None
        return SourceAddresses(addresses, mask.shape[1], seen)

    def memory(self) -> list[Tensor] | None:
        """All tensors that `attend` reads; None if `attend` has been replaced."""
        return [self.mask, *chain(*self.layers)] if self._is_unpatched() else None

    def _is_unpatched(self) -> bool:
        ours = type(self) is CrossCache and CrossCache.attend is ATTEND
        return ours and "attend" not in vars(self)

    def select(self, rows: Tensor) -> CrossCache:
        """A copy with the sources of `rows` (n,), in that order; a row may be taken repeatedly."""
        layers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers]
        return CrossCache(layers, self.mask.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes of the memory of all keys and values."""
        storages = (t.untyped_storage() for pair in self.layers for t in pair)
        # With gradients, keys and values are halves of one projection and share its memory.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


ATTEND = CrossCache.attend  # to notice that it has been patched
