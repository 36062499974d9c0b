"""How a quantized cache rounds keys and values, and which queries read the rounded ones.

This file has only the mathematics, for a pass over whole sequences without a cache. The cache in
core/cache/quantized.py stores packed codes, and must give the same values.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvtool.core import cache_bytes
from kvtool.core.kernels.masks import CopyRule


class Codes(NamedTuple):
    """Quantized values: value = code * scale + zero_point, all in float32 or wider."""

    codes: Tensor  # whole numbers from 0 on
    scale: Tensor
    zero_point: Tensor  # the value of code 0

    def dequantized(self) -> Tensor:
        """The values again, in the format of the scales."""
        return self.codes * self.scale + self.zero_point


@dataclass(frozen=True)
class Quantization:
    """Asymmetric quantization to codes of `bits` bits, as in KIVI (Liu 2024, arXiv 2402.02750).

    Keys are quantized by channel: each channel of `group` consecutive tokens has one scale and zero
    point. Values are quantized by token: each `group` channels of a token have one, or the whole
    head if `group` does not divide it.

    A token with n tokens before it in its row, padding included, reads the first `n_quantized(n)`
    of them quantized, and the rest and itself exactly. So what it reads depends only on n, never on
    the steps in which a cache was filled.
    """

    in_place: ClassVar[bool] = False  # tokens meet a key exactly first, and later quantized

    bits: int
    group: int
    residual: int  # at least this many of the newest tokens stay exact

    def n_quantized(self, n: int) -> int:
        """How many of n tokens are quantized: whole groups, without the newest `residual`."""
        return cache_bytes.n_quantized(n, self.group, self.residual)

    def copy_mask(
        self, tokens: Sequence[int], quantized: Sequence[int], exact: Sequence[int]
    ) -> Tensor:
        """Which columns each token reads -> (T,Q+E) bool, on the CPU; arguments as `copy_rule`."""
        return self.copy_rule(tokens, quantized, exact).mask(slice(None), slice(None))

    def copy_rule(
        self, tokens: Sequence[int], quantized: Sequence[int], exact: Sequence[int]
    ) -> CopyRule:
        """The rule that says which columns each token reads.

        tokens (T), quantized (Q) and exact (E) are numbers of tokens in order of arrival: of the
        queries, of the columns with quantized keys, and of the columns with exact keys after them.
        """
        since = [n + 1 for n in quantized] + [0] * len(exact)
        until = [sys.maxsize] * len(quantized) + [n + 1 for n in exact]
        n_quantized = [self.n_quantized(n) for n in tokens]
        return CopyRule(torch.tensor(n_quantized), torch.tensor(since), torch.tensor(until))

    def channels(self, head_dim: int) -> int:
        """How many channels of a value share a scale, for heads of `head_dim` channels."""
        return cache_bytes.channels(head_dim, self.group)

    def both_copies(self, k: Tensor, v: Tensor, q_pos: Tensor) -> tuple[Tensor, Tensor]:
        """All that the tokens of a whole pass read, k, v (B,Hkv,T,D) -> (B,Hkv,Q+T,D): those that
        are quantized when the last one comes, and then everything exactly; in float32 or above."""
        n = self.n_quantized(k.shape[2] - 1)
        keys, values = self.rounded(k[:, :, :n], v[:, :, :n], q_pos[:, :n])
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def rounded(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B,Hkv,T,D) of whole groups at positions (B,T), quantized and back, in
        float32 or above: a half format would double the error of 8 bits."""
        keys, values = self.codes(k, v, positions)
        return keys.dequantized().flatten(2, 3), values.dequantized().flatten(3, 4)

    def codes(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Codes, Codes]:
        """The codes of keys (B,Hkv,T/G,G,D), G tokens each, and values (B,Hkv,T,D/C,C), C channels.

        k, v (B,Hkv,T,D) of whole groups, at positions (B,T).
        """
        groups, channels = (-1, self.group), (-1, self.channels(v.shape[3]))
        padding = (positions < 0).unflatten(1, groups)[:, None, :, :, None]  # (B,1,T/G,G,1)
        keys = self.quantized(k.unflatten(2, groups), 3, padding)
        return keys, self.quantized(v.unflatten(3, channels), 4)

    def quantized(self, x: Tensor, dim: int, padding: Tensor | None = None) -> Codes:
        """Quantize x to 2**bits levels from its minimum to its maximum along `dim`.

        padding: bool, broadcast to x; the range of a group ignores it, unless all of it is padding.
        """
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        least = largest = exact
        if padding is not None:
            padding = padding & ~padding.all(dim, keepdim=True)
            least = exact.masked_fill(padding, torch.inf)
            largest = exact.masked_fill(padding, -torch.inf)
        low, high = least.amin(dim, keepdim=True), largest.amax(dim, keepdim=True)
        levels = 2**self.bits - 1
        # The scale is rounded up to the model's dtype, or the last level would not reach the
        # maximum. For equal values it must not become 0.
        scale = ((high - low) / levels).to(x.dtype)
        short = scale.to(exact.dtype) * levels < high - low
        info = torch.finfo(x.dtype)
        larger = (scale.to(exact.dtype) * (1 + info.eps)).to(x.dtype)
        scale = torch.where(short, larger, scale).clamp(min=info.tiny).to(exact.dtype)
        return Codes(((exact - low) / scale).round().clamp(0, levels), scale, low)


@dataclass(frozen=True)
class Float8:
    """Rounding to e4m3 (Micikevicius 2022, arXiv 2209.05433), of a token in a head by itself: to
    four significant bits, fewer below 2**-6, of what is 448 at most once it has been scaled.

    The scale is a power of two, the least that does. So it takes nothing from the digits, and what
    a code stands for is a number in every format of a model.
    """

    in_place: ClassVar[bool] = True  # a token is met as it is stored, by itself too

    def n_quantized(self, n: int) -> int:
        """How many of n tokens are there twice, quantized and exactly: none."""
        return 0

    def both_copies(self, k: Tensor, v: Tensor, q_pos: Tensor) -> tuple[Tensor, Tensor]:
        """All that the tokens of a whole pass read, k, v (B,Hkv,T,D) -> (B,Hkv,T,D)."""
        return self.rounded(k, v, q_pos)

    def rounded(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B,Hkv,T,D), each rounded, wherever it stands."""
        return self._rounded(k), self._rounded(v)

    @classmethod
    def _rounded(cls, x: Tensor) -> Tensor:
        scale = cls.scale(x)
        scaled = (x / scale).float()
        exponent = torch.frexp(scaled).exponent.clamp(min=-5) - 4  # of the last digit that is kept
        digit = torch.ldexp(torch.ones_like(scaled), exponent)
        return ((scaled / digit).round() * digit).to(x.dtype) * scale

    @staticmethod
    def scale(x: Tensor) -> Tensor:
        """What tokens x (...,D) are divided by, (...,1); NaN for one that is not finite."""
        largest = x.abs().amax(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
        digits, exponent = torch.frexp(largest)
        exponent = exponent - torch.where(digits > 448 / 512, 8, 9)
        info = torch.finfo(x.dtype)
        # A code of the least number, 2**-9, times it is a number of that format, too.
        least = max(info.tiny, 512 * info.tiny * info.eps)
        scale = torch.ldexp(torch.ones_like(largest), exponent).clamp(min=least)
        return scale.where(largest < torch.inf, torch.nan).to(x.dtype)
