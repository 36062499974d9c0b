"""What a sweep asks a process to do, and what that says of one type."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kvtool.core.verify.finding import RIGHT
from kvtool.core.verify.outcome import (
    BUG,
    ERROR,
    IDENTICAL,
    LOSSY,
    NOT_CAUSAL,
    PRECISION,
    ROUNDING,
    UNDECIDED,
    UNSUPPORTED,
    VACUOUS,
)

NOT_BUILT = "not built"  # the model, by its default configuration or for want of a package
VERDICTS = (
    IDENTICAL, ROUNDING, PRECISION, LOSSY, BUG, NOT_CAUSAL, UNDECIDED, VACUOUS, UNSUPPORTED,
    ERROR, NOT_BUILT,
)  # fmt: skip
JUDGED = (IDENTICAL, ROUNDING, PRECISION, LOSSY, BUG, NOT_CAUSAL)  # a verdict, good or bad
MEMORY = 4 << 30  # bytes that a process may take


@dataclass(frozen=True)
class Swept:
    """What one type came to; gaps are those of its worst finding, None if not needed."""

    type: str
    verdict: str
    right: bool
    reason: str = ""
    gap: float | None = None
    gap_float64: float | None = None
    gap_promoted: float | None = None
    seconds: float = 0.0
    by_cache: dict[str, str] = dataclasses.field(default_factory=dict)  # its worst verdict
    kind: str = "causal"  # of TRANSFORMERS_MODELS

    @property
    def judged(self) -> bool:
        """Whether there is a verdict, good or bad."""
        return self.verdict in JUDGED

    @property
    def wrong(self) -> bool:
        """Whether it was run, and the answer is no, or cannot be given."""
        return not self.right and (self.judged or self.verdict in (UNDECIDED, ERROR))


def is_coherent(swept: Swept) -> bool:
    """Whether what a result says can be true together."""
    gaps = (swept.gap or 0, swept.gap_float64 or 0, swept.seconds)
    known = swept.verdict in VERDICTS and all(gap >= 0 for gap in gaps)
    return known and (
        swept.verdict in (PRECISION, LOSSY) or swept.right == (swept.verdict in RIGHT)
    )


@dataclass(frozen=True)
class Task:
    """What a process is asked to do."""

    type: str
    caches: tuple[str, ...]
    scenarios: tuple[str, ...]
    tokens: int
    seed: int
    memory: int = MEMORY
    kind: str = "causal"
    threads: int = 1
