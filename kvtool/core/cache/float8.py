"""A cache in 8 bits of floating point, e4m3, with a scale for each token and head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvtool.core import cache_bytes
from kvtool.core.cache.base import Bytes, CacheSpec, Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.direct_access import StepAddresses, is_readable, no_sinks
from kvtool.core.cache.quantization import Float8
from kvtool.core.native.arrays import Array
from kvtool.core.native.coded import EXACT, FLOATS, LENGTH, Coded

CODES = torch.float8_e4m3fn  # kept as bytes: PyTorch indexes few tensors of this type


class Float8Cache(BufferedCache):
    """Rounds every key and value to e4m3 (Micikevicius 2022, arXiv 2209.05433) when it is written,
    so that all tokens meet it rounded, its own included: as vLLM's `fp8_per_token_head` does.

    A token's scale in a head is the power of two that `Float8` says: nothing else decides what is
    stored. Codes are in `_keys` and `_values`, one byte a number, in columns 0, 1, 2 ...
    """

    kind: ClassVar[str] = "fp8"
    exact: ClassVar[bool] = False
    small: ClassVar[Mapping[str, int]] = {}
    quantization = Float8()
    _scales: list[tuple[Tensor, Tensor]]  # of each layer's keys and values (rows,Hkv,columns,1)
    _known_codes: tuple[Any, Array] | None = None  # those of the last step, and `_coded` of them

    def _allocate(self, batch: int, columns: int) -> None:
        s = self.spec
        shape = (batch, s.n_kv_heads, columns, s.head_dim)

        def codes() -> list[Tensor]:
            return [
                torch.zeros(shape, dtype=torch.uint8, device=s.device) for _ in range(s.n_layers)
            ]

        def scale() -> Tensor:
            return torch.zeros((*shape[:3], 1), dtype=s.dtype, device=s.device)

        self._keys = codes()
        self._values = self._keys if s.shared else codes()
        self._scales = [self._pair(scale) for _ in range(s.n_layers)]

    def _pair(self, *made: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The scales of keys and of values, which are one where values are shared."""
        first = made[0]()
        return first, first if self.spec.shared else made[-1]()

    def _gather_rows(self, rows: Tensor) -> None:
        super()._gather_rows(rows)
        self._scales = [
            self._pair(partial(k.index_select, 0, rows), partial(v.index_select, 0, rows))
            for k, v in self._scales
        ]

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self._gather_rows(rows)

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        buffers, reach = (self._keys[layer], self._values[layer]), step.k_pos.shape[1]
        found = []
        for codes, scales, new in zip(buffers, self._scales[layer], (k, v), strict=True):
            scale = Float8.scale(new)
            codes.index_copy_(2, step.slots, (new / scale).float().to(CODES).view(torch.uint8))
            scales.index_copy_(2, step.slots, scale)
            found.append(_read(codes[:, :, :reach], scales[:, :, :reach]))
        return found[0], found[1]

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """Of codes alone, among which compiled code stores the new ones."""
        padding = self._padding()
        if padding is None or not self._is_unpatched():
            return None
        start, coded = self.make_room(n_new), self._coded()
        if coded is None:
            return None
        coded[:, :, LENGTH] = coded[:, :, EXACT] = start + n_new
        self._begun = n_new
        nowhere = np.zeros((2, self.spec.n_layers), np.int64)
        sinks = no_sinks(self.batch)
        return StepAddresses(start, padding, nowhere, self._columns, start, 0, sinks, coded)

    def _coded(self) -> Array | None:
        """All codes (2,layers,9) as in StepAddresses; None if compiled code cannot read them."""
        s, (k_scales, v_scales) = self.spec, zip(*self._scales, strict=True)
        codes, scales = [*self._keys, *self._values], [*k_scales, *v_scales]
        tensors = list(zip(codes, scales, strict=True))
        layout = [(t.data_ptr(), t.dtype, t.shape) for pair in tensors for t in pair]
        if self._known_codes is None or layout != self._known_codes[0]:
            shape, columns = (self.batch, s.n_kv_heads, self._columns), self._columns
            for code, scale in tensors:
                fits = code.shape == (*shape, s.head_dim) and scale.shape == (*shape, 1)
                kinds = code.dtype is torch.uint8 and scale.dtype is s.dtype
                if not (fits and kinds and is_readable(code) and is_readable(scale)):
                    return None
            sizes = columns, FLOATS, 1, s.head_dim, 0
            addresses = [(c.data_ptr(), scale.data_ptr()) for c, scale in tensors]
            found = [Coded(code, scale, scale, 0, *sizes) for code, scale in addresses]
            self._known_codes = layout, np.array(found).reshape(2, s.n_layers, -1)
        return self._known_codes[1]

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        pairs = zip((self._keys[layer], self._values[layer]), self._scales[layer], strict=True)
        k, v = (_read(c[:, :, : self.length], s[:, :, : self.length]) for c, s in pairs)
        return k, v, self._positions(0, self.length).clone()

    def nbytes(self) -> Bytes:
        scales = [t for pair in self._scales for t in pair[: 1 if self.spec.shared else 2]]
        codes = [t for buffers in self._stored() for t in buffers]
        storages = [t.untyped_storage().nbytes() for t in (*codes, *scales)]
        token = self.spec.n_layers * self.batch * cache_bytes.float8_token(self.spec.kept)
        allocated = sum(storages) + self._padding_nbytes()
        return Bytes(allocated, self.length * token, (self.length + 1) * token)

    @classmethod
    def predict_nbytes(cls, spec: CacheSpec, length: int, prompt: int = 1) -> int:
        return (
            spec.n_layers
            * cache_bytes.float8(spec.kept, spec.batch, spec.capacity, length).allocated
        )


Float8Cache.freeze_methods()


def _read(codes: Tensor, scale: Tensor) -> Tensor:
    """Numbers in the format of the scale, which has all that e4m3 has times a power of two."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (codes.view(CODES).to(wide) * scale).to(scale.dtype)
