"""Keys and values of an encoded source, projected once and read by every decoding step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvtool.core.kernels import Kernels


@dataclass
class CrossCache:
    """Filled once per source by `Seq2Seq.encode`; decoding never lengthens it.

    layers: k, v (B,Hkv,S,D) for each decoder layer; mask (B,S) bool, True = a real source token.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor

    def attend(self, layer: int, q: Tensor, kernels: Kernels) -> Tensor:
        """q (B,H,T,D) -> (B,H,T,D)"""
        k, v = self.layers[layer]
        return kernels.attention(q, k, v, self.mask[:, None, None, :], False)

    def select(self, rows: Tensor) -> CrossCache:
        """The sources of `rows` (n,), in that order; repeats are allowed."""
        layers = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.layers]
        return CrossCache(layers, self.mask.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        storages = (t.untyped_storage() for pair in self.layers for t in pair)
        # Keys and values are halves of one projection, and share its memory.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
