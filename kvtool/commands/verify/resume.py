"""The rows of verify-cache as they are reached: written to a file, resumed, and reported when cut
short."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool import ending
from kvtool.commands.verify.report import CacheReport, NotRun, Row
from kvtool.config import RunConfig
from kvtool.ending import End
from kvtool.ui.environment import environment
from kvtool.ui.output import Output

if TYPE_CHECKING:
    from kvtool.core.verify.resume_log import ResumeLog

MAX_SHOWN = 3  # names of what was not run


class Rows:
    """The rows of the checks in `plan`, in that order; with `log` each is written at once.

    Use as a context manager: nobody else can write the file meanwhile. A row of a scenario that is
    not in the plan stands for all checks of its kind; in the file that is `whole` alone, of a kind
    that cannot be used. Raises FileError for a file with rows of other checks, with one twice, and
    with rows that contradict themselves.
    """

    def __init__(
        self,
        plan: Iterable[tuple[str, str, str]],
        log: ResumeLog[Row] | None,
        out: Output,
        whole: str = "",
    ) -> None:
        self.plan = [NotRun(*check) for check in plan]
        self.log = log
        self.found: dict[NotRun, Row] = {}
        self.control: Row | None = None  # the planted bug
        self.whole = whole
        if log is not None:
            log.require(self._take_known)
            note_resumed(log, out)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        if self.log is not None:
            self.log.__exit__()

    @property
    def known(self) -> set[tuple[str, str, str]]:
        """Cache, kernels and scenario of every row."""
        return {(row.cache, row.kernels, row.scenario) for row in self.found.values()}

    def add(self, row: Row) -> None:
        """Add a row, unless a signal came meanwhile, since it may be wrong then."""
        ending.check()
        self._take(row)
        if self.log is not None:
            self.log.append(row)

    def add_control(self, row: Row) -> None:
        """Add the row of the planted bug, which each run tries anew."""
        ending.check()
        self.control = row

    def _take_known(self, row: Row) -> bool:
        """Add a row of the file, if it is one that the command writes."""
        check = NotRun(row.cache, row.kernels, row.scenario)
        of_kind = [c for c in self.plan if (c.cache, c.kernels) == (row.cache, row.kernels)]
        if self.whole and row.scenario == self.whole:
            mine = row.beyond and bool(of_kind) and self.found.keys().isdisjoint(of_kind)
        else:
            mine = check in of_kind and check not in self.found
        if mine and is_coherent(row):
            self._take(row)
            return True
        return False

    def _take(self, row: Row) -> None:
        check = NotRun(row.cache, row.kernels, row.scenario)
        if check not in self.plan:
            at = next((i for i, c in enumerate(self.plan) if c.cache == row.cache), len(self.plan))
            self.plan = [c for c in self.plan if c.cache != row.cache]
            self.plan.insert(at, check)
        self.found[check] = row

    @property
    def rows(self) -> list[Row]:
        """The rows so far, in the order of the plan."""
        return [self.found[check] for check in self.plan if check in self.found]

    @property
    def not_run(self) -> list[NotRun]:
        """The checks of the plan that have no row."""
        return [check for check in self.plan if check not in self.found]

    def report(
        self,
        prompt_tokens: int,
        dtype: str,
        resolved: dict[str, Any],
        ended: End | None,
        out: Output,
    ) -> CacheReport:
        """The report of the rows. Raises Ended if a signal came before the first row."""
        if ended is not None:
            warn_ended(ended, len(self.found), len(self.plan), self.log, out)
        found = (self.rows, self.control, prompt_tokens, dtype, resolved)
        return CacheReport(*found, ended=ended, not_run=self.not_run, verbose=out.verbose)


def warn_ended(
    ended: End, done: int, total: int, log: ResumeLog[Any] | None, out: Output, what: str = "checks"
) -> None:
    """Say how far the interrupted work came, and how to resume it. Raises Ended if there is no
    row."""
    if not done:
        raise ending.Ended(ended)
    out.warn(f"{ended.value} after {done} of {total} {what}")
    if log is not None:
        out.note(f"--resume {log.path}: the same command goes on from here")


def is_coherent(row: Row) -> bool:
    """Whether a row's fields are consistent with the rules for verdicts.

    The promoted gap of a bug may be NaN: its logits may overflow.
    """
    gaps = {"working": row.gap, "float64": row.gap_float64, "promoted": row.gap_promoted}
    known = {name: gap for name, gap in gaps.items() if gap is not None}
    steps, same, first = row.steps, row.identical_steps, row.first_difference
    counts = [row.first_wrong_step or 0, row.layer or 0, *row.heads]
    return (
        _agrees(row)
        and all(n >= 0 for n in counts)
        and (0 <= same < steps and first in range(same + 1) if same != steps else first is None)
        and (steps > 0) == ("working" in known)
        and row.gap_by_step.keys() == known.keys()
        and len(row.gap_by_step.get("working", ())) == steps
        and all(_is_worst(g, row.gap_by_step[n], n == "promoted") for n, g in known.items())
        and row.max_ulp >= 0
        and (row.max_ulp > 0) == ((row.gap or 0) > 0) == (same != steps)
    )


def _is_worst(gap: float, by_step: list[float], nan: bool) -> bool:
    numbers = all(x >= 0 or (nan and math.isnan(x)) for x in by_step)
    return numbers and bool(by_step) and (gap == max(by_step) or (nan and math.isnan(gap)))


def _agrees(row: Row) -> bool:
    """Whether a verdict is known, and its row is right or not, and by gaps, as it says."""
    from kvtool.core.verify import outcome as o
    from kvtool.core.verify.compare import ROUNDING_64

    exact, promoted = row.gap_float64, row.gap_promoted
    differs, placed = row.identical_steps < row.steps, row.first_wrong_step is not None
    close = exact is None or exact <= ROUNDING_64  # the promoted run never overrides it
    judged = row.steps > 0 and not placed
    fits = {
        o.IDENTICAL: row.right and judged and close and not differs,
        # Without a clean float64 run, or against one, the evidence says what decided.
        o.ROUNDING: row.right == (row.kernels != "exact")
        and judged and differs
        and ((exact is not None and exact <= ROUNDING_64) or row.evidence != ""),
        o.PRECISION: row.right != placed and exact is not None and exact > ROUNDING_64
        and promoted is not None and (promoted <= ROUNDING_64 or row.right),
        o.LOSSY: row.right != placed and row.loss is not None and exact is not None
        and exact > ROUNDING_64,
        o.BUG: not row.right and placed and row.steps > 0,
        o.NOT_CAUSAL: not row.right and placed and row.steps > 0,
        o.UNDECIDED: not row.right and (differs or placed),
        o.VACUOUS: not row.right,
        o.NO_CACHE: not row.right and not row.stores,
        o.ERROR: not row.right,
        o.UNSUPPORTED: not row.right and not row.steps,
    }  # fmt: skip
    return fits.get(row.verdict, False)


def first_few(names: Sequence[str]) -> str:
    """The first names of what was not run, as many as a line holds.

    >>> first_few(["gpt2", "llama", "mamba", "opt", "t5"])
    'gpt2, llama, mamba and 2 more'
    """
    shown = names if len(names) <= MAX_SHOWN + 1 else names[:MAX_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def facts(check: str, run: RunConfig, **more: Any) -> dict[str, Any]:
    """The facts that a check depends on: machine, settings, versions, and `more`."""
    known = environment()
    machine = {name: known[name] for name in ("cpu", "threads", "kvtool", "commit", "torch")}
    return {"check": check, **more, "dtype": run.dtype, "seed": run.seed, **machine}


def resume_file(path: Path | None, found: dict[str, Any]) -> ResumeLog[Row] | None:
    """The file that --resume named. Raises FileError."""
    if path is None:
        return None
    from kvtool.core.verify.resume_log import ResumeLog

    return ResumeLog(path, Row, found)


def note_resumed(log: ResumeLog[Any], out: Output) -> None:
    """Say which rows are there already. A row that cannot be added is reported after the
    verdicts."""
    log.attempt = out.attempt
    if log.results:
        out.note(f"--resume {log.path}: {len(log.results)} results are there already")
