"""How far apart two runs are: bit for bit, in units in the last place, and relatively."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING_64 = 1e-12  # between right caches (about 1e-15) and everything else (1e-9 and more)


class Gap(NamedTuple):
    """How two runs differ. A step is one call of the model, step 0 the first of the run."""

    steps: int
    identical: int  # steps whose logits are equal bit for bit
    first: int | None  # the first step that is not
    relative: float  # max |a - b| / max |b| over everything
    ulps: float  # max |a - b| of a step, in units of the spacing at its largest |b|
    by_step: tuple[float, ...] = ()  # `distances`


def compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Gap:
    """The gap between two runs in one format. NaN counts as infinite."""
    scale = largest(expected)
    same = [bool(torch.equal(a, b)) for a, b in zip(found, expected, strict=True)]
    gaps = distances(found, expected)
    ulps = [
        gap * scale / spacing(float(b.abs().max()), b.dtype)
        for gap, b in zip(gaps, expected, strict=True)
    ]
    first = same.index(False) if False in same else None
    return Gap(len(same), sum(same), first, max(gaps), max(ulps), tuple(gaps))


def distances(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Each step's max |a - b|, over max |b| of all steps. NaN counts as infinite."""
    scale = largest(expected)
    differences = [
        float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True)
    ]
    return [math.inf if math.isnan(d) else d / scale for d in differences]


def largest(logits: Sequence[Tensor]) -> float:
    """max |b| over all steps; 1 if all are 0."""
    return max(float(b.abs().max()) for b in logits) or 1.0


def spacing(value: float, dtype: torch.dtype) -> float:
    """The distance from `value` to the next larger number of the format."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(value, info.tiny)))
