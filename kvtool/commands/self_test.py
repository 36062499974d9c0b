"""kvtool verify-cache --self-test: every known bug planted, to see that the check reports it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.config import RunConfig
    from kvtool.core.verify.selftest import Outcome


@dataclass(frozen=True)
class Settings:
    """The self-test has models of its own: only the machine's settings count."""

    run: RunConfig
    self_test: bool = True


@dataclass
class Report:
    """Planted bugs that have to be caught, and right caches that must not be reported."""

    planted: list[Outcome]
    lookalikes: list[Outcome]
    seconds: float
    verbose: bool

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in (*self.planted, *self.lookalikes) if not outcome.ok]

    @property
    def exit_code(self) -> int:
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
        return ", ".join(parts) + f" ({self.seconds:.0f} s)"

    def rows(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(outcome) for outcome in (*self.planted, *self.lookalikes)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "planted": [dataclasses.asdict(outcome) for outcome in self.planted],
            "lookalikes": [dataclasses.asdict(outcome) for outcome in self.lookalikes],
            "seconds": self.seconds,
            "exit_code": self.exit_code,
            "conclusion": self.conclusion,
        }


def count(outcomes: list[Outcome], name: str) -> str:
    """How many of those that a question applies to were answered rightly: 39 of 40."""
    answers = [answer for o in outcomes if (answer := getattr(o, name)) is not None]
    return f"{sum(answers)} of {len(answers)}"


def run(settings: Settings, out: Output) -> Report:
    """Plant them all, one after the other."""
    import time

    from kvtool.core.machine import prepare
    from kvtool.core.verify import selftest

    # Tiny models: a second thread would only be waited for.
    prepare(replace(settings.run, threads=settings.run.threads or 1))
    started = time.perf_counter()
    with out.progress("self-test", selftest.total()) as bar:

        def tell(name: str) -> None:
            bar.update(name)
            bar.advance()

        outcomes = selftest.run(tell)
    seconds = time.perf_counter() - started
    planted = [outcome for outcome in outcomes if outcome.quiet is None]
    lookalikes = [outcome for outcome in outcomes if outcome.quiet is not None]
    return Report(planted, lookalikes, seconds, out.verbose)


def show(report: Report, out: Output) -> None:
    """The table of mutants, that of look-alikes, and the sums."""
    columns = [
        Column("class", key=True),
        Column("planted bug", "left", key=True),
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
    out.table("Planted bugs, by class of bugs that happened", columns, rows)
    names = [Column("right, though it looks suspicious", "left", key=True)]
    right = [[o.name, o.found, mark(o.quiet)] for o in report.lookalikes]
    out.table("", [*names, Column("found", "left"), Column("quiet", "center")], right)
    for outcome in report.failed:
        out.text(f"{outcome.name} ({outcome.scenario}): {outcome.detail}")
    if report.verbose:
        for outcome in report.planted:
            out.text(f"{outcome.name} ({outcome.seen_in or 'not in the list'}): {outcome.detail}")
    out.verdict(report.exit_code == 0, report.conclusion)


def mark(answer: bool | None) -> str:
    """yes, NO, or a dash where the question does not apply."""
    return "-" if answer is None else ("yes" if answer else "NO")
