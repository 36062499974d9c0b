"""No cache: every step computes the whole sequence again. It is the reference for all kinds."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kvtool.core.cache.base import Bytes, Cache, CacheSpec, Step
from kvtool.core.kernels.masks import make_mask
from kvtool.errors import CacheOpUnsupported


class NoCache(Cache):
    """Stores only the number of tokens; each step must bring the whole sequence."""

    kind: ClassVar[str] = "none"
    stores: ClassVar[bool] = False
    recompute: ClassVar[bool] = True

    def _make_step(self, start: int, n_new: int) -> Step:
        pos = self._positions(start, start + n_new)
        slots = pos[0] if self.left_padding is None else pos[0] + self.left_padding[0]
        mask = None if self.left_padding is None else make_mask(pos, pos)
        return Step(pos, pos, slots, mask, mask is None, self.spec.kernels)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """k, v (B,Hkv,T,D) as they are: the step has the whole sequence."""
        return k, v

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Raises CacheOpUnsupported: there is nothing to copy."""
        raise CacheOpUnsupported(
            self.kind, "show its keys and values", "it stores none", "Use --cache dynamic."
        )

    def nbytes(self) -> Bytes:
        """As Cache.nbytes: only the counts of left padding."""
        return Bytes(self._padding_nbytes(), 0, 0)

    @classmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        """0 bytes of keys and values."""
        return 0
