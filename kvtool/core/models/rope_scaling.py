"""Scaling of rotary positions for contexts longer than in training: angles grow more slowly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvtool.config import RopeScaling


def _linear(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """Divide all rates by the factor: (D/2,) in radians per token -> (D/2,)."""
    return rates / s.factor


def _llama3(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """Scale a dimension by its turns in the original context: below `low` turns it is slowed by the
    factor, above `high` it keeps its rate, and between them it gets a mixture (Llama 3)."""
    turns = s.original_context * rates / (2 * math.pi)
    kept = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return (1 - kept) * rates / s.factor + kept * rates


def _yarn(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """As `_llama3`, but the mixture is linear in the index of the dimension (Peng 2023, 3.2, with
    the bounds of its reference implementation)."""
    width = 2 * len(rates)

    def dimension(turns: float) -> float:
        """The index of the dimension with that many turns in the original context."""
        return width * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last = last + 0.001 if first == last else last
    slow = ((torch.arange(len(rates), dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return slow * rates / s.factor + (1 - slow) * rates


def _longrope(rates: Tensor, theta: float, s: RopeScaling) -> Tensor:
    """Each dimension by a factor of its own (Ding 2024)."""
    return rates / torch.tensor(s.factors, dtype=torch.float64)


SCALE = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
