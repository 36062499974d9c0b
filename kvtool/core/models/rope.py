"""Rotary positions: queries and keys are rotated by angles that grow with their position."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.config import RopeScaling
from kvtool.core.models.layers import Plain, Table
from kvtool.core.models.rope_scaling import SCALE


class Rotary(Plain):
    """Rotary positions (Su 2021) of the first `width` channels of a head; others stay as they are.

    Element i of these pairs with i + width/2, as in GPT-NeoX and Llama.
    """

    def __init__(
        self, context: int, width: int, theta: float, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.width = width
        rates = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        if scaling is not None:
            rates = SCALE[scaling.kind](rates, theta, scaling)
        angles = torch.arange(context, dtype=torch.float64)[:, None] * rates  # (context, D/2)
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        self.table = Table(table if scaling is None else table * scaling.attention_factor)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """Rotate x (B,H,T,D) by positions pos (B,T) -> (B,H,T,D)."""
        cos, sin = self.table(pos, x.dtype)[:, None].chunk(2, dim=-1)  # (B,1,T,D/2) each
        kept = [x[..., self.width :]] if x.shape[-1] > self.width else []
        a, b = x[..., : self.width].chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, *kept], dim=-1)
