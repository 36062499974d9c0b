"""kvtool verify-cache --impl transformers --sweep: every model type that transformers knows."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.commands.verify.hf import chosen_scenarios
from kvtool.commands.verify.options import TIME_LIMIT
from kvtool.commands.verify.resume import facts, first_few, note_resumed, warn_ended
from kvtool.config import RunConfig, check_float, check_int
from kvtool.ending import End, until_ended
from kvtool.registry import TRANSFORMERS_CACHES, TRANSFORMERS_MODELS, choose
from kvtool.ui.cases import Case, not_run, status_of
from kvtool.ui.documents import check_writable
from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.core.verify.hf.task import Swept

QUANTIZED = "quantized"  # the kind of TRANSFORMERS_CACHES whose codes are replaced
TOKENS = 32  # of the scenario decode, enough to tell


@dataclass(frozen=True)
class Settings:
    """The settings. No types: all of them. No caches: all that a model takes."""

    run: RunConfig
    types: list[str]
    caches: list[str]
    scenarios: list[str]
    tokens: int = TOKENS
    time_limit: float = TIME_LIMIT
    resume: Path | None = None
    impl: str = "transformers"
    sweep: bool = True

    def __post_init__(self) -> None:
        check_int("--tokens", self.tokens, 2)
        check_float("--time-limit", self.time_limit, 0.0, 1e6, open_low=True)
        for kind in self.caches:
            choose(kind, tuple(TRANSFORMERS_CACHES), "--caches")
        if self.resume is not None:
            check_writable(self.resume, "--resume")


@dataclass
class SweepReport:
    """A result for each type."""

    types: list[Swept]
    transformers: str
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)
    ended: End | None = None  # by what, so that types are missing
    not_run: list[str] = field(default_factory=list)  # their names
    verbose: bool = field(default=False, repr=False)

    @property
    def kinds(self) -> dict[str, list[Swept]]:
        """The types by kind of model; kinds of which there is none are left out."""
        kinds = dict.fromkeys(TRANSFORMERS_MODELS)
        found = {kind: [s for s in self.types if s.kind == kind] for kind in kinds}
        return {kind: types for kind, types in found.items() if types}

    @property
    def counts(self) -> dict[str, int]:
        """How many types came to each verdict, in the order in which they are told."""
        return counted(self.types)

    @property
    def wrong(self) -> list[Swept]:
        """The types that are not right."""
        return [s for s in self.types if s.wrong]

    @property
    def exit_code(self) -> int:
        """That of a signal; else 0 if some type is right and none wrong, else 1."""
        if self.ended is not None:
            return self.ended.exit_code
        return 0 if any(s.right for s in self.types) and not self.wrong else 1

    @property
    def not_judged(self) -> dict[str, str]:
        """Kinds of cache with the part that was not judged."""
        from kvtool.core.verify.outcome import UNSUPPORTED

        verdicts = {swept.by_cache.get(QUANTIZED, UNSUPPORTED) for swept in self.types}
        return {QUANTIZED: "codes"} if verdicts - {UNSUPPORTED} else {}

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        sums = []
        for kind, types in self.kinds.items():
            judged = sum(swept.judged for swept in types)
            parts = ", ".join(f"{n} {verdict}" for verdict, n in counted(types).items())
            sums.append(f"{len(types)} {TRANSFORMERS_MODELS[kind]}, {judged} judged: {parts}")
        sums += [f"{kind}: its {part} were not judged" for kind, part in self.not_judged.items()]
        if self.ended is not None:
            total = len(self.types) + len(self.not_run)
            sums.append(f"{self.ended.value} after {len(self.types)} of {total} types")
            sums.append(f"not run: {first_few(self.not_run)}")
        return f"transformers {self.transformers}: {'; '.join(sums)}"

    def rows(self) -> list[dict[str, Any]]:
        """The types as flat rows."""
        return [
            {
                **dataclasses.asdict(s),
                "by_cache": ", ".join(f"{k} {v}" for k, v in s.by_cache.items()),
            }
            for s in self.types
        ]

    def cases(self) -> list[Case]:
        """A case for each type, also for those that were not run."""
        found = [
            Case(
                f"{TRANSFORMERS_MODELS[s.kind]}: {s.type}",
                status_of(s.right, s.wrong),
                s.verdict,
                f"{s.verdict}: {s.reason}" if s.reason else s.verdict,
                seconds=s.seconds,
            )
            for s in self.types
        ]
        return found if self.ended is None else found + not_run(self.not_run, self.ended.value)

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {
            "transformers": self.transformers,
            "types": [dataclasses.asdict(swept) for swept in self.types],
            "counts": self.counts,
            "counts_by_kind": {kind: counted(types) for kind, types in self.kinds.items()},
            "not_judged": self.not_judged,
            "ended": self.ended,
            "not_run": self.not_run,
            "seconds": self.seconds,
            "resolved": self.resolved,
            "conclusion": self.conclusion,
        }


def counted(types: Sequence[Swept]) -> dict[str, int]:
    """The counts of the verdicts of some types."""
    from kvtool.core.verify.hf.task import VERDICTS

    found = Counter(swept.verdict for swept in types)
    return {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}


def run(settings: Settings, out: Output) -> SweepReport:
    """Judge each type in a process of its own; what --resume's file has is not judged again."""
    import torch

    from kvtool.core.verify.hf import sweep, task
    from kvtool.core.verify.hf.library import known_types, need_transformers
    from kvtool.core.verify.resume_log import ResumeLog

    version = need_transformers()
    known = {kind: known_types(kind) for kind in TRANSFORMERS_MODELS}
    for name in settings.types:
        choose(name, sorted(set().union(*known.values())), "--types")
    scenarios = tuple(chosen_scenarios(settings.scenarios))
    caches = tuple(settings.caches or TRANSFORMERS_CACHES)
    started = time.perf_counter()
    # Tiny models: a second thread would only be waited for. It is set here too, to be recorded.
    threads = settings.run.threads or 1
    torch.set_num_threads(threads)
    given = (caches, scenarios, settings.tokens, settings.run.seed)
    tasks = [
        task.Task(name, *given, kind=kind, threads=threads)
        for kind, types in known.items()
        for name in settings.types or types
        if name in types
    ]
    log = None
    if settings.resume is not None:
        asked = {"caches": caches, "scenarios": scenarios, "tokens": settings.tokens}
        asked |= {"time_limit": settings.time_limit, "memory_limit": task.MEMORY}
        conditions = facts("sweep", settings.run, **asked, transformers=version)
        log = ResumeLog(settings.resume, task.Swept, conditions)
        first: dict[tuple[str, str], Swept] = {}
        log.require(
            lambda swept: (
                swept.type in known.get(swept.kind, ())
                and task.is_coherent(swept)
                and first.setdefault((swept.type, swept.kind), swept) is swept
            )
        )
        note_resumed(log, out)
    found: list[Swept] = []
    bars = out.progress("sweep", len(tasks))
    with log or nullcontext(), bars as bar, until_ended() as outcome:
        for swept in sweep.sweep(tasks, settings.time_limit, log, bar.update):
            found.append(swept)
            bar.advance()
            out.detail(
                f"{swept.type}: {swept.verdict}" + (f", {swept.reason}" if swept.reason else "")
            )
    resolved = {"caches": caches, "scenarios": scenarios, "memory_limit": task.MEMORY}
    if outcome.how is not None:
        warn_ended(outcome.how, len(found), len(tasks), log, out, "types")
    left = [left.type for left in tasks[len(found) :]]
    seconds = time.perf_counter() - started
    return SweepReport(found, version, seconds, resolved, outcome.how, left, out.verbose)


def show(report: SweepReport, out: Output) -> None:
    """A table for each kind of model with a row for each type, and the sums."""
    columns = [
        Column("type", "left", key=True),
        Column("verdict", "left"),
        Column("gap"),
        Column("float64"),
        Column("promoted"),
        Column("seconds"),
        Column("reason", "left"),
    ]
    for kind, types in report.kinds.items():
        rows = [
            [
                s.type,
                s.verdict,
                *(figure(gap) for gap in (s.gap, s.gap_float64, s.gap_promoted)),
                f"{s.seconds:.0f}",
                s.reason or "-",
            ]
            for s in types
        ]
        title = f"Cached against uncached logits, tiny random {TRANSFORMERS_MODELS[kind]}"
        out.table(title, columns, rows)
    out.verdict(None if report.ended else report.exit_code == 0, report.conclusion)


def figure(gap: float | None) -> str:
    """A gap for the table; a dash where there is none."""
    return "-" if gap is None else (f"{gap:.1e}" if gap else "0")
