"""Planted bugs of quantized caches: scales, zero points, codes, and what is rounded when."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvtool.core.cache import CacheSpec, Step
from kvtool.core.cache.buffered import BufferedCache
from kvtool.core.cache.quantized import Int4Cache, Int8Cache, Packed, QuantizedCache
from kvtool.core.kernels.masks import visible
from kvtool.core.verify.diagnosis.hypotheses import quantized
from kvtool.core.verify.mutants.mutant import Mutant

KEYS, VALUES = "stored K", "stored V"
ALL = 256  # tokens: more than any scenario feeds


class NoZeroPoint(Packed):
    """Reads codes without adding their zero point."""

    def read(self, n: int) -> Tensor:
        zero_point, self.zero_point = self.zero_point, torch.zeros_like(self.zero_point)
        try:
            return super().read(n)
        finally:
            self.zero_point = zero_point


class ScaleOfAllLevels(Packed):
    """Divides the range by 2**bits, where it has one step less."""

    def read(self, n: int) -> Tensor:
        scale, levels = self.scale, 2**self.bits
        self.scale = scale * (levels - 1) / levels
        try:
            return super().read(n)
        finally:
            self.scale = scale


class ScaleBefore(Packed):
    """An index that counts groups from 1."""

    def read(self, n: int) -> Tensor:
        kept = self.scale, self.zero_point
        self.scale, self.zero_point = (torch.cat([t[:, :, :1], t[:, :, :-1]], dim=2) for t in kept)
        try:
            return super().read(n)
        finally:
            self.scale, self.zero_point = kept


class TokensSwapped(Packed):
    """Reads the two tokens of a byte in the wrong order."""

    def read(self, n: int) -> Tensor:
        codes = self.codes
        self.codes = codes >> 4 | codes << 4
        try:
            return super().read(n)
        finally:
            self.codes = codes


class ByToken(Packed):
    """Keys in the layout of values."""

    def __init__(self, like: Tensor, columns: int, bits: int, dim: int, size: int) -> None:
        super().__init__(like, columns, bits, 3, size)


class RoundsTwice(Packed):
    """What arrives is rounded by token, and when its group is full by channel."""

    def write(self, start: int, x: Tensor, padding: Tensor | None = None) -> None:
        once = ByToken(x[:, :, :1], x.shape[2], self.bits, 3, self.size)
        once.write(0, x)
        super().write(start, once.read(x.shape[2]), padding)


class CountsPadding(Packed):
    """The range of a group counts its padding."""

    def write(self, start: int, x: Tensor, padding: Tensor | None = None) -> None:
        super().write(start, x)


class CodesStay(Packed):
    """Scales follow a reordering of rows, codes do not."""

    def gather(self, rows: Tensor) -> None:
        codes = self.codes[: len(rows)].clone()
        super().gather(rows)
        self.codes = codes


def packing(
    keys: type[Packed], values: type[Packed], base: type[QuantizedCache] = Int4Cache
) -> Any:
    """A small quantized cache that packs keys and values in these ways."""

    class Changed(base):  # type: ignore[misc, valid-type]
        _packed: list[tuple[Packed, Packed]]

        def _allocate(self, batch: int, columns: int) -> None:
            super()._allocate(batch, columns)
            self._packed = [
                (_like(keys, self, k, right_k), _like(values, self, v, right_v))
                for (right_k, right_v), k, v in zip(
                    self._packed, self._keys, self._values, strict=True
                )
            ]

    return small(Changed)


def _like(packed: type[Packed], cache: QuantizedCache, buffer: Tensor, right: Packed) -> Packed:
    """A store of another class with the sizes of one that is right."""
    n = right.codes.shape[2] * right.per_byte
    return packed(buffer[:, :, :1], n, right.bits, right.dim, right.size)


def small(kind: type[QuantizedCache], **changes: int) -> Any:
    """How to make a quantized cache that rounds within a short scenario; `changes` are settings."""
    return partial(kind, **{**kind.small, "slack": 0, **changes})  # type: ignore[arg-type]


class NoResidual(Int8Cache):
    """After the prompt, groups are rounded as soon as they are full."""

    def _allocate(self, batch: int, columns: int) -> None:
        right, self.quantization = self.quantization, replace(self.quantization, residual=0)
        super()._allocate(batch, columns)  # with room for what it rounds too early
        self.quantization = right

    def begin(self, n_new: int) -> Step:
        if self.length:
            self.quantization = replace(self.quantization, residual=0)
        return super().begin(n_new)


class RoundsBeforeReading(Int4Cache):
    """What a step makes full is rounded for all tokens of the step."""

    def _make_step(self, start: int, n_new: int) -> Step:
        step = super()._make_step(start, n_new)
        if n_new == 1:
            return step
        n_quantized, end = self.quantization.n_quantized, start + n_new
        quantized, exact = range(n_quantized(end - 1)), range(n_quantized(start), end)
        met = self.quantization.copy_mask([end - 1] * n_new, quantized, exact)
        return replace(step, mask=visible(step.q_pos, step.k_pos) & met, causal=False)


class CropsBlindly(Int8Cache):
    """Goes back into groups that are rounded, and leaves them so."""

    def crop(self, length: int) -> None:
        BufferedCache.crop(self, length)
        n, first = self.quantization.n_quantized(length), self._first
        if n < first:
            buffers = zip(self._keys, self._values, strict=True)
            for packed, pair in zip(self._packed, buffers, strict=True):
                for part, buffer in zip(packed, pair, strict=True):
                    exact = buffer[:, :, : max(length - first, 0)]
                    held = torch.cat([part.read(first)[:, :, n:length], exact], dim=2)
                    buffer[:, :, : length - n] = held
            self._first = n


class Unbounded(Int8Cache):
    """Its residual is longer than any text."""

    def __init__(self, spec: CacheSpec, left_padding: Tensor | None = None) -> None:
        super().__init__(spec, left_padding, group=4, residual=ALL)


QUANTIZED = (
    Mutant(
        "the zero point is forgotten", packing(NoZeroPoint, NoZeroPoint), step=0, layer=0,
        part=KEYS, hint=quantized.ZeroPointLost.hint,
    ),
    Mutant(
        "a scale of 2**bits steps", packing(ScaleOfAllLevels, ScaleOfAllLevels, Int8Cache),
        model="learned", step=0, layer=0, part=KEYS, hint=quantized.ScaleOfAllLevels.hint,
    ),
    Mutant(
        "scales of the group before", packing(ScaleBefore, ScaleBefore), scenario="growth",
        model="sinusoidal", step=0, layer=0, part=KEYS, hint=quantized.ScaleBefore.hint,
    ),
    Mutant(
        "the tokens of a byte are swapped", packing(TokensSwapped, TokensSwapped),
        model="rotary, one KV head", step=0, layer=0, part=KEYS,
        hint=quantized.TokensSwapped.hint,
    ),
    Mutant(
        "keys rounded by token", packing(ByToken, Packed, Int8Cache), step=0, layer=0, part=KEYS,
        hint=quantized.KeysByToken.hint,
    ),
    Mutant(
        "a group rounded twice", packing(RoundsTwice, Packed), model="seq2seq, rotary",
        scenario="token-by-token", step=6, layer=0, part=KEYS, hint=quantized.RoundedTwice.hint,
    ),
    Mutant(
        "padding counts in the range", packing(CountsPadding, CountsPadding), scenario="padded",
        step=0, layer=0, part=KEYS, hint=quantized.PaddingCounted.hint,
    ),
    Mutant(
        "no residual after the prompt", small(NoResidual), step=2, layer=0, part=KEYS,
        hint=quantized.NoResidual.hint,
    ),
    Mutant(
        "a chunk rounded before reading", small(RoundsBeforeReading), model="learned", step=0,
        layer=0, part=KEYS, hint=quantized.RoundedBeforeRead.hint,
    ),
    Mutant(
        "codes not reordered with beams", packing(CodesStay, CodesStay), scenario="permuted",
        bug_class=17, step=3, layer=0, part=KEYS,
    ),
    Mutant(
        "cropped into a rounded group", small(CropsBlindly), scenario="crop", bug_class=12,
        step=5, layer=0, part=KEYS,
    ),
    Mutant("a quantizer that never quantizes", Unbounded, verdict="vacuous", step=None),
)  # fmt: skip
