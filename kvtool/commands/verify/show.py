"""Shows the report of verify-cache: the table, every bug in words, and the plot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.commands.verify.report import CacheReport, Row
from kvtool.ui.environment import caption, measured_on
from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.commands.verify.check import Settings
    from kvtool.core.verify.target.picture import Picture

TITLE = "Cached against uncached logits, the same tokens fed to both"
Described = tuple[Column, Callable[[list[Row]], str]]  # a column, and its cell of some rows
BRIEF = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def show(report: CacheReport, out: Output) -> None:
    """A row for each scenario, one for all with equal results; then every bug in words."""
    title, columns, cells = table(report)
    if cells:  # an unfinished check may have found only what its subject cannot do
        out.table(title, columns, cells)
    looked_into, alike = apart(report.bugs)
    for first, *others in by_cause(looked_into):
        out.text(f"{first.name}: {first.verdict_text()}")
        for label, text in first.explained:
            out.text(f"  {label}{text}")
        if others:
            out.text(f"  the same in: {', '.join(row.scenario for row in others)}")
    if alike:
        out.text(f"wrong too, and not looked into: {', '.join(row.scenario for row in alike)}")
    if report.exit_code and not report.bugs and report.ended is None:
        vain = [row for row in report.checks if row.evidence and row.stores and not row.right]
        for text in dict.fromkeys(f"{row.cache}: {row.evidence}" for row in vain):
            out.text(text)
    out.verdict(None if report.ended else report.exit_code == 0, report.conclusion)


def apart(bugs: list[Row]) -> tuple[list[Row], list[Row]]:
    """The bugs to show one by one, and those of generated scenarios, with many steps, that were not
    looked into since a shorter one was."""
    from kvtool.core.verify.scenarios import GENERATED

    alike = [row for row in bugs if row.scenario in GENERATED and not (row.place or row.hint)]
    shown = [row for row in bugs if row not in alike]
    return (shown, alike) if shown else (bugs, [])


def by_cause(rows: list[Row]) -> list[list[Row]]:
    """Bugs of one kind of cache and kernels with one explanation, or without one in one place."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.bugs) or (row.verdict, row.place)
        groups.setdefault((row.cache, row.kernels, *key), []).append(row)
    return list(groups.values())


def draw(report: CacheReport, path: Path, settings: Settings) -> None:
    """The plot of the gap by step in three precisions; of the user's decoder, what each token sees
    too."""
    from kvtool.ui.plots import gap_plot
    from kvtool.ui.sight_map import Seen, sight_plot

    title, panels = gaps_title(report, settings), panels_of(report)
    if report.seen is None:
        gap_plot(path, panels, title)
    else:
        about = title.partition("\n")[2]
        sight_plot(path, Seen(*report.seen[1:7]), panels, f"{sight_title(report.seen)}\n{about}")


def gaps_plot(report: CacheReport, path: Path, settings: Any) -> None:
    """The plot of the gap by step, if there is one to draw."""
    from kvtool.ui.plots import gap_plot

    if any(map(has_gaps, report.checks)):
        gap_plot(path, panels_of(report), gaps_title(report, settings))


def gaps_title(report: CacheReport, settings: Any) -> str:
    """The title of the plot of the gap, and what it is of."""
    about = caption(measured_on(settings, report.resolved))
    return f"Cached against uncached logits, by step\n{about}"


def has_gaps(row: Row) -> bool:
    """Whether the gap is known step by step, of a kind that stores something."""
    return row.scenario == "decode" and row.stores and bool(row.gap_by_step)


def panels_of(report: CacheReport) -> dict[str, dict[str, list[float]]]:
    """The gap of each step of the scenario decode, by cache and by precision."""
    panels: dict[str, dict[str, list[float]]] = {}
    rows = [*report.checks, *([report.control] if report.control else [])]
    for row in rows:
        if has_gaps(row):
            lines = panels.setdefault(row.cache, {})
            for name, gaps in row.gap_by_step.items():
                working = f"{report.dtype}, {row.kernels} kernels"
                lines[working if name == "working" else name] = gaps
    return panels


def sight_title(seen: Picture) -> str:
    """The title of a map of what tokens see."""
    of_row = f", row {seen.row}" if seen.n_rows > 1 else ""
    return f"What each token sees, {seen.where}: {seen.scenario}{of_row}"


def table(report: CacheReport) -> tuple[str, list[Column], list[list[str]]]:
    """The title, the columns and the cells; what all checks have in common stands in the title.

    The gaps decide the verdict, so their columns are never left out.
    """
    spare = not report.verbose
    working = "" if report.dtype == "float64" else f" {report.dtype}"
    brief = f"gap{working}".replace(report.dtype, BRIEF.get(report.dtype, ""))
    common, columns = keys(report)
    columns += [
        (Column("verdict", "left"), lambda rows: rows[0].cell),
        (Column("identical steps", spare=1 * spare), identical),
        (Column("max ULP", spare=3 * spare), ulps),
        (Column(f"gap{working}", spare=2, brief=brief), partial(worst, name="gap")),
        (Column("float64", spare=2, brief="f64"), partial(worst, name="gap_float64")),
        (Column("promoted", spare=2, brief="prom."), partial(worst, name="gap_promoted")),
    ]
    title = f"{TITLE}: {', '.join(common)}" if common else TITLE
    cells = [[cell(group) for _, cell in columns] for group in grouped(report)]
    return title, [column for column, _ in columns], cells


def keys(report: CacheReport) -> tuple[list[str], list[Described]]:
    """The keys that all checks share, and the columns of those that differ."""
    common: list[str] = []
    columns: list[Described] = []
    caches = {row.cache for row in report.checks}
    kernels = {row.kernels for row in report.checks}
    if len(caches) == 1:
        common += caches
    else:
        columns.append((Column("cache", "left", key=True, by_word=True), lambda g: g[0].cache))
    if len(kernels) == 1:
        common += [f"{name} kernels" for name in kernels]
    else:
        columns.append((Column("kernels", "left", key=True), lambda g: g[0].kernels))

    def scenario(rows: list[Row]) -> str:
        if rows[0] is report.control and len(caches) == 1:
            return rows[0].cache  # that it is the planted bug stands nowhere else
        return rows[0].scenario if len(rows) == 1 else f"{len(rows)} more"

    return common, [*columns, (Column("scenario", "left", key=True), scenario)]


def grouped(report: CacheReport) -> list[list[Row]]:
    """Rows that a table shows as one: the same kind, kernels and good verdict. -v shows each."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    shown = [row for row in report.checks if report.verbose or not row.beyond]
    for row in [*shown, *([report.control] if report.control else [])]:
        single = row.scenario if report.verbose or row.wrong or row.scenario == "decode" else ""
        groups.setdefault((row.cache, row.kernels, row.verdict, single), []).append(row)
    return list(groups.values())


def identical(rows: list[Row]) -> str:
    """How many steps were equal to the last bit."""
    same, steps = sum(row.identical_steps for row in rows), sum(row.steps for row in rows)
    return f"{same:,} of {steps:,}" if steps else "-"


def ulps(rows: list[Row]) -> str:
    """The largest difference in units in the last place."""
    value = max(row.max_ulp for row in rows)
    if not any(row.steps for row in rows):
        return "-"
    return f"{value:,.1f}" if value < 1e5 else f"{value:.0e}"


def worst(rows: list[Row], name: str) -> str:
    """The largest of a gap, 0 if none differs, or a dash if it was not needed."""
    gaps = [value for row in rows if (value := getattr(row, name)) is not None]
    if not gaps:
        return "-"
    return f"{max(gaps):.1e}" if max(gaps) else "0"
