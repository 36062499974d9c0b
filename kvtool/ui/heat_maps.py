"""Attention as heat maps. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvtool.ui.drawing import drawing
from kvtool.ui.plots import save_figure

CELL, LARGEST_CELL = 0.18, 0.4  # inches; the first has room for a label
USUAL, WIDEST = 7.0, 16.0  # inches, of all panels together; cells grow or shrink for them
GAP = 0.2  # inches between panels
LABEL = 14  # characters of a token that are shown
GREY, PALE = "#888888", "#d9d9d9"


class Mark(NamedTuple):
    """Cells (T,S) of all panels that mean something beside their weight, and what."""

    label: str
    cells: Sequence[Sequence[bool]]
    hatched: bool  # or else dotted


@drawing()
def attention_plot(
    path: Path,
    weights: Sequence[Sequence[Sequence[float]]],
    source: Sequence[str],
    target: Sequence[str],
    title: Sequence[str],
    named: tuple[str, str] = ("source tokens", "target tokens"),
    marks: Sequence[Mark] = (),
) -> None:
    """Attention weights (H,T,S) as heat maps: a panel a head, target down, source across.

    All panels share one scale, from 0 to the largest weight, rounded up to a tenth. `title` has
    lines, which are wrapped; `named` says what is across and down; marks with a cell have a legend.
    """
    from matplotlib.ticker import MaxNLocator

    top = math.ceil(10 * max(max(map(max, rows)) for rows in weights) - 1e-9) / 10
    fonts = _fonts("".join([*title, *source, *target]))
    with drawing(**{"font.family": fonts}):
        marks = [mark for mark in marks if any(map(any, mark.cells))]
        figure, grid, bar_axes, cell = _panels(
            len(weights), source, target, title, named, 0.3 * bool(marks)
        )
        for i, (axes, rows) in enumerate(zip(grid.flat, weights, strict=False)):
            image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
            axes.set_title(f"head {i + 1}", fontsize=9)
            axes.spines[:].set_color(GREY)
            _name_cells(axes.xaxis, source, cell, 90 if _upright(source) else 0)
            _name_cells(axes.yaxis, target, cell)
            style: dict[str, Any] = {"colors": "#e3e8ee", "linewidth": 0.5}
            axes.vlines([i - 0.5 for i in range(1, len(source))], *axes.get_ylim(), **style)
            axes.hlines([i - 0.5 for i in range(1, len(target))], *axes.get_xlim(), **style)
            for mark in marks:
                _draw_mark(axes, mark, cell)
            axes.xaxis.tick_top()
            axes.tick_params(length=0, labelleft=i % grid.shape[1] == 0)
        for axes in grid.flat[len(weights) :]:
            axes.set_visible(False)
        bar = figure.colorbar(image, cax=bar_axes)
        bar.set_label("attention weight", fontsize=9)
        inches = bar_axes.get_position().height * figure.get_figheight()
        bar.locator = MaxNLocator(max(1, min(5, int(inches / 0.3))))
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_edgecolor(GREY)
        if marks:
            _explain(figure, marks)
        save_figure(figure, path)


def _draw_mark(axes: Any, mark: Mark, cell: float) -> None:
    """Fill the cells of a mark with hatched grey, or put a dot into each."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    places = [(t, s) for t, row in enumerate(mark.cells) for s, marked in enumerate(row) if marked]
    if mark.hatched:
        squares = [Rectangle((s - 0.5, t - 0.5), 1, 1) for t, s in places]
        style: dict[str, Any] = {"facecolor": PALE, "edgecolor": GREY, "linewidth": 0}
        axes.add_collection(PatchCollection(squares, hatch="////", **style))
    else:
        across, down = [s for _, s in places], [t for t, _ in places]
        axes.scatter(across, down, s=(9 * cell) ** 2, color="#D55E00", linewidths=0)


def _explain(figure: Any, marks: Sequence[Mark]) -> None:
    """The legend of the marks, at the bottom."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=PALE, edgecolor=GREY, hatch="////", label=mark.label)
        if mark.hatched
        else Line2D([], [], marker=".", color="#D55E00", linestyle="", label=mark.label)
        for mark in marks
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=8.5)


def _panels(
    n_panels: int,
    source: Sequence[str],
    target: Sequence[str],
    title: Sequence[str],
    named: tuple[str, str],
    spare_below: float,
) -> tuple[Any, Any, Any, float]:
    """A figure with a grid of axes whose cells are squares, the axes of a colour bar, and the side
    of a cell in inches. No layout engine: it would leave gaps around panels of a fixed shape."""
    from matplotlib.figure import Figure

    n_rows, n_columns = _grid(n_panels, len(target), len(source))
    across, down = n_columns * len(source), n_rows * len(target)
    cell = min(max(CELL, min(LARGEST_CELL, USUAL / across)), WIDEST / across, WIDEST / down)
    wide, tall = cell * len(source), cell * len(target)
    above = 0.35 + (_label_inches(source, cell) if _upright(source) else 0.15)  # of each panel
    grid_width = n_columns * (wide + GAP) - GAP
    grid_height = n_rows * (above + tall) - above
    left, right, below = 0.5 + _label_inches(target, cell), 1.0, 0.4 + spare_below
    spare = max(0.0, 5.0 - left - grid_width - right) / 2  # room for the title
    left, right = left + spare, right + spare
    width = left + grid_width + right
    lines = [part for line in title for part in textwrap.wrap(line, int(width / 0.1))]
    height = below + grid_height + above + 0.2 * len(lines)
    figure = Figure(figsize=(width, height))
    edges = {"left": left, "right": left + grid_width}
    sides = {"bottom": below, "top": below + grid_height}
    grid = figure.subplots(
        n_rows,
        n_columns,
        squeeze=False,
        gridspec_kw={
            **{name: inches / width for name, inches in edges.items()},
            **{name: inches / height for name, inches in sides.items()},
            "wspace": GAP / wide,
            "hspace": above / tall,
        },
    )
    at = ((left + grid_width + GAP) / width, below / height, 0.15 / width, grid_height / height)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9}
    figure.text((left + grid_width / 2) / width, (below - 0.2) / height, named[0], **style)
    middle = (below + grid_height / 2) / height
    figure.text((spare + 0.2) / width, middle, named[1], **style, rotation=90)
    figure.suptitle("\n".join(lines), y=1 - 0.1 / height, va="top", fontsize=11)
    return figure, grid, figure.add_axes(at), cell


def _grid(n_panels: int, tall: int, wide: int) -> tuple[int, int]:
    """Rows and columns of panels that make a picture of about 3 to 2, with few places empty."""

    def badness(n_columns: int) -> float:
        n_rows = -(-n_panels // n_columns)
        shape = math.log(n_columns * (wide + 1) / (n_rows * (tall + 3)) / 1.5)
        return abs(shape) + 4 * (n_rows * n_columns - n_panels) / n_panels

    best = min(range(1, n_panels + 1), key=badness)
    return -(-n_panels // best), best


def _upright(tokens: Sequence[str]) -> bool:
    """Whether names on the horizontal axis must be rotated to fit side by side."""
    return max(map(len, tokens)) > 2


def _label_size(cell: float) -> int:
    """The font size, in points, for cells of this size."""
    return 8 if cell > 0.15 else 6


def _label_inches(tokens: Sequence[str], cell: float) -> float:
    return 0.7 * _label_size(cell) / 72 * min(LABEL, max(map(len, tokens)))


def _name_cells(axis: Any, tokens: Sequence[str], cell: float, rotation: int = 0) -> None:
    """Name the cells of an axis, all of them, or as many as have room."""
    size = _label_size(cell)
    every = math.ceil(1.3 * size / 72 / cell)
    names = [t if len(t) <= LABEL else t[: LABEL - 1] + "…" for t in tokens]
    places = range(0, len(tokens), every)
    axis.set_ticks(places, names[::every], fontsize=size, rotation=rotation, parse_math=False)


def _fonts(text: str) -> list[str]:
    """The house font, and installed ones for the characters that it lacks."""
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    families = ["DejaVu Sans"]
    missing = set(map(ord, text)) - FT2Font(findfont(families[0])).get_charmap().keys()
    for font in fontManager.ttflist if missing else []:
        if font.name not in families and not font.name.startswith("Last Resort"):
            found = missing & FT2Font(font.fname).get_charmap().keys()
            families += [font.name] if found else []
            missing -= found
    return families
