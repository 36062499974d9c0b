"""Hypotheses: keys and values are rounded to other ones, or too early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvtool.core.cache.quantization import Codes, Float8, Quantization
from kvtool.core.verify.diagnosis.hypothesis import Hypothesis


class Rounding(Hypothesis):
    """Changes what codes are read as."""

    needs = ("quantized",)

    def rounded(
        self, quantization: Quantization, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys, values = quantization.codes(k, v, positions)
        keys, values = self.read_codes(keys, 3), self.read_codes(values, 2)
        return keys.dequantized().flatten(2, 3), values.dequantized().flatten(3, 4)

    def read_codes(self, codes: Codes, tokens: int) -> Codes:
        """Codes as they are read; `tokens` is the dimension in which tokens follow each other."""
        return codes


class ZeroPointLost(Rounding):
    hint = "the zero point is not added: codes times their scale are read"

    def read_codes(self, codes: Codes, tokens: int) -> Codes:
        return codes._replace(zero_point=torch.zeros_like(codes.zero_point))


class ScaleOfAllLevels(Rounding):
    hint = "the scale read back divides the range by 2**bits: there is one step less"

    def read_codes(self, codes: Codes, tokens: int) -> Codes:
        assert isinstance(self.quantization, Quantization)
        n = 2**self.quantization.bits
        return codes._replace(scale=codes.scale * (n - 1) / n)


class ScaleBefore(Rounding):
    hint = "scales and zero points are those of the group before, the first its own"

    def read_codes(self, codes: Codes, tokens: int) -> Codes:
        n = codes.scale.shape[2]
        index = (torch.arange(n, device=codes.scale.device) - 1).clamp(min=0)
        scale, zero_point = codes.scale[:, :, index], codes.zero_point[:, :, index]
        return codes._replace(scale=scale, zero_point=zero_point)


class TokensSwapped(Rounding):
    hint = "the two tokens of a byte are read in the wrong order"

    def read_codes(self, codes: Codes, tokens: int) -> Codes:
        pairs = codes.codes.unflatten(tokens, (-1, 2)).flip(tokens + 1)
        return codes._replace(codes=pairs.flatten(tokens, tokens + 1))


class KeysByToken(Hypothesis):
    hint = "keys are rounded by token, as values are: a large channel coarsens all others"
    needs = ("quantized",)

    def rounded(
        self, quantization: Quantization, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, values = quantization.rounded(k, v, positions)
        return by_token(quantization, k), values


class RoundedTwice(Hypothesis):
    hint = "keys are rounded twice: by token, and what is left once more by channel"
    needs = ("quantized",)

    def rounded(
        self, quantization: Quantization, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return quantization.rounded(by_token(quantization, k), v, positions)


class PaddingCounted(Hypothesis):
    hint = "the range of a group counts the keys of its padding"
    needs = ("quantized", "padding")

    def rounded(
        self, quantization: Quantization, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return quantization.rounded(k, v, positions.clamp(min=0))


class NoResidual(Hypothesis):
    hint = "after the prompt a group is met rounded once it is full: no residual stays exact"
    needs = ("quantized",)

    @property
    def quantization(self) -> Quantization | Float8 | None:
        found = super().quantization
        if isinstance(found, Quantization) and self.rows[0]:
            return replace(found, residual=0)
        return found


class RoundedBeforeRead(Hypothesis):
    hint = "a step of several tokens is rounded before its first tokens have read it"
    needs = ("quantized",)

    def quantized_as_of(self, end: int) -> Sequence[int]:
        return [end - 1] * self.n_new


def by_token(quantization: Quantization, x: Tensor) -> Tensor:
    """Keys (B,Hkv,T,D) rounded as values are."""
    folded = x.unflatten(3, (-1, quantization.channels(x.shape[3])))
    return quantization.quantized(folded, 4).dequantized().flatten(3, 4)


QUANTIZED: tuple[type[Hypothesis], ...] = (
    ZeroPointLost,
    ScaleOfAllLevels,
    ScaleBefore,
    TokensSwapped,
    KeysByToken,
    RoundedTwice,
    PaddingCounted,
    NoResidual,
    RoundedBeforeRead,
)
