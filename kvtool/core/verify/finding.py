"""The result of one scenario: the verdict, and where and what a bug is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kvtool.core.verify.compare import Gap
from kvtool.core.verify.outcome import IDENTICAL, LOSSY, PRECISION, ROUNDING

RIGHT = (IDENTICAL, ROUNDING)


class Diagnosis(NamedTuple):
    """Where a bug is and what it does, as far as that could be found out."""

    layer: int | None = None
    part: str = ""
    heads: tuple[int, ...] = ()
    place: str = ""  # all of that in words
    bugs: tuple[str, ...] = ()  # the known ones that reproduce the wrong logits, all of them
    unexplained: str = ""  # what was tried, where none of it does

    @property
    def hint(self) -> str:
        """The bug in words, or that none of the known ones explains it; "" if none was tried."""
        return "; or: ".join(self.bugs) or self.unexplained


@dataclass(frozen=True)
class Finding:
    """The finding for one scenario, with the evidence. None: not needed, and not computed."""

    scenario: str
    verdict: str
    evidence: str = ""
    working: Gap | None = None
    float64: Gap | None = None
    promoted: Gap | None = None
    first_wrong: int | None = None  # the first step that differs by more than rounding
    lossy: bool = False  # an undeclared loss of precision in the cache alone
    loss: float | None = None  # of a cache that rounds: root mean square, over the logits'
    noise: float | None = None  # how many times the working format's noise the cached arm is off
    not_fed: str = ""  # the part of the context that was not reached: "beyond 512 tokens"
    diagnosis: Diagnosis = field(default_factory=Diagnosis)

    @property
    def right(self) -> bool:
        """Whether the cache computes what the uncached pass does, as far as its format allows."""
        return self.verdict in RIGHT or (self.verdict in (PRECISION, LOSSY) and not self.lossy)

    @property
    def by_step(self) -> dict[str, list[float]]:
        """The gap of each step in each precision that was computed, for a plot."""
        gaps = {"working": self.working, "float64": self.float64, "promoted": self.promoted}
        return {name: list(gap.by_step) for name, gap in gaps.items() if gap is not None}
