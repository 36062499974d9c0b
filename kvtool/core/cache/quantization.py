"""What a quantized cache makes of keys and values, and which tokens meet them so.

This is the mathematics alone, for a pass over whole sequences: it packs and stores nothing, and no
cache takes part. core/cache/quantized.py stores codes, and has to give the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.kernels.sight import Met


class Codes(NamedTuple):
    """Whole numbers from 0 on, and what turns them into values again; all in float32 or above."""

    codes: Tensor
    scale: Tensor
    low: Tensor  # the zero point: what code 0 means

    def decoded(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scale + self.low).to(dtype)


@dataclass(frozen=True)
class Quantization:
    """Asymmetric quantization as in KIVI (Liu 2024, arXiv 2402.02750).

    Of `group` tokens that follow each other, each channel of the keys has a scale and a zero point
    of its own; values have them for each token, over `group` channels (over all of a head that
    `group` does not divide). Codes have `bits` bits.

    A token with n others before it in its row, padding included, meets the first `n_quantized(n)`
    of them quantized, and the others and itself exactly. So what it meets depends on its place
    alone, never on the steps in which a cache was filled.
    """

    bits: int
    group: int
    residual: int  # of the newest tokens, this many are not quantized yet, or more

    def n_quantized(self, n: int) -> int:
        """How many of n tokens are quantized: whole groups, all but the newest `residual`."""
        return max(n - self.residual, 0) // self.group * self.group

    def meets(
        self, tokens: Sequence[int], quantized: Sequence[int], exact: Sequence[int]
    ) -> Tensor:
        """Which columns each token meets -> (T,Q+E) bool, on the CPU.

        All are numbers in order of arrival: of the tokens (T), of the columns that hold quantized
        keys (Q), and of those behind them that hold exact ones (E).
        """
        return self.met(tokens, quantized, exact).mask(slice(None), slice(None))

    def met(self, tokens: Sequence[int], quantized: Sequence[int], exact: Sequence[int]) -> Met:
        """The same as a rule."""
        since = [n + 1 for n in quantized] + [0] * len(exact)
        until = [sys.maxsize] * len(quantized) + [n + 1 for n in exact]
        n_quantized = [self.n_quantized(n) for n in tokens]
        return Met(torch.tensor(n_quantized), torch.tensor(since), torch.tensor(until))

    def channels(self, head_dim: int) -> int:
        """How many channels of a value share a scale."""
        return head_dim if head_dim % self.group else self.group

    def both(self, k: Tensor, v: Tensor, q_pos: Tensor) -> tuple[Tensor, Tensor]:
        """All that the tokens of a whole pass meet, k, v (B,Hkv,T,D) -> (B,Hkv,Q+T,D): those that
        are quantized when the last one comes, and then everything exactly."""
        n = self.n_quantized(k.shape[2] - 1)
        keys, values = self.rounded(k[:, :, :n], v[:, :, :n], q_pos[:, :n])
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def rounded(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B,Hkv,T,D) of whole groups at positions (B,T), quantized and back."""
        keys, values = self.codes(k, v, positions)
        return keys.decoded(k.dtype).flatten(2, 3), values.decoded(v.dtype).flatten(3, 4)

    def codes(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Codes, Codes]:
        """Codes of keys (B,Hkv,T/G,G,D) and of values (B,Hkv,T,D/C,C), C channels each."""
        groups, channels = (-1, self.group), (-1, self.channels(v.shape[3]))
        padding = (positions < 0).unflatten(1, groups)[:, None, :, :, None]  # (B,1,T/G,G,1)
        return self.encoded(k.unflatten(2, groups), 3, padding), self.encoded(
            v.unflatten(3, channels), 4
        )

    def encoded(self, x: Tensor, dim: int, padding: Tensor | None = None) -> Codes:
        """x in 2**bits equal steps from the least to the largest along `dim`; padding, which
        nobody sees, has no part in these two."""
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        least = largest = exact
        if padding is not None:
            padding = padding & ~padding.all(dim, keepdim=True)
            least = exact.masked_fill(padding, torch.inf)
            largest = exact.masked_fill(padding, -torch.inf)
        low, high = least.amin(dim, keepdim=True), largest.amax(dim, keepdim=True)
        levels = 2**self.bits - 1
        # Kept in the format of the model: rounded up, or the last level would not reach the
        # largest. Of equal values it must not become 0.
        scale = ((high - low) / levels).to(x.dtype)
        short = scale.to(exact.dtype) * levels < high - low
        info = torch.finfo(x.dtype)
        larger = (scale.to(exact.dtype) * (1 + info.eps)).to(x.dtype)
        scale = torch.where(short, larger, scale).clamp(min=info.tiny).to(exact.dtype)
        return Codes(((exact - low) / scale).round().clamp(0, levels), scale, low)
