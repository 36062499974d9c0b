"""How far is an answer from cold ones, beside how far these are from each other?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtool.core.servers.texts import MIN_VARIANTS, Answer, Cold, Measured, likeliest, vector
from kvtool.core.verify import noise

MIN_FLOOR = float(np.finfo(np.float32).eps)  # of a floor, relative: logprobs are float32
NOTHING = 1e-12  # the floor of equal answers, whose mean is rounded


@dataclass(frozen=True)
class ProbeGap:
    """One cached answer compared with the engine's noise at the same history. Distances are the
    root mean square over the likeliest tokens, in nats."""

    prompt: int
    run: int
    history: int
    gap: float
    floor: float
    ratio: float
    identical: bool


class Scale(NamedTuple):
    """The scale for cached answers to one history."""

    ids: list[int]
    benign: list[list[NDArray[np.floating]]]
    middle: list[NDArray[np.floating]]
    floor: float  # relative to the root mean square of the logprobs
    nats: float  # that root mean square

    def floor_or(self, pooled: float) -> float:
        """The floor that a distance is divided by: `pooled` where this history has none."""
        return max(self.floor or pooled, MIN_FLOOR)


def scale_of(cold: Sequence[Answer]) -> Scale | None:
    """The scale of a history; None if it has too few cold answers."""
    if len(cold) < MIN_VARIANTS:
        return None
    ids = likeliest(cold[0])
    benign: list[list[NDArray[np.floating]]] = [[vector(answer, ids)] for answer in cold]
    middle = noise.mean(benign)
    size = float(np.sqrt(np.mean(np.square(middle[0])))) or 1.0
    floor = noise.floor(benign).total
    return Scale(ids, benign, middle, floor if floor > NOTHING else 0.0, size)


def scales_of(cold: Cold) -> dict[int, Scale]:
    """The scale of each history that has one."""
    found = {length: scale_of(answers) for length, answers in cold.answers.items()}
    return {length: scale for length, scale in found.items() if scale is not None}


def pooled_floor(colds: Iterable[Cold]) -> float:
    """The median of all floors that are not 0. A history's floor is 0, and says nothing, if all its
    shapes use the same kernels. 0 if all floors are."""
    scales = [scale for cold in colds for scale in scales_of(cold).values()]
    return float(median([s.floor for s in scales if s.floor > 0] or [0.0]))


def distance(answer: Answer, scale: Scale, other: Answer | None = None) -> float:
    """The relative distance from another answer to the same history, or from the mean of the benign
    ones; infinite for NaN."""
    middle = scale.middle if other is None else [vector(other, scale.ids)]
    return noise.spread([vector(answer, scale.ids)], middle).total


@dataclass(frozen=True)
class Compared:
    """One prompt's cached answers and controls, over the floor."""

    gaps: list[ProbeGap]
    controls: list[float]
    fault: float | None  # nats, of the smaller control
    largest: float = 0.0  # nats, of the noise of all histories, compared or not

    @classmethod
    def of(cls, measured: Measured, pooled: float, grown: float) -> Compared:
        """pooled: see `pooled_floor`. grown: how many times the noise grew meanwhile."""
        scales, gaps = scales_of(measured.cold), []
        first = min((probe.history for probe in measured.probes), default=0)
        floors = [s.floor * s.nats * grown for n, s in scales.items() if n >= first]
        largest = max(floors, default=0.0)
        for probe in measured.probes:
            if (scale := scales.get(probe.history)) is None:
                continue
            away, nats = distance(probe.answer, scale), scale.nats
            floor = (scale.floor or pooled) * grown
            answer = vector(probe.answer, scale.ids)
            same = any(np.array_equal(answer, b[0]) for b in scale.benign)
            ratio = 0.0 if same and not floor else away / (scale.floor_or(pooled) * grown)
            place = (measured.prompt, probe.run, probe.history)
            gaps.append(ProbeGap(*place, away * nats, floor * nats, ratio, same))
        end = scales.get(len(measured.cold.ids))
        if end is None or not measured.cold.controls:
            return cls(gaps, [], None, largest)
        faults = [distance(control, end) for control in measured.cold.controls]
        floor = end.floor_or(pooled) * grown
        return cls(gaps, [f / floor for f in faults], min(faults) * end.nats, largest)

    def runs(self, name: str = "ratio") -> list[float]:
        """The median of a figure over the answers of each request."""
        runs = {gap.run for gap in self.gaps}
        return [median(getattr(g, name) for g in self.gaps if g.run == run) for run in runs]


def typical(found: Sequence[Compared], name: str) -> float:
    """The median over prompts of that over a prompt's requests."""
    return float(median(median(compared.runs(name)) for compared in found))
