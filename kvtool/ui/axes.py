"""Logarithmic axes of plots: ticks at what was measured, and values with their units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


def log_axes(
    axes: Any, lengths: Sequence[int], unit: Callable[[float], str], base: int = 10
) -> None:
    """Logarithmic axes whose ticks are the measured lengths, and values with their units."""
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        NullFormatter,
    )

    axes.set_xscale("log")
    ticks = apart(lengths)
    if len(ticks) == 1:  # one point says nothing of a scale
        ticks = [n for n in (ticks[0] // 2, ticks[0], 2 * ticks[0]) if n]
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
    _value_axis(axes, unit, base)


def _value_axis(axes: Any, unit: Callable[[float], str], base: int = 10) -> None:
    """A logarithmic axis of values with their units."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if base == 10 else (1.0,)
    low, high = axes.get_ylim()
    axes.set_ylim(*with_ticks(low, high, base, subs))
    axes.yaxis.set_major_locator(LogLocator(base, subs=subs, numticks=10))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def with_ticks(low: float, high: float, base: int, subs: Sequence[float]) -> tuple[float, float]:
    """The limits of a log axis, moved apart until two ticks are between them: ticks stand at
    `subs` times powers of `base`.

    >>> with_ticks(0.31, 0.42, 10, (1.0, 2.0, 5.0))
    (0.2, 0.5)
    """
    first = math.floor(math.log(low, base)) - 1
    last = math.ceil(math.log(high, base)) + 1
    ticks = [sub * float(base) ** power for power in range(first, last + 1) for sub in subs]
    if sum(low <= tick <= high for tick in ticks) >= 2:
        return low, high
    return max(t for t in ticks if t <= low), min(t for t in ticks if t >= high)


def apart(lengths: Sequence[int]) -> list[int]:
    """Those of the sorted `lengths` whose labels do not run into each other on a log axis.

    >>> apart([1, 1000, 1001, 1002])
    [1, 1002]
    """
    gap = (lengths[-1] / lengths[0]) ** (1 / 16)  # a label is about a sixteenth of the axis wide
    kept = [lengths[-1]]
    for length in reversed(lengths):
        if length * gap <= kept[-1] and length < kept[-1]:
            kept.append(length)
    return kept[::-1]


def seconds_text(seconds: float) -> str:
    """A time with its unit: 500 ms, 2 s."""
    return f"{seconds:,.6g} s" if seconds >= 1 else f"{seconds * 1000:,.4g} ms"


def bytes_text(n: float) -> str:
    """A size with its unit: 512 KiB, 2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:,.3g} {unit}"
