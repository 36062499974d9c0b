"""Caches that store old keys and values in a few bits, and the newest exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvtool.config import check_int
from kvtool.core import cache_bytes
from kvtool.core.cache.base import Bytes, CacheSpec, Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.direct_access import StepAddresses
from kvtool.core.cache.packed import PACKED_METHODS, Packed, packed_methods
from kvtool.core.cache.quantization import Quantization
from kvtool.core.kernels.masks import make_mask
from kvtool.core.native import coded as native
from kvtool.core.native.arrays import Array
from kvtool.core.native.coded import EXACT, LENGTH
from kvtool.errors import CacheOpUnsupported, UsageError


class QuantizedCache(BufferedCache):
    """Quantizes a group of tokens when `residual` newer ones are there (KIVI, Liu 2024).

    Keys are quantized by channel over `group` tokens, and values by token over channels, as
    `Quantization` says (arXiv 2402.02750). What a token reads depends only on its number. In a step
    of many tokens the first may read a key exactly, and the last quantized. `write` returns both
    copies of such a key, and the mask says which of them a query reads.

        group=2, residual=1, Q quantized and . exact; the token that comes next reads
        0 -> [.]   1 -> [. .]   2 -> [. . .]   3 -> [Q Q . .]   4 -> [Q Q . . .]

    Codes are in `_packed` from column 0 on. Exact tokens are in `_keys` and `_values` from token
    number `_first` on. A token is rounded once, from its exact value, together with its group. So
    what is stored does not depend on the steps. The range of a group ignores padding. But padding
    shifts where groups begin, so a text is rounded differently after other padding.

    Quantized tokens cannot be made exact again. So after a crop, `residual` tokens must remain
    behind the quantized ones. With `slack`, the last tokens are also stored exactly beside their
    codes, so that the last `slack` tokens can always be cropped.
    """

    exact: ClassVar[bool] = False
    small: ClassVar[Mapping[str, int]] = {"group": 4, "residual": 2, "slack": 4}
    bits: ClassVar[int]
    quantization: Quantization
    _packed: list[tuple[Packed, Packed]]  # keys and values of each layer
    _known_codes: tuple[Any, Array] | None = None  # those of the last step, and `_coded` of them

    def __init__(
        self,
        spec: CacheSpec,
        left_padding: Tensor | None = None,
        group: int = cache_bytes.GROUP,
        residual: int = cache_bytes.RESIDUAL,
        slack: int = 0,
    ) -> None:
        """An empty cache. Raises UsageError for a group that does not fill whole bytes, and for a
        negative residual or slack."""
        check_int("group", group, 1)
        check_int("residual", residual, 0)
        check_int("slack", slack, 0)
        if group * self.bits % 8:
            raise UsageError(f"group: {group} tokens of {self.bits} bits do not fill bytes")
        self.slack = slack
        self.quantization = Quantization(self.bits, group, residual)
        super().__init__(spec.apart(), left_padding)  # keys and values are rounded in two ways

    def _first_columns(self) -> int:
        q = self.quantization
        return cache_bytes.exact_columns(self.spec.capacity, q.group, q.residual, self.slack)

    def _allocate(self, batch: int, columns: int) -> None:
        super()._allocate(batch, columns)
        q, n = self.quantization, self.quantization.n_quantized(self.spec.capacity)
        channels = q.channels(self.spec.head_dim)
        self._packed = [
            (
                Packed(k[:, :, :1], n, q.bits, 2, q.group),
                Packed(v[:, :, :1], n, q.bits, 3, channels),
            )
            for k, v in zip(self._keys, self._values, strict=True)
        ]

    def reset(self, left_padding: Tensor | None = None) -> None:
        """As Cache.reset."""
        super().reset(left_padding)
        self._first = 0  # the number of the first token that is stored exactly
        self._longest = 0  # the most tokens that were committed
        self._set_aside: list[tuple[Tensor, Tensor]] = []  # (buffer, the exact tokens from _first)
        self._direct: native.Exact | None = None  # if compiled code does the step: its exact tokens

    def _make_step(self, start: int, n_new: int) -> Step:
        self._set_aside, self._direct = [], None
        end, n_quantized = start + n_new, self.quantization.n_quantized
        # Quantized for the first and for the last new token; keys between are returned twice.
        n_first, n_last = n_quantized(start), n_quantized(end - 1)
        k_pos = torch.cat([self._positions(0, n_last), self._positions(n_first, end)], dim=1)
        q_pos = k_pos[:, -n_new:]
        causal = start == 0 and not n_last and self.left_padding is None
        all_seen = n_new == 1 and self.left_padding is None
        mask = None
        if not (causal or all_seen):
            copies = self.quantization.copy_rule(
                range(start, end), range(n_last), range(n_first, end)
            )
            mask = make_mask(q_pos, k_pos, copies=copies.to(self.spec.device))
        slots = torch.arange(start, end, device=self.spec.device) - self._first
        return Step(q_pos, k_pos, slots, mask, causal, self.spec.kernels)

    def step_addresses(self, n_new: int) -> StepAddresses | None:
        """None too if tokens of the step find different ones quantized, or are set aside."""
        if not self._is_unpatched() or packed_methods(Packed) != PACKED_METHODS:
            return None
        start, n_quantized = self.make_room(n_new), self.quantization.n_quantized
        n = n_quantized(start)
        if n_quantized(start + n_new - 1) > n:
            return None
        self._set_aside, self._direct = [], None
        exact = self._addresses_from(start, n_new, start - self._first, self._padding())
        if exact is None or not n_quantized(start + n_new):
            return exact
        coded = self._coded()
        if coded is None:
            return None
        coded[:, :, LENGTH], coded[:, :, EXACT] = n, n - self._first
        s, (columns, padding) = self.spec, (exact.columns, exact.padding)
        sizes = s.n_kv_heads, s.head_dim, s.dtype
        self._direct = native.Exact(exact.addresses, columns, padding, *sizes)
        return exact._replace(coded=coded)

    def _coded(self) -> Array | None:
        """All codes (2,layers,9) as in StepAddresses; None if compiled code cannot read them."""
        tensors = [t for pair in self._packed for part in pair for t in part.tensors]
        layout = [(t.data_ptr(), t.dtype, t.shape) for t in tensors]
        if self._known_codes is None or layout != self._known_codes[0]:
            like = self._keys[0][:, :, 0]
            found = [
                [part.facts(like) for part in side] for side in zip(*self._packed, strict=True)
            ]
            if any(None in side for side in found):
                return None
            self._known_codes = layout, np.array(found)
        return self._known_codes[1]

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """As Cache.write; quantizes groups that become full."""
        end, n_quantized = self.length + k.shape[2], self.quantization.n_quantized
        # Quantized for the first new token, for the last one, and after the step.
        n_first, n_last, n_full = (n_quantized(n) for n in (self.length, end - 1, end))
        padding = None if self.left_padding is None else self._positions(n_first, n_full) < 0
        buffers = self._keys[layer], self._values[layer]
        found = []
        for buffer, packed, new in zip(buffers, self._packed[layer], (k, v), strict=True):
            exact = self._store_exact(buffer, new, step)[:, :, n_first - self._first :]
            if n_full > n_first:  # into columns that no step reads before the commit
                packed.write(n_first, exact[:, :, : n_full - n_first], padding)
            found.append(torch.cat([packed.read(n_last), exact], dim=2) if n_last else exact)
        return found[0], found[1]

    def _store_exact(self, buffer: Tensor, new: Tensor, step: Step) -> Tensor:
        """Store new tokens -> all exact tokens from `_first` on; set aside if they do not fit."""
        held = self.length - self._first
        end = held + new.shape[2]
        if end <= self._columns:
            return buffer.index_copy_(2, step.slots, new)[:, :, :end]
        whole = torch.cat([buffer[:, :, :held], new], dim=2)
        self._set_aside.append((buffer, whole))
        return whole

    def commit(self, n_new: int) -> None:
        """As Cache.commit; forgets the exact copies of quantized tokens, except for `slack`."""
        super().commit(n_new)
        direct, self._direct = self._direct, None
        self._longest = max(self._longest, self.length)
        n_quantized = self.quantization.n_quantized
        first = max(self._first, n_quantized(max(self.length - self.slack, 0)))
        n, n_full = n_quantized(self.length - n_new), n_quantized(self.length)
        if direct and self._known_codes and n_full > n:  # `write` has not done it
            native.round_groups(direct, n - self._first, n, n_full - n, self._known_codes[1])
        if direct and first > self._first:
            native.move_columns(direct, first - self._first, self.length - first)
        elif self._set_aside or first > self._first:
            self._move(first)
        self._first = first
        self._set_aside = []

    def _move(self, first: int) -> None:
        """Let the buffers begin with token `first`."""
        contents = self._set_aside or [(b, b) for b in (*self._keys, *self._values)]
        tokens = slice(first - self._first, self.length - self._first)
        # Nothing is allocated after a token has moved: if memory runs out, all is as before.
        moved = torch.empty_like(contents[0][1][:, :, tokens])
        for buffer, content in contents:
            moved.copy_(content[:, :, tokens])  # the two may overlap
            buffer[:, :, : moved.shape[2]] = moved

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises UsageError if it holds fewer, and CacheOpUnsupported if the next token would need an
        exact token that is stored only quantized.
        """
        if 0 <= length < self.length:
            needed = self.quantization.n_quantized(length)
            if needed < min(self._first, length):
                raise CacheOpUnsupported(
                    self.kind,
                    f"crop to {length}",
                    f"it needs token {needed} exactly, and holds those before {self._first} "
                    "quantized",
                    f"Make it with slack={self._longest - length}, or crop before that is rounded.",
                )
        super().crop(length)
        self._set_aside, self._direct = [], None
        self._first = min(self._first, length)

    def select(self, rows: Tensor) -> None:
        """As Cache.select, by copies of the rows."""
        super().select(rows)
        self._set_aside, self._direct = [], None
        self._gather_rows(rows)
        for packed in (part for pair in self._packed for part in pair):
            packed.gather(rows)

    def vacuous(self) -> str | None:
        """As Cache.vacuous: a check in which no token read a quantized one."""
        padding = 0 if self.left_padding is None else int(self.left_padding.min())
        n_read = self.quantization.n_quantized(max(self._longest - 1, 0))  # by the last token
        if n_read > padding:
            return None
        return f"no token met a quantized one ({self._longest} tokens held at most)"

    def snapshot(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """As Cache.snapshot; quantized tokens are dequantized."""
        n = self.quantization.n_quantized(self.length)
        exact = slice(n - self._first, self.length - self._first)
        buffers = self._keys[layer], self._values[layer]
        keys, values = (
            torch.cat([packed.read(n), buffer[:, :, exact]], dim=2) if n else buffer[:, :, exact]
            for packed, buffer in zip(self._packed[layer], buffers, strict=True)
        )
        return keys.clone(), values.clone(), self._positions(0, self.length).clone()

    def nbytes(self) -> Bytes:
        """As Cache.nbytes; scales and zero points count."""
        q, token = self.quantization, self.spec.token_nbytes // self.spec.batch  # of one row
        n = q.n_quantized(self.length)
        codes = self.spec.n_layers * cache_bytes.packed(self.spec.kept, n, q.bits, q.group)
        packed = [t for pair in self._packed for part in pair for t in part.tensors]
        buffers = [*self._keys, *self._values, *packed, *(whole for _, whole in self._set_aside)]
        allocated = sum(t.untyped_storage().nbytes() for t in buffers) + self._padding_nbytes()
        live = codes + (self.length - n) * token
        return Bytes(allocated, live * self.batch, (live + token) * self.batch)

    @classmethod
    def predict_nbytes(
        cls,
        spec: CacheSpec,
        length: int,
        prompt: int = 1,
        group: int = cache_bytes.GROUP,
        residual: int = cache_bytes.RESIDUAL,
        slack: int = 0,
    ) -> int:
        """As Cache.predict_nbytes: all is allocated at once, whatever `length` is."""
        sizes, settings = (spec.batch, spec.capacity, length, prompt), (group, residual, slack)
        held = cache_bytes.quantized(cls.bits, spec.kept, *sizes, *settings)
        return spec.n_layers * held.allocated


class Int8Cache(QuantizedCache):
    """Codes of 8 bits."""

    kind: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


Int8Cache.freeze_methods()


class Int4Cache(QuantizedCache):
    """Codes of 4 bits, two to a byte."""

    kind: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


Int4Cache.freeze_methods()
