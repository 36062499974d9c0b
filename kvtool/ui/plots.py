"""Every picture that kvtool draws. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kvtool.files import write_durable

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008).
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^DvPX"


def new_figure(width: float = 7.2, height: float = 4.4) -> tuple[Any, Any]:
    """A figure with one axes, in the house style."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure in the format of the suffix, durably. Raises FileError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower().lstrip("."), dpi=150)
    write_durable(path, buffer.getvalue())


def loss_plot(path: Path, log: Sequence[Mapping[str, Any]], score_name: str) -> None:
    """The training loss and the held-out score against steps; nothing if there is no step yet."""
    steps = [row for row in log if "loss" in row]
    scores = [row for row in log if "valid" in row]
    if not steps:
        return
    figure, axes = new_figure()
    axes.plot(
        [row["step"] for row in steps],
        [row["loss"] for row in steps],
        color=COLOURS[1],
        linewidth=1,
        label="training loss",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token", color=COLOURS[1])
    if scores:
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.plot(
            [row["step"] for row in scores],
            [row["valid"][score_name] for row in scores],
            color=COLOURS[2],
            marker="o",
            markersize=4,
        )
        right.set_ylabel(f"held out: {score_name.replace('_', ' ')}", color=COLOURS[2])
    save_figure(figure, path)


def latency_plot(
    path: Path,
    series: Mapping[str, Sequence[tuple[int, Sequence[float]]]],
    pays_from: Mapping[str, float | None],
) -> None:
    """Median latency and its samples' spread against the number of generated tokens, by cache kind.

    `series` has (length, samples in seconds) for each kind; `pays_from` the lengths from which on a
    kind is faster than no cache, marked where they lie between two measured lengths.
    """
    figure, axes = new_figure()
    for i, (kind, points) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        lengths = [n for n, _ in points]
        medians = [median(samples) for _, samples in points]
        axes.fill_between(
            lengths,
            [min(samples) for _, samples in points],
            [max(samples) for _, samples in points],
            color=colour,
            alpha=0.15,
            linewidth=0,
        )
        label = "no cache" if kind == "none" else f"{kind} cache"
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(lengths, medians, marker + "-", color=colour, markersize=5, label=label)
    _log_axes(axes, sorted({n for points in series.values() for n, _ in points}))
    _mark_crossovers(axes, series, pays_from)
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("median time (band: all samples)")
    axes.legend(frameon=False, loc="upper left")
    save_figure(figure, path)


def _log_axes(axes: Any, lengths: Sequence[int]) -> None:
    """Logarithmic axes whose ticks are the measured lengths, and times with their units."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(apart(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda s, _: seconds_text(s)))
    axes.yaxis.set_minor_formatter(NullFormatter())


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


def _mark_crossovers(
    axes: Any,
    series: Mapping[str, Sequence[tuple[int, Sequence[float]]]],
    pays_from: Mapping[str, float | None],
) -> None:
    """A line at each length from which on a kind pays; in words if that is all measured lengths."""
    notes = []
    for i, kind in enumerate(series):
        length = pays_from.get(kind)
        if length is None:
            continue
        if length == series[kind][0][0]:
            notes.append(f"{kind} pays from {length:,.0f} tokens on, the fewest measured")
            continue
        notes.append(f"{kind} pays from about {length:,.0f} tokens on")
        axes.axvline(length, color=COLOURS[i % len(COLOURS)], linestyle=":", linewidth=1.2)
    if notes:
        text = "\n".join(notes)
        place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 8.5}
        axes.text(0.98, 0.03, text, **place, backgroundcolor="white")


NOTHING = 1e-18  # where a gap of exactly 0 is drawn on a log axis


def gap_plot(path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The gap between cached and uncached logits by step: a panel a cache, a line a precision.

    Rounding falls by nine decades from float32 to float64, a bug stays where it is.
    """
    from matplotlib.figure import Figure

    n_columns = min(len(panels), 2) or 1
    n_rows = -(-len(panels) // n_columns) or 1
    figure = Figure(figsize=(4.2 * n_columns + 0.8, 2.6 * n_rows + 0.8), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, gaps in lines.items():
            i = names.index(name)
            values = [min(max(gap, NOTHING), 1e3) for gap in gaps]
            marker = MARKERS[i % len(MARKERS)]
            (handles[name],) = axes.plot(
                values,
                color=COLOURS[i % len(COLOURS)],
                marker=marker,
                markevery=max(1, len(values) // 8),
                markersize=4,
                linewidth=1,
                linestyle="--" if name == "promoted" else "-",  # it lies upon float64's
            )
        axes.set_title(title, fontsize=10)
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("log")
        axes.set_ylim(NOTHING / 3, 30)
        axes.set_yticks([1, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15, NOTHING])
        axes.set_yticklabels(["1", "1e-3", "1e-6", "1e-9", "1e-12", "1e-15", "exactly 0"])
        axes.minorticks_off()
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("gap, cached against uncached", fontsize=10)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=2, frameon=False
    )
    save_figure(figure, path)
