"""Rotary positions: queries and keys are turned by an angle that grows with their position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvtool.config import RopeScaling
from kvtool.core.models.layers import Plain, Table


class Rotary(Plain):
    """Rotates halves of a head against each other (Su 2021, in GPT-NeoX's and Llama's layout)."""

    def __init__(
        self, context: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        if scaling is not None:
            rates = SCALE[scaling.kind](rates, theta, scaling)
        angles = torch.arange(context, dtype=torch.float64)[:, None] * rates  # (context, D/2)
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        self.table = Table(table if scaling is None else table * scaling.attention_factor)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """x (B,H,T,D), pos (B,T) -> (B,H,T,D)"""
        cos, sin = self.table(pos, x.dtype)[:, None].chunk(2, dim=-1)  # (B,1,T,D/2) each
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _linear(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """rates (D/2,) in radians a token -> (D/2,)"""
    return rates / s.factor


def _llama3(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """By how often a dimension turns in the first context: below `low` times slow, above `high`
    times as it was, and in between a mixture."""
    turns = s.original_context * rates / (2 * math.pi)
    kept = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return (1 - kept) * rates / s.factor + kept * rates


def _yarn(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """Like `_llama3`, but the mixture is linear in the dimension's number (Peng 2023, 3.2, with the
    bounds of its reference implementation)."""
    width = 2 * len(rates)

    def dimension(turns: float) -> float:
        """The number of the dimension that turns so often in the first context."""
        return width * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last + 0.001 if first == last else last
    slow = ((torch.arange(len(rates), dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return slow * rates / s.factor + (1 - slow) * rates


SCALE = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
