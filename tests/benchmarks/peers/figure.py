"""The figure of the peers: microseconds per token against the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from measure import Series

from kvtool.ui.plots import COLOURS, MARKERS, apart, save_figure


def draw(path: Path, series: Sequence[Series], threads: int) -> None:
    """A line for each subject, and the floor as an area that none can enter."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    *subjects, floor = series
    lengths = sorted(floor.samples)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, each in enumerate(subjects):
        colour = COLOURS[i % len(COLOURS)]
        medians = [each.median(n) for n in lengths]
        axes.plot(lengths, medians, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5)
        axes.annotate(
            each.name, (lengths[-1], medians[-1]), xytext=(8, 0), textcoords="offset points",
            va="center", color=colour, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
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
    axes.yaxis.set_major_locator(FixedLocator([200, 500, 1000, 2000, 5000]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,.0f} µs"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("median time per token")
    axes.set_title(f"{threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    save_figure(figure, path)
