"""A cache that grows with the sequence."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kvtool.core import cache_bytes
from kvtool.core.cache.base import CacheSpec
from kvtool.core.cache.buffered import BufferedCache


class DynamicCache(BufferedCache):
    """Starts small and grows by half of its size when it is full, so n tokens cost O(n) copies.

    The DynamicCache of Transformers concatenates at each token, which costs O(n^2) copies.
    """

    kind: ClassVar[str] = "dynamic"

    def _first_columns(self) -> int:
        return min(cache_bytes.GRAIN, self.spec.capacity)

    def _reserve(self, length: int) -> None:
        if length <= self._columns:
            return
        columns = cache_bytes.grown_columns(self._columns, length, self.spec.capacity)
        for buffers in self._stored():
            for layer, old in enumerate(buffers):  # one by one: only one buffer is held twice
                new = old.new_zeros((*old.shape[:2], columns, old.shape[3]))
                new[:, :, : self.length] = old[:, :, : self.length]
                buffers[layer] = new

    def select(self, rows: Tensor) -> None:
        """As Cache.select, by copies of the rows."""
        super().select(rows)
        self._gather_rows(rows)

    @classmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        """As Cache.predict_nbytes."""
        held = cache_bytes.dynamic(spec.kept, spec.batch, spec.capacity, length, prompt)
        return spec.n_layers * held.allocated


DynamicCache.freeze_methods("_device_step", "_reach")
