"""A row of the report of bench: one kind of cache at one length, in one setup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvtool.config.setups import Setup

if TYPE_CHECKING:
    from kvtool.core.bench.timing import Cell


@dataclass
class Row:
    """One kind of cache at one length; None was not measured."""

    length: int
    impl: str
    cache: str
    median_s: float | None
    iqr_s: float | None
    tokens_per_s: float | None
    speedup: float | None
    bytes_predicted: int | None
    bytes_measured: int | None
    prefill_s: float | None
    token_s: float | None  # one more token, at this length
    token_bytes: int | None  # weights, keys and values that it reads
    samples_s: list[float]
    would_take_s: float | None = None  # a run, where there is no sample; estimated
    dtype: str = ""
    batch_size: int = 1
    threads: int = 0
    cores_used: float | None = None  # processors that were busy at a time
    first_token_s: float | None = None  # the wait for the first token: median and percentiles
    first_token_p90_s: float | None = None
    first_token_p99_s: float | None = None
    between_tokens_s: float | None = None  # likewise, between two tokens, of all runs
    between_tokens_p90_s: float | None = None
    between_tokens_p99_s: float | None = None

    @classmethod
    def of(
        cls, cell: Cell, speedup: float | None, weights: int, expected: float | None = None
    ) -> Row:
        """A cell of measurements as the report gives it."""
        read = cell.runs[-1].read if cell.runs else None
        batch = cell.setup.batch_size
        first = waits([run.prefill_s for run in cell.runs])
        between = waits([wait for run in cell.runs for wait in run.between])
        return cls(
            length=cell.length,
            impl=cell.impl,
            cache=cell.cache,
            median_s=cell.median,
            iqr_s=cell.iqr,
            tokens_per_s=batch * cell.length / cell.median if cell.median else None,
            speedup=speedup,
            bytes_predicted=cell.bytes_predicted,
            bytes_measured=cell.bytes_measured if cell.runs else None,
            prefill_s=middle(run.prefill_s for run in cell.runs),
            token_s=middle(run.token_s for run in cell.runs),
            token_bytes=weights + read if read else None,
            samples_s=cell.samples,
            would_take_s=None if cell.runs else expected,
            **cell.setup._asdict(),
            cores_used=cell.cores_used,
            **{f"first_token{part}_s": wait for part, wait in first.items()},
            **{f"between_tokens{part}_s": wait for part, wait in between.items()},
        )

    @property
    def setup(self) -> Setup:
        """The number format, the batch and the threads."""
        return Setup(self.dtype, self.batch_size, self.threads)


def waits(seconds: list[float]) -> dict[str, Any]:
    """The median, the 90th and the 99th percentile of waits, by the ends of their names: a
    percentile where a wait beyond it can be expected, so of 10 waits and of 100."""
    from kvtool.core.bench.timing import quantile

    shares = {"": (0.5, 1), "_p90": (0.9, 10), "_p99": (0.99, 100)}
    return {
        end: quantile(seconds, share) if len(seconds) >= fewest else None
        for end, (share, fewest) in shares.items()
    }


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the known figures."""
    from statistics import median

    found = [value for value in values if value is not None]
    return median(found) if found else None
