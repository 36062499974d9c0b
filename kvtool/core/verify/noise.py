"""Is a cached run further from uncached ones than those are from each other? Imports NumPy alone.

Where no float64 run can decide (a kernel that refuses it, a slip in a low format's own code, a
server), the noise is measured. The variants are uncached runs of the same tokens at the same
positions, changed in ways that may only round differently. Their spread is the floor. Controls are
uncached runs with a fault of known size: they say whether the floor would hide one.

A run is a sequence of steps, each an array (..., V) of the logits at its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Steps = Sequence[NDArray[np.floating]]

WITHIN, BEYOND, HIDDEN = "within", "beyond", "hidden"


class Spread(NamedTuple):
    """How far a run is from another, over the root mean square of all the other's logits."""

    total: float  # root mean square over all steps and logits
    worst: float  # of the step in which it is largest
    by_step: tuple[float, ...] = ()

    def over(self, floor: Spread, least: float = 0.0) -> float:
        """How many times the floor this is: over all steps, or in the worst step if that is more.

        A floor below `least`, the spacing of the format, is a floor too small.
        """
        return max(
            self.total / max(floor.total, least, TINY), self.worst / max(floor.worst, least, TINY)
        )


TINY = 1e-300


def spread(found: Steps, expected: Steps) -> Spread:
    """The distance of two runs. What is not a number counts as infinitely far."""
    scale = _rms([_square(b) for b in expected]) or 1.0
    squares = [_square(_wide(a) - _wide(b)) for a, b in zip(found, expected, strict=True)]
    by_step = tuple(_finite(_rms([square]) / scale) for square in squares)
    return Spread(_finite(_rms(squares) / scale), max(by_step), by_step)


def floor(variants: Sequence[Steps]) -> Spread:
    """The spread of benign runs: the largest distance of one of them from the mean of the others.

    Raises ValueError for fewer than 2.
    """
    if len(variants) < 2:
        raise ValueError(f"{len(variants)} variants have no spread (expected 2 or more)")
    spreads = [
        spread(variants[i], mean([*variants[:i], *variants[i + 1 :]])) for i in range(len(variants))
    ]
    return Spread(max(s.total for s in spreads), max(s.worst for s in spreads))


def mean(runs: Sequence[Steps]) -> list[NDArray[np.floating]]:
    """The mean of several runs, step by step."""
    return [np.mean([_wide(step) for step in steps], axis=0) for steps in zip(*runs, strict=True)]


def ratio(cached: Sequence[Steps], variants: Sequence[Steps], least: float = 0.0) -> float:
    """The median, over runs with a cache, of their distance from the benign runs over the floor."""
    noise, middle = floor(variants), mean(variants)
    return float(np.median([spread(run, middle).over(noise, least) for run in cached]))


def judge(times: float, controls: Sequence[float], limit: float = 1.0) -> str:
    """WITHIN the noise, BEYOND it, or HIDDEN: it is within, but so would a fault be.

    times: the ratio, a median if there are several. controls: how many times the floor faults of
    known size are. limit: 1 for a median over prompts; more where a single run is judged.
    """
    if not times <= limit:
        return BEYOND
    seen = sum(control > limit for control in controls)
    return WITHIN if 2 * seen > len(controls) or not controls else HIDDEN


def _wide(step: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(step, dtype=np.float64)


def _square(step: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.square(_wide(step)).ravel()


def _rms(squares: Sequence[NDArray[np.floating]]) -> float:
    count = sum(square.size for square in squares)
    return float(np.sqrt(sum(float(square.sum()) for square in squares) / max(count, 1)))


def _finite(value: float) -> float:
    return float("inf") if np.isnan(value) else value
