"""A clock that tests set, and samples that they make up."""

from __future__ import annotations

from collections.abc import Callable

from kvtool.core.bench.timing import Cell, TimedRun


def taking(seconds: float, nbytes: int = 0) -> TimedRun:
    """A run of that many seconds, a quarter of them before the first token."""
    return TimedRun(seconds, seconds / 4, seconds * 3 / 4, None, nbytes, 0)


class Fake:
    """A clock, and a workload that takes `cost(kind, length)` seconds of it."""

    def __init__(self, cost: Callable[[str, int], float]) -> None:
        self.now = 100.0
        self.cost = cost
        self.runs: list[tuple[str, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def run(self, kind: str, length: int) -> TimedRun:
        seconds = self.cost(kind, length)
        self.now += seconds
        self.runs.append((kind, length))
        return taking(seconds, nbytes=1000 + length)

    def predicted(self, kind: str, length: int) -> int:
        return 1000 + length


def cells(**medians: list[float | None]) -> list[Cell]:
    """Cells of kinds at lengths 10, 20, 40, 80 ... with one sample each, or none."""
    return [
        Cell(kind, 10 * 2**i, [] if seconds is None else [taking(seconds)])
        for i in range(max(map(len, medians.values())))
        for kind, row in medians.items()
        for seconds in row[i : i + 1]
    ]
