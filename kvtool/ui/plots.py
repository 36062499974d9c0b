"""Every picture that kvtool draws. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from kvtool.files import write_durable
from kvtool.registry import CACHES
from kvtool.ui.axes import bytes_text, log_axes, seconds_text
from kvtool.ui.drawing import drawing
from kvtool.ui.inert import visible

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008).
COLOURS = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255"
)  # fmt: skip
MARKERS = "os^DvPX<"
DASHES = ("--", ":", "-.", (0, (1, 4)), (0, (8, 2)), (0, (6, 2, 1, 2, 1, 2)), (0, (3, 3)))
MAX_INSIDE = 8  # names of lines within a panel; more stand beside it
NAME_HEIGHT = 0.19  # inches of a name in a list of more
MOST_WIDER = 3  # times that a line below others is widened; more would hide their neighbours
DASH = 5.0  # line widths, of each of several kinds that lie on each other
TOUCHING = 0.015  # of an axis: lines that are nearer to each other are seen as one

RATES = ("per", "cer", "ser")  # scores that are percentages of errors


def new_figure(width: float = 7.2, height: float = 4.4) -> tuple[Any, Any]:
    """A figure with one axes, in the house style."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


Write = Callable[[Path, bytes], None]


def save_figure(figure: Any, path: Path, write: Write | None = None) -> None:
    """Write the figure in the format of the suffix, durably. Raises FileError.

    Its texts are shown as they are, and not read as formulas: `$` is a letter like others.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower().lstrip("."), dpi=150)
    (write or write_durable)(path, buffer.getvalue())


@drawing()
def loss_plot(
    path: Path,
    log: Sequence[Mapping[str, Any]],
    score_name: str,
    loss_name: str = "",
    loss_floor: float = 0.0,
    title: str = "",
    write: Write | None = None,
) -> None:
    """The losses of training and of held-out data, `loss_name` of its figures, and the held-out
    score against steps, those of averaged weights too, if there are any; nothing if there is no
    step yet. Both axes begin at 0, so that a line that looks flat is flat."""
    steps = [row for row in log if "loss" in row]
    if not steps:
        return
    figure, axes = new_figure()
    axes.set_title(title, fontsize=10)
    axes.plot(
        [row["step"] for row in steps],
        [row["loss"] for row in steps],
        color=COLOURS[1],
        linewidth=1,
        label="loss in training",
    )
    held_out = {"held out": "valid", "held out, averaged weights": "averaged"}
    for i, (label, kind) in enumerate(held_out.items()):
        points = _points(log, kind, loss_name)
        if points:
            look = {"linewidth": 1.5 - 0.5 * i, "linestyle": "--"}
            _line(axes, 1 + 5 * i, f"loss, {label}", points, **look)
    if loss_floor:
        label = f"lowest loss that label smoothing leaves: {loss_floor:.2f}"
        axes.axhline(loss_floor, color="#777777", linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token", color=COLOURS[1])
    axes.set_ylim(bottom=0)
    drawn = [axes]
    name = score_name.upper() if len(score_name) <= 4 else score_name.replace("_", " ")
    name += " %" * (score_name in RATES)
    if _points(log, "valid", score_name):
        drawn.append(right := axes.twinx())
        right.spines["top"].set_visible(False)
        for i, (label, kind) in enumerate(held_out.items()):
            points = _points(log, kind, score_name)
            if points:
                _line(right, 2 + 3 * i, f"{name}, {label}", points, linewidth=1.5 - 0.5 * i)
        right.set_ylabel(f"held out: {name}", color=COLOURS[2])
        right.set_ylim(bottom=0)
    handles, labels = zip(
        *(entry for each in drawn for entry in zip(*each.get_legend_handles_labels(), strict=True)),
        strict=True,
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path, write)


def _points(log: Sequence[Mapping[str, Any]], kind: str, figure: str) -> list[tuple[int, float]]:
    """(step, figure) of the held-out figures of a kind; a log may have older ones without it."""
    return [(row["step"], row[kind][figure]) for row in log if figure in row.get(kind, ())]


@drawing()
def bench_plot(
    path: Path,
    times: Mapping[str, Sequence[tuple[int, Sequence[float]]]],
    memory: Mapping[str, Sequence[tuple[int, int]]],
    marks: Mapping[str, float],
    caption: str = "",
    title: str = "",
) -> None:
    """Two panels against the number of generated tokens, a line a kind: the median latency with its
    samples' spread, and the bytes that the cache occupies.

    `times` has (length, samples in seconds) for each kind, `memory` (length, bytes) for those that
    store something; `marks` a length for some kinds, drawn as a line. Where there is more of a kind
    than one, a name begins with what tells them apart, "bfloat16 static": a colour is a kind, and
    from the second on lines are broken, with hollow marks. Kinds that lie on each other share a
    line of all their colours.
    """
    from matplotlib.figure import Figure

    n_panels = 2 if memory else 1
    figure = Figure(figsize=(6.2 * n_panels, 4.8), layout="constrained")
    left, *right = figure.subplots(1, n_panels, squeeze=False)[0]
    ticks = sorted({n for points in times.values() for n, _ in points})
    for axes in (left, *right):
        _plain(axes)
        axes.set_xlabel("generated tokens")
    looks = _looks(list(times))
    medians = {
        kind: [(n, median(samples)) for n, samples in points] for kind, points in times.items()
    }
    _draw_kinds(left, medians, looks)
    clear = len(times) <= MAX_INSIDE  # of more, the bands would hide the lines
    for kind, points in times.items() if clear else ():
        left.fill_between(
            [n for n, _ in points],
            [min(samples) for _, samples in points],
            [max(samples) for _, samples in points],
            color=COLOURS[looks[kind].colour % len(COLOURS)],
            alpha=0.15,
            linewidth=0,
        )
    for kind, length in marks.items():
        colour = COLOURS[looks[kind].colour % len(COLOURS)]
        left.axvline(length, color=colour, linestyle=":", linewidth=1.2)
    log_axes(left, ticks, seconds_text)
    left.set_ylabel("median time (band: all samples)" if clear else "median time")
    for axes in right:
        _draw_kinds(axes, memory, looks)
        log_axes(axes, ticks, bytes_text, base=2)
        axes.set_ylabel("memory of the cache")
    names = [_series(kind) for kind in times]  # lines are drawn in another order
    for axes in (left, *right):
        shown = [line for line in axes.lines if line.get_label() in names]
        shown.sort(key=lambda line: names.index(line.get_label()))
        if len(names) <= MAX_INSIDE:
            axes.legend(handles=shown, frameon=False, loc="best", handlelength=4)
    if len(names) > MAX_INSIDE:
        shown = [line for line in left.lines if line.get_label() in names]
        shown.sort(key=lambda line: names.index(line.get_label()))
        place: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "handlelength": 5}
        figure.set_figwidth(figure.get_figwidth() + 0.9 + 0.07 * max(map(len, names)))
        figure.set_figheight(max(figure.get_figheight(), 1 + NAME_HEIGHT * len(names)))
        figure.legend(handles=shown, fontsize=8.5, **place)
    if caption:
        figure.supxlabel(_wrapped(figure, caption), fontsize=8.5)
    entitle(figure, title)
    save_figure(figure, path)


def entitle(figure: Any, title: str) -> None:
    """Set the title, wrapped to the figure's width."""
    if title:
        figure.suptitle(_wrapped(figure, title), fontsize=9)


def _wrapped(figure: Any, text: str) -> str:
    """Lines as wide as the figure; matplotlib's own wrapping takes `$` for a formula's."""
    n_letters = int(figure.get_figwidth() * 13)  # of 9 points
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, n_letters))


def _draw_kinds(
    axes: Any, series: Mapping[str, Sequence[tuple[int, float]]], looks: Mapping[str, _Look]
) -> None:
    """A line for each kind. Those that lie on each other take turns along it, each with its dashes
    in the gaps of the others, and with marks in each other. Where dashes tell setups apart, the
    line below is wider and paler instead."""
    by_setup = any(look.group for look in looks.values())
    for group in together(series):
        for i, kind in enumerate(group):
            look, above = looks[kind], len(group) - 1 - i
            wider = above * min(1.0, MOST_WIDER / max(1, len(group) - 1))
            style: dict[str, Any] = {}
            if look.group:
                dashes = DASHES[(look.group - 1) % len(DASHES)]
                style |= {"markerfacecolor": "white", "linestyle": dashes}
            if len(group) > 1:
                style |= {"markersize": 5 + 4 * wider, "markerfacecolor": "none"}
            if len(group) > 1 and by_setup:
                style |= {"linewidth": 1.5 + 3 * wider, "alpha": 0.4 if above else 1.0}
            elif len(group) > 1:
                gap = DASH * (len(group) - 1)
                # A dash begins `-offset` points behind the start of the line.
                style["linestyle"] = ((len(group) - i) % len(group) * DASH, (DASH, gap))
                style["dash_capstyle"] = "butt"
            _line(axes, look.colour, _series(kind), series[kind], **style)


def together(series: Mapping[str, Sequence[tuple[int, float]]]) -> list[list[str]]:
    """The series in groups of those that lie on each other on logarithmic axes.

    >>> together({"a": [(1, 10.0), (2, 20.0)], "b": [(1, 30.0)], "c": [(1, 10.0), (2, 20.01)]})
    [['a', 'c'], ['b']]
    """
    values = [value for points in series.values() for _, value in points if value > 0]
    span = max(max(values) / min(values), 2.0) if values else 2.0
    close = span**TOUCHING
    groups: list[list[str]] = []
    for name, points in series.items():
        for group in groups:
            others = series[group[0]]
            same = [n for n, _ in points] == [n for n, _ in others]
            if same and all(
                a == b or max(a, b) <= close * min(a, b)
                for (_, a), (_, b) in zip(points, others, strict=True)
            ):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


class _Look(NamedTuple):
    colour: int
    group: int  # 0: a full line with full marks


def _looks(names: Sequence[str]) -> dict[str, _Look]:
    """How each series is drawn: a colour for its kind, the same in every figure, and broken lines
    from the second of a kind on."""
    parts = {name: name.rpartition(" ") for name in names}
    colours = _colours(list(dict.fromkeys(kind for *_, kind in parts.values())))
    groups = list(dict.fromkeys(group for group, *_ in parts.values()))
    return {n: _Look(colours[kind], groups.index(g)) for n, (g, _, kind) in parts.items()}


def _colours(kinds: Sequence[str]) -> dict[str, int]:
    """The place of each kind's colour: its name's, or of a second one of that name a free one."""
    own = {name: place for place, name in enumerate(CACHES)}
    found: dict[str, int] = {}
    for kind in kinds:
        place = own.pop(kind.partition(":")[0], None)
        if place is not None:
            found[kind] = place
    free = (place for place in count() if place not in set(found.values()))
    return {kind: found[kind] if kind in found else next(free) for kind in kinds}


def _series(name: str) -> str:
    """The series' name in the legend."""
    group, _, kind = name.rpartition(" ")
    what = "no cache" if kind == "none" else f"{kind} cache"
    return f"{group}, {what}" if group else what


def _line(
    axes: Any,
    i: int,
    label: str,
    points: Sequence[tuple[int, float]],
    **style: Any,
) -> None:
    """The line of the i-th kind, in its colour and with its marker."""
    marker, colour = MARKERS[i % len(MARKERS)], COLOURS[i % len(COLOURS)]
    look = {"color": colour, "markersize": 5, "linewidth": 1.5, **style}
    axes.plot(*zip(*points, strict=True), marker=marker, label=label, **look)


NOTHING = 1e-18  # where a gap of exactly 0 is drawn on a log axis


def gap_axes(
    axes: Any, lines: Mapping[str, Sequence[float]], names: Sequence[str], handles: dict[str, Any]
) -> None:
    """The gaps by step of one cache, a line a precision, coloured by its place in `names`; the
    lines are added to `handles`."""
    from matplotlib.ticker import MaxNLocator

    for name, gaps in lines.items():
        i = names.index(name)
        values = [min(max(gap, NOTHING), 1e3) for gap in gaps]
        (handles[name],) = axes.plot(
            values,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markevery=max(1, len(values) // 8),
            markersize=4,
            linewidth=1,
            linestyle="--" if name == "promoted" else "-",  # it lies upon float64's
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yscale("log")
    axes.set_ylim(NOTHING / 3, 30)
    axes.set_yticks([1, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15, NOTHING])
    axes.set_yticklabels(["1", "1e-3", "1e-6", "1e-9", "1e-12", "1e-15", "exactly 0"])
    axes.minorticks_off()
    axes.tick_params(labelbottom=True)


def gap_legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """The legend for the lines of `gap_axes`."""
    figure.supylabel("gap, cached against uncached", fontsize=10)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False
    )


@drawing()
def gap_plot(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], title: str = ""
) -> None:
    """The gap between cached and uncached logits by step: a panel a cache, a line a precision.

    Rounding falls by nine decades from float32 to float64, a bug stays where it is.
    """
    from matplotlib.figure import Figure

    n_columns = min(len(panels), 2) or 1
    n_rows = -(-len(panels) // n_columns) or 1
    figure = Figure(figsize=(4.2 * n_columns + 0.8, 2.6 * n_rows + 1.3), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles: dict[str, Any] = {}
    for axes, (panel, lines) in zip(grid.flat, panels.items(), strict=False):
        gap_axes(axes, lines, names, handles)
        axes.set_title(panel, fontsize=10)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    gap_legend(figure, handles)
    entitle(figure, title)
    save_figure(figure, path)
