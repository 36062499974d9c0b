"""kvtool verify-cache --self-test: every known bug planted, to see that the check reports it."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool import ending
from kvtool.commands.verify.resume import facts, first_few, note_resumed, warn_ended
from kvtool.ending import End, until_ended
from kvtool.ui.cases import Case, not_run, status_of
from kvtool.ui.documents import check_writable
from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.config import RunConfig
    from kvtool.core.verify.mutants.selftest import Trial


@dataclass(frozen=True)
class Settings:
    """The self-test has models of its own: only the machine's settings count."""

    run: RunConfig
    resume: Path | None = None
    self_test: bool = True

    def __post_init__(self) -> None:
        if self.resume is not None:
            check_writable(self.resume, "--resume")


@dataclass
class SelfTestReport:
    """The report: planted bugs that must be caught, and right caches that must not be reported."""

    planted: list[Trial]
    lookalikes: list[Trial]
    seconds: float
    verbose: bool = field(repr=False)
    ended: End | None = None  # by what, so that some were not tried
    not_run: list[str] = field(default_factory=list)  # their names

    @property
    def failed(self) -> list[Trial]:
        """Planted bugs that were missed, and right caches that were reported."""
        return [outcome for outcome in (*self.planted, *self.lookalikes) if not outcome.ok]

    @property
    def exit_code(self) -> int:
        """That of a signal; else 0 if none failed, else 1."""
        if self.ended is not None:
            return self.ended.exit_code
        return 1 if self.failed or not self.planted else 0

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        n, others = len(self.planted), len(self.lookalikes)
        caught = sum(bool(outcome.caught) for outcome in self.planted)
        quiet = sum(bool(outcome.quiet) for outcome in self.lookalikes)
        parts = [
            f"{caught} of {n} planted bugs caught",
            f"step {count(self.planted, 'step_right')}",
            f"layer {count(self.planted, 'layer_right')}",
            f"hint {count(self.planted, 'hint_right')}",
            f"{others - quiet} of {others} right caches reported falsely",
        ]
        said = ", ".join(parts) + f" ({self.seconds:.0f} s)"
        if self.ended is None:
            return said
        done = n + others
        total = done + len(self.not_run)
        how = f"{self.ended.value} after {done} of {total} checks"
        return f"{said}; {how}; not run: {first_few(self.not_run)}"

    def rows(self) -> list[dict[str, Any]]:
        """The planted bugs, then the right caches."""
        return [dataclasses.asdict(outcome) for outcome in (*self.planted, *self.lookalikes)]

    def cases(self) -> list[Case]:
        """A case for each planted bug and each right cache, also for those that were not tried."""
        found = []
        for tried in (*self.planted, *self.lookalikes):
            said = f"expected {tried.expected}, found {tried.found}: {tried.detail}"
            status = status_of(tried.ok, not tried.ok)
            found.append(Case(tried.name, status, tried.found, said))
        return found if self.ended is None else found + not_run(self.not_run, self.ended.value)

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {
            "planted": [dataclasses.asdict(outcome) for outcome in self.planted],
            "lookalikes": [dataclasses.asdict(outcome) for outcome in self.lookalikes],
            "seconds": self.seconds,
            "ended": self.ended,
            "not_run": self.not_run,
            "exit_code": self.exit_code,
            "conclusion": self.conclusion,
        }


def count(outcomes: list[Trial], name: str) -> str:
    """How many right answers a question has among the cases that it applies to: 39 of 40."""
    answers = [answer for o in outcomes if (answer := getattr(o, name)) is not None]
    return f"{sum(answers)} of {len(answers)}"


def run(settings: Settings, out: Output) -> SelfTestReport:
    """Plant all bugs, one after the other."""
    import time

    from kvtool.core.machine import prepare
    from kvtool.core.verify.mutants import selftest
    from kvtool.core.verify.resume_log import ResumeLog

    # Tiny models: a second thread would only be waited for.
    prepare(replace(settings.run, threads=settings.run.threads or 1))
    started = time.perf_counter()
    log, names = None, selftest.names()
    found: dict[str, Trial] = {}
    if settings.resume is not None:
        conditions = facts("self-test", settings.run, tried=names)
        log = ResumeLog(settings.resume, selftest.Trial, conditions)
        log.require(lambda o: o.name in names and found.setdefault(o.name, o) is o)
        note_resumed(log, out)
    bars = out.progress("self-test", len(names))
    with log or nullcontext(), bars as bar, until_ended() as outcome:
        bar.advance(len(found))
        for tried in selftest.run(bar.update, found.keys()):
            ending.check()  # what was tried while a signal came may be wrong
            found[tried.name] = tried
            bar.advance()
            if log is not None:
                log.append(tried)
    left = [name for name in names if name not in found]
    if outcome.how is not None:
        warn_ended(outcome.how, len(found), len(names), log, out)
    outcomes = [found[name] for name in names if name in found]
    planted = [tried for tried in outcomes if tried.quiet is None]
    lookalikes = [tried for tried in outcomes if tried.quiet is not None]
    seconds = time.perf_counter() - started
    return SelfTestReport(planted, lookalikes, seconds, out.verbose, outcome.how, left)


def show(report: SelfTestReport, out: Output) -> None:
    """The table of mutants, that of look-alikes, and the sums."""
    columns = [
        Column("class", key=True),
        Column("planted bug", "left", key=True, by_word=True),
        Column("found", "left"),
        Column("caught", "center"),
        Column("step", "center"),
        Column("layer", "center"),
        Column("hint", "center"),
    ]
    rows = [
        [
            str(o.bug_class or "-"),
            o.name,
            o.found,
            *(mark(v) for v in (o.caught, o.step_right, o.layer_right, o.hint_right)),
        ]
        for o in report.planted
    ]
    if rows:
        out.table("Planted bugs, by class of bugs that happened", columns, rows)
    names = [Column("right, though it looks suspicious", "left", key=True)]
    right = [[o.name, o.found, mark(o.quiet)] for o in report.lookalikes]
    if right:
        out.table("", [*names, Column("found", "left"), Column("quiet", "center")], right)
    for outcome in report.failed:
        out.text(f"{outcome.name} ({outcome.scenario}): {outcome.detail}")
    if report.verbose:
        for outcome in report.planted:
            out.text(f"{outcome.name} ({outcome.seen_in or 'not in the list'}): {outcome.detail}")
    out.verdict(None if report.ended else report.exit_code == 0, report.conclusion)


def mark(answer: bool | None) -> str:
    """yes, NO, or a dash where the question does not apply."""
    return "-" if answer is None else ("yes" if answer else "NO")
