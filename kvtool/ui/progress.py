"""A progress bar that fits in 60 columns, or nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from kvtool.ui.inert import in_a_line

WIDE = 90  # columns of a terminal in which the bar takes what is left over
BAR, WORDS = 12, 12  # columns of a bar in others, and what words need to say anything


class Progress:
    """The interface for progress. This one is silent, for pipes and -q."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more as done."""

    def update(self, text: str = "", **fields: Any) -> None:
        """Show a few words or figures beside the bar, such as `update(loss=1.25)`."""


class _Bar(Progress):
    def __init__(self, progress: Any, task: Any) -> None:
        self._progress = progress
        self._task = task

    def advance(self, n: int = 1) -> None:
        self._progress.advance(self._task, n)

    def update(self, text: str = "", **fields: Any) -> None:
        words = [text] if text else []
        words += [f"{name} {_figure(value)}" for name, value in fields.items()]
        self._progress.update(self._task, words=in_a_line("  ".join(words)))


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def open_progress(
    console: Console | None, description: str, total: int | None
) -> Iterator[Progress]:
    """Show a bar on `console` while the block runs; without a console, count in silence."""
    if console is None:
        yield Progress()
        return
    from rich import progress as bars
    from rich.table import Column

    description = in_a_line(description)
    # What the words and the bar have too little room for must not be taken from the numbers.
    counts = 2 * len(str(total or 0)) + 1
    room = console.width - len(description) - BAR - counts - len("0:00:00") - len("00:00") - 5
    narrow = BAR if room >= 0 else max(BAR + room + 1, 1)
    layout = [
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=None if console.width >= WIDE else narrow),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(compact=True),
    ]
    if room >= WORDS:
        words = Column(no_wrap=True, max_width=room)
        dim: dict[str, Any] = {"style": "dim", "markup": False, "table_column": words}
        layout.append(bars.TextColumn("{task.fields[words]}", **dim))
    # Results go to stdout unchanged even while the bar is drawn, so rich must not redirect it.
    with bars.Progress(
        *layout, console=console, transient=True, redirect_stdout=False, refresh_per_second=8
    ) as shown:
        yield _Bar(shown, shown.add_task(description, total=total, words=""))
