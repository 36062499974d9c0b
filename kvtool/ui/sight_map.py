"""What each token sees, through a cache and without it. matplotlib is imported when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvtool.ui.drawing import drawing
from kvtool.ui.plots import COLOURS, entitle, gap_axes, gap_legend, save_figure

SEEN, WRONG, NONE, PADDING = COLOURS[6], COLOURS[2], "#f4f4f4", "#cccccc"
SIDE = 4.4  # inches of a map
GAPS = 2.8  # inches of the gaps below
CAPTIONS = 1.5  # inches of titles, labels and legends


class Seen(NamedTuple):
    """The data of a map: a mark for each query and key. 0: not seen, 1: seen, 2: hidden by the
    cache alone, 3: shown by it alone. The keys below `padding` are left padding."""

    queries: Sequence[int]
    steps: Sequence[int]  # of each query
    keys: Sequence[int]
    uncached: Sequence[Sequence[int]]
    cached: Sequence[Sequence[int]]
    padding: int


@drawing()
def sight_plot(
    path: Path, seen: Seen, panels: Mapping[str, Mapping[str, Sequence[float]]], title: str = ""
) -> None:
    """Two maps, a row for each token that looks and a column for each that is looked at; below them
    the gap by step, if there is one."""
    from matplotlib.figure import Figure

    tall = SIDE * min(max(len(seen.queries) / len(seen.keys), 0.4), 1.3)
    height = CAPTIONS + tall + (GAPS if panels else 0)
    figure = Figure(figsize=(2 * SIDE + 0.8, height), layout="constrained")
    above: Any = figure
    if panels:
        parts: Any = figure.subfigures(2, 1, height_ratios=[tall + CAPTIONS - 0.4, GAPS])
        above = parts[0]
        _gaps(parts[1], panels)
    left, right = above.subplots(1, 2, sharey=True)
    _map(left, seen, seen.uncached, "without a cache")
    _map(right, seen, seen.cached, "through the cache")
    cut = f"the last {len(seen.queries)}: " if seen.queries[0] > seen.padding else ""
    left.set_ylabel(f"{cut}token that looks; a line parts two steps", fontsize=9)
    _legend(above, seen)
    entitle(figure, title)
    save_figure(figure, path)


def _map(axes: Any, seen: Seen, marks: Sequence[Sequence[int]], title: str) -> None:
    """One map, its steps apart from each other."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    faces = {0: NONE, 1: SEEN, 2: "#ffffff", 3: WRONG}
    cells: dict[int, list[Any]] = {mark: [] for mark in faces}
    for y, row in enumerate(marks):
        for x, mark in enumerate(row):
            cells[mark].append(Rectangle((x + 0.06, y + 0.06), 0.88, 0.88))
    for mark, patches in cells.items():
        edge = WRONG if mark == 2 else "none"
        axes.add_collection(
            PatchCollection(patches, facecolor=faces[mark], edgecolor=edge, linewidth=1.0)
        )
    for y in range(1, len(seen.steps)):
        if seen.steps[y] != seen.steps[y - 1]:
            axes.axhline(y, color="#999999", linewidth=0.6)
    n_pads = sum(key < seen.padding for key in seen.keys)
    if n_pads:
        axes.axvspan(0, n_pads, facecolor="none", edgecolor=PADDING, hatch="////", linewidth=0)
    axes.set_xlim(0, len(seen.keys))
    axes.set_ylim(len(seen.queries), 0)
    axes.set_aspect("equal")
    _ticks(axes.xaxis, seen.keys)
    _ticks(axes.yaxis, seen.queries)
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    missing = left_out(seen.keys)
    for x in missing:
        axes.axvline(x, color="#333333", linewidth=0.8, linestyle=":")
    said = "; dotted: others are left out" if missing else ""
    axes.set_xlabel(f"token that is looked at{said}", fontsize=9)
    axes.set_title(title, fontsize=10)


def left_out(keys: Sequence[int]) -> list[int]:
    """In front of which columns there are tokens that were not tried, or have no room."""
    return [x for x, key in enumerate(keys) if key != (keys[x - 1] + 1 if x else 0)]


def _ticks(axis: Any, tokens: Sequence[int]) -> None:
    """The numbers of some of the tokens, in the middle of their cells."""
    every = max(1, -(-len(tokens) // 16))
    axis.set_ticks([i + 0.5 for i in range(0, len(tokens), every)], tokens[::every])


def _legend(figure: Any, seen: Seen) -> None:
    from matplotlib.patches import Patch

    marks = {mark for row in seen.cached for mark in row}
    handles = [Patch(facecolor=SEEN, label="seen"), Patch(facecolor=NONE, label="not seen")]
    if 2 in marks:
        label = "hidden by the cache, wrongly"
        handles.append(Patch(facecolor="#ffffff", edgecolor=WRONG, label=label))
    if 3 in marks:
        handles.append(Patch(facecolor=WRONG, label="shown by the cache, wrongly"))
    if seen.padding:
        handles.append(
            Patch(facecolor="none", edgecolor=PADDING, hatch="////", label="left padding")
        )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )


def _gaps(figure: Any, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """The gap by step in each precision."""
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles: dict[str, Any] = {}
    for axes, (panel, lines) in zip(grid.flat, panels.items(), strict=True):
        gap_axes(axes, lines, names, handles)
        axes.set_title(f"gap by step: {panel}", fontsize=10)
        axes.tick_params(labelsize=8)
    gap_legend(figure, handles)
