"""The figure of the peers: microseconds per token against the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import Series

from kvtool.ui.axes import apart
from kvtool.ui.plots import COLOURS, MARKERS, save_figure


def draw(path: Path, series: Sequence[Series], threads: int) -> None:
    """A line for each subject, and the floor as an area that none can enter."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    *subjects, floor = series
    lengths = sorted(floor.samples)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, each in enumerate(subjects):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        medians = [each.median(n) for n in lengths]
        axes.plot(lengths, medians, color=colour, marker=marker, markersize=5)
    medians = [floor.median(n) for n in lengths]
    axes.set(xscale="log", yscale="log", ylim=(medians[0] * 0.6, None))
    axes.fill_between(lengths, medians, axes.get_ylim()[0], color="0.88", linewidth=0)
    axes.text(
        0.5,
        0.04,
        "floor: products, and reading the cache",
        transform=axes.transAxes,
        ha="center",
        fontsize=8.5,
    )
    axes.xaxis.set_major_locator(FixedLocator(apart(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.yaxis.set_major_locator(FixedLocator([200, 300, 500, 700, 1000, 1500, 2000, 3000]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,.0f} µs"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("median time per token")
    axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    _name(axes, {each.name: each.median(lengths[-1]) for each in subjects}, lengths[-1])
    save_figure(figure, path)


def _name(axes: Any, ends: Mapping[str, float], x: int) -> None:
    """Write each line's name behind its end (x, y), far enough from the name below."""
    lowest = -math.inf
    for i, (name, y) in sorted(enumerate(ends.items()), key=lambda item: item[1][1]):
        at = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi  # points
        place = max(at, lowest + 11)
        lowest = place
        axes.annotate(
            name, (x, y), xytext=(8, place - at), textcoords="offset points", va="center",
            color=COLOURS[i % len(COLOURS)], fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
