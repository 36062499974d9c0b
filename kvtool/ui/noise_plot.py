"""The picture of a server's cache: the gap by position, beside the engine's noise and a fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from kvtool.ui.drawing import drawing
from kvtool.ui.plots import COLOURS, entitle, save_figure

Points = Sequence[tuple[int, float]]  # (position, nats)
MIN_GAP = 1e-9  # where a gap of exactly 0 is drawn


class ArmSeen(NamedTuple):
    """The data of an arm's panel, in nats."""

    name: str
    verdict: str
    gaps: Points
    floors: Points
    fault: float | None


class Words(NamedTuple):
    """The legend's names for the lower band, the upper one, and the dots."""

    floor: str = "the engine's own noise"
    fault: str = "a wrong token"
    gap: str = "cached against cold"


OF_A_CACHE = Words()


@drawing()
def noise_plot(
    path: Path, arms: Sequence[ArmSeen], title: str = "", words: Words = OF_A_CACHE
) -> bool:
    """A panel an arm: a dot for each cached answer, a band up to the engine's own noise at that
    position, and one from the size of a wrong token on -> whether there is an arm to draw."""
    from matplotlib.figure import Figure

    if not arms:
        return False
    n_columns = min(len(arms), 3)
    n_rows = -(-len(arms) // n_columns)
    figure = Figure(figsize=(3.4 * n_columns + 0.8, 2.6 * n_rows + 1.2), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True)
    least, most = _limits(arms)
    for axes, arm in zip(grid.flat, arms, strict=False):
        _panel(axes, arm, least, most, words)
    for axes in grid.flat[len(arms) :]:
        axes.set_visible(False)
    figure.supylabel("nats, over the likeliest tokens", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("tokens before the one compared")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    entitle(figure, title)
    save_figure(figure, path)
    return True


def _limits(arms: Sequence[ArmSeen]) -> tuple[float, float]:
    """The axis of all panels; a decade below the least that is not 0."""
    values = [value for arm in arms for _, value in (*arm.gaps, *arm.floors)]
    values += [arm.fault for arm in arms if arm.fault]
    finite = [value for value in values if 0 < value < float("inf")] or [1.0]
    return max(min(finite) / 10, MIN_GAP), max(finite) * 5


def _nats(value: float, _: int) -> str:
    """A tick's number: 1e-7, 1."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+00", "")


def _panel(axes: Any, arm: ArmSeen, least: float, most: float, words: Words) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    floors: dict[int, list[float]] = {}
    for position, value in arm.floors:
        floors.setdefault(position, []).append(value)
    positions = sorted(floors)
    heights = [max(median(floors[p]), least) for p in positions]
    axes.fill_between(
        positions, least, heights, step="mid", color=COLOURS[6], alpha=0.35, linewidth=0,
        label=words.floor,
    )  # fmt: skip
    if arm.fault:
        axes.axhspan(arm.fault, most, color=COLOURS[5], alpha=0.25, linewidth=0, label=words.fault)
    axes.plot(
        [position for position, _ in arm.gaps],
        [min(max(value, least), most) for _, value in arm.gaps],
        linestyle="none", marker="o", markersize=3, color=COLOURS[2], label=words.gap,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_nats))
    axes.minorticks_off()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_ylim(least, most)
    axes.set_title(f"{arm.name}: {arm.verdict}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
