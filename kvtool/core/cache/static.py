"""A cache that is allocated once at full size, and never moves."""

from __future__ import annotations

from itertools import chain
from typing import ClassVar

from torch import Tensor

from kvtool.core import cache_bytes
from kvtool.core.cache.base import CacheSpec, Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.direct_access import GraphStep
from kvtool.errors import CacheOpUnsupported


class StaticCache(BufferedCache):
    """Allocates all memory at the start, at fixed addresses, so that a captured step can be reused.

    Attention reads whole blocks of `block` columns, and a mask hides those after the last token. So
    shapes change once in `block` tokens. With `block = capacity` they never change.
    """

    kind: ClassVar[str] = "static"
    compilable: ClassVar[bool] = True

    def __init__(
        self, spec: CacheSpec, left_padding: Tensor | None = None, block: int = 64
    ) -> None:
        self.block = block
        super().__init__(spec, left_padding)

    def _reach(self, length: int) -> int:
        return min(cache_bytes.round_up(length, self.block), self.spec.capacity)

    def select(self, rows: Tensor) -> None:
        """As Cache.select, in place. Raises CacheOpUnsupported for more rows than in the spec."""
        if rows.shape[0] > self.spec.batch:
            raise CacheOpUnsupported(
                self.kind,
                f"select {rows.shape[0]} rows",
                f"it was allocated for {self.spec.batch}",
                f"Make it with batch={rows.shape[0]}.",
            )
        super().select(rows)
        for buffer in chain(*self._stored()):
            filled = buffer[:, :, : self.length]
            filled[: self.batch] = filled.index_select(0, rows)  # index_select copies: rows overlap

    def graph_step(self) -> GraphStep | None:
        """As DirectAccess.graph_step; the only table is the padding, if there is any."""
        if not self.length or not self._is_unpatched():
            return None
        start, memory = self.make_room(1), [*chain(*self._stored())]
        self._begun = 1
        return GraphStep(start, self._padding_table(), (self._reach(start + 1),), memory)

    def step_at(
        self, start: Tensor, tables: tuple[Tensor, ...], form: tuple[int | None, ...]
    ) -> Step:
        """As DirectAccess.step_at."""
        (reach,), padding = form, tables[0] if tables else None
        assert reach is not None
        return self._device_step(start, padding, reach)

    @classmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        """As Cache.predict_nbytes: the whole capacity, whatever `length` is."""
        return (
            spec.n_layers
            * cache_bytes.static(spec.kept, spec.batch, spec.capacity, length).allocated
        )


StaticCache.freeze_methods("_device_step", "_reach")
