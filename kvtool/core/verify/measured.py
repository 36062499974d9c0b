"""The noise of a subject's own working format, measured on one run, and whether its cached arm is
beyond that."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch

from kvtool.core.verify import noise
from kvtool.core.verify.arms import Arms, Case, play
from kvtool.core.verify.benign import arrays, benign, controls, moved
from kvtool.core.verify.noise import Spread
from kvtool.core.verify.subject import Subject

# How many times the noise a single right run may be off. Measured: at most 1.4 for right decoders
# in float32, bfloat16 and float16, and 8.8 the least of caches wrong in one format alone.
LIMIT = 2.0
COARSE = 10.0  # the same if no weights can be moved, which leaves fewer benign runs
SAME = 10.0  # how many times the noise the float64 run may be from the working one
UNSEEN = 1e-3  # of a fault: what may be rounding where no rounding is seen
RETRIES = (31, 32, 33)  # seeds of the moves that a bug has to outlast


class Beyond(NamedTuple):
    """How far a cached run is beyond the noise, and the first step that is."""

    times: float
    step: int
    floor: float


class Measured:
    """The noise of one run in its working format, computed on demand.

    by_length: whether passes of other lengths may be taken for benign.
    """

    def __init__(self, subject: Subject, case: Case, arms: Arms, by_length: bool = True) -> None:
        self.subject, self.case, self.arms = subject, case, arms
        self.by_length = by_length
        self.eps = torch.finfo(subject.dtype).eps
        self.least = self.eps / 4  # rounding the logits alone is about that

    @cached_property
    def found(self) -> noise.Steps:
        """The cached arm."""
        return arrays(self.arms.found)

    @cached_property
    def expected(self) -> noise.Steps:
        """The uncached arm."""
        return arrays(self.arms.expected)

    @cached_property
    def variants(self) -> list[noise.Steps]:
        """Uncached runs that only round differently."""
        return [arrays(run) for run in benign(self.subject, self.arms, self.by_length)]

    @cached_property
    def limit(self) -> float:
        """The ratio to the floor up to which a gap is noise."""
        return COARSE if moved(self.subject, self.eps, RETRIES[0]) is None else LIMIT

    @cached_property
    def floor(self) -> Spread:
        """The spread of the variants."""
        if len(self.variants) < 2:
            return Spread(0.0, 0.0)
        return noise.floor(self.variants)

    @cached_property
    def faults(self) -> list[Spread]:
        """The spreads of uncached runs with a token replaced, and with one missing."""
        runs = controls(self.subject, self.arms)
        return [noise.spread(arrays(run), self.expected) for run in runs]

    @cached_property
    def unmeasurable(self) -> bool:
        """Whether the floor is 0 because no benign run rounds differently, while the gap is small
        compared with that of one wrong token."""
        if self.floor.total > 0:
            return False
        fault = min((fault.total for fault in self.faults), default=0.0)
        gap = noise.spread(self.found, self.expected).total
        return fault == 0 or gap <= UNSEEN * fault  # a fault that does not show proves nothing

    def same_model(self, in_float64: Arms) -> str:
        """The distance to the uncached float64 run in words, if it is more than rounding; else
        ""."""
        if self.subject.converts:
            return ""
        gap = noise.spread(self.expected, arrays(in_float64.expected))
        if gap.worst <= 4 * self.eps or gap.over(self.floor, self.least) <= SAME:
            return ""
        return f"{gap.total:.1e}"

    def beyond(self, in_float64: Arms | None = None) -> Beyond | None:
        """How far the cached run is beyond the noise; None if it is within.

        in_float64: of the same model, and right: then the uncached run's distance from it is noise.
        """
        if in_float64 is not None:
            right = arrays(in_float64.expected)
            error = noise.spread(self.expected, right)
            if self._within(noise.spread(self.found, right).over(error, self.least)):
                return None
        found = noise.spread(self.found, noise.mean(self.variants))
        times = found.over(self.floor, self.least)
        if self._within(times):
            return None
        wrong = self._wrong(found)
        if not any(wrong):  # everywhere by a little
            return Beyond(times, 0, self.floor.total)
        wrong = self._staying(wrong)
        return Beyond(times, wrong.index(True), self.floor.total) if any(wrong) else None

    def verdict(self) -> str:
        """WITHIN, BEYOND or HIDDEN, as `noise.judge` says, without a float64 run."""
        if self.beyond() is not None:
            return noise.BEYOND
        faults = [fault.over(self.floor, self.least) for fault in self.faults]
        return noise.judge(0.0, faults, self.limit)

    def _within(self, times: float) -> bool:
        """Whether this ratio to the floor is noise. Weights are moved only if it exceeds LIMIT."""
        return times <= LIMIT or times <= self.limit

    def _staying(self, wrong: list[bool]) -> list[bool]:
        """The steps that are wrong as well when weights are moved by one unit in the last place.

        Where a value lies between two codes, another code is moved by that; a bug stays.
        """
        for seed in RETRIES:
            other = moved(self.subject, self.eps, seed)
            if other is None or not any(wrong):
                break
            again = play(other, self.case)
            if again.raised is None:
                gap = noise.spread(arrays(again.found), arrays(again.expected))
                wrong = [a and b for a, b in zip(wrong, self._wrong(gap), strict=True)]
        return wrong

    def _wrong(self, found: Spread) -> list[bool]:
        limit = self.limit * max(self.floor.worst, self.least)
        return [not gap <= limit for gap in found.by_step]
