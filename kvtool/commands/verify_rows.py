"""The rows of verify-cache as they are reached: kept in a file, gone on with, and cut short."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool import ending
from kvtool.commands.verify_report import NotRun, Report, Row
from kvtool.config import RunConfig
from kvtool.ending import End
from kvtool.ui.environment import environment
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.verify.kept import Kept

FEW = 3  # names of what was not run


class Rows:
    """The rows of the checks in `plan`, in that order; with `kept` each is written at once.

    Use as a context manager: nobody else can write the file meanwhile. A row of a scenario that is
    not in the plan stands for all checks of its kind.
    """

    def __init__(self, plan: Iterable[tuple[str, str, str]], kept: Kept[Row] | None) -> None:
        self.plan = [NotRun(*check) for check in plan]
        self.kept = kept
        self.found: dict[NotRun, Row] = {}
        self.control: Row | None = None  # the planted bug
        for row in kept.known if kept is not None else ():
            self._take(row)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        if self.kept is not None:
            self.kept.__exit__()

    @property
    def known(self) -> set[tuple[str, str, str]]:
        """Cache, kernels and scenario of every row."""
        return {(row.cache, row.kernels, row.scenario) for row in self.found.values()}

    def add(self, row: Row) -> None:
        """Take a row, unless a signal came while it was made: what it says may be wrong then."""
        ending.check()
        self._take(row)
        if self.kept is not None:
            self.kept.append(row)

    def add_control(self, row: Row) -> None:
        """Take what was found of the planted bug, which is tried anew in every run."""
        ending.check()
        self.control = row

    def _take(self, row: Row) -> None:
        check = NotRun(row.cache, row.kernels, row.scenario)
        if check not in self.plan:
            at = next((i for i, c in enumerate(self.plan) if c.cache == row.cache), len(self.plan))
            self.plan = [c for c in self.plan if c.cache != row.cache]
            self.plan.insert(at, check)
        self.found[check] = row

    @property
    def rows(self) -> list[Row]:
        return [self.found[check] for check in self.plan if check in self.found]

    @property
    def not_run(self) -> list[NotRun]:
        return [check for check in self.plan if check not in self.found]

    def report(
        self,
        prompt_tokens: int,
        dtype: str,
        resolved: dict[str, Any],
        ended: End | None,
        out: Output,
    ) -> Report:
        """What the rows come to. Raises Ended if a signal came before the first of them."""
        if ended is not None:
            tell_ended(ended, len(self.found), len(self.plan), self.kept, out)
        found = (self.rows, self.control, prompt_tokens, dtype, resolved)
        return Report(*found, ended=ended, not_run=self.not_run, verbose=out.verbose)


def tell_ended(
    ended: End, done: int, total: int, kept: Kept[Any] | None, out: Output, what: str = "checks"
) -> None:
    """Say how far work came that a signal ended, and how it goes on. Raises Ended if not far."""
    if not done:
        raise ending.Ended(ended)
    out.warn(f"{ended.value} after {done} of {total} {what}")
    if kept is not None:
        out.note(f"--resume {kept.path}: the same command goes on from here")


def first_few(names: Sequence[str]) -> str:
    """What was not run by name, as far as a line holds it.

    >>> first_few(["gpt2", "llama", "mamba", "opt", "t5"])
    'gpt2, llama, mamba and 2 more'
    """
    shown = names if len(names) <= FEW + 1 else names[:FEW]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def facts(check: str, run: RunConfig, **more: Any) -> dict[str, Any]:
    """What decides the results of a check; `more` beside the machine, its settings and versions."""
    known = environment()
    machine = {name: known[name] for name in ("cpu", "threads", "kvtool", "commit", "torch")}
    return {"check": check, **more, "dtype": run.dtype, "seed": run.seed, **machine}


def kept_rows(path: Path | None, found: dict[str, Any], out: Output) -> Kept[Row] | None:
    """The file that --resume named. Raises FileError."""
    if path is None:
        return None
    from kvtool.core.verify.kept import Kept

    return told(Kept(path, Row, found), out)


def told(kept: Kept[Any], out: Output) -> Kept[Any]:
    """Say what is there already; what cannot be added is told behind the verdicts."""
    kept.attempt = out.attempt
    if kept.known:
        out.note(f"--resume {kept.path}: {len(kept.known)} results are there already")
    return kept
