"""The report of verify-cache: a row for each cache, kernels and scenario, and the conclusion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtool.ending import End
from kvtool.ui.cases import Case, Status, not_run

if TYPE_CHECKING:
    from kvtool.core.verify.check import Checked
    from kvtool.core.verify.outcome import Outcome, Summary
    from kvtool.core.verify.target.picture import Picture


NOT_TOLD = ("verbose", "seen")


@dataclass
class Row:
    """A kind of cache with some kernels in one scenario, against the uncached run.

    Steps count the calls of the model from 0. A gap is the largest difference over the largest
    logit; None was not needed for the verdict.
    """

    cache: str
    kernels: str
    scenario: str
    verdict: str
    right: bool
    evidence: str
    steps: int
    identical_steps: int
    first_difference: int | None
    max_ulp: float
    gap: float | None
    gap_float64: float | None
    gap_promoted: float | None
    first_wrong_step: int | None
    layer: int | None
    part: str
    heads: list[int]
    place: str
    hint: str
    bugs: list[str]  # known ones that reproduce the wrong logits
    gap_by_step: dict[str, list[float]]
    stores: bool = True
    not_judged: str = ""  # what of the cache something else stood in for: its codes
    loss: float | None = None  # of a cache that rounds: root mean square, over the logits'
    times_noise: float | None = None  # how far off, over the noise of the working format
    not_fed: str = ""  # what of the context was left out, since it would take too long
    layers: int = 0  # the first ones of a large model that were judged alone; 0: all

    @classmethod
    def of(cls, checked: Checked) -> Row:
        """The row of a check."""
        finding = checked.finding
        working, exact, promoted = finding.working, finding.float64, finding.promoted
        found = finding.diagnosis
        return cls(
            cache=checked.cache,
            kernels=checked.kernels,
            scenario=finding.scenario,
            verdict=finding.verdict,
            right=checked.right,
            evidence=finding.evidence,
            steps=working.steps if working else 0,
            identical_steps=working.identical if working else 0,
            first_difference=working.first if working else None,
            max_ulp=working.ulps if working else 0.0,
            gap=working.relative if working else None,
            gap_float64=exact.relative if exact else None,
            gap_promoted=promoted.relative if promoted else None,
            first_wrong_step=finding.first_wrong,
            layer=found.layer,
            part=found.part,
            heads=list(found.heads),
            place=found.place,
            hint=found.hint,
            bugs=list(found.bugs),
            gap_by_step=finding.by_step,
            stores=checked.stores,
            not_judged=checked.not_judged,
            loss=finding.loss,
            times_noise=finding.noise,
            not_fed=finding.not_fed,
            layers=checked.layers,
        )

    @property
    def outcome(self) -> Outcome:
        """The outcome of the verdict."""
        from kvtool.core.verify.outcome import outcome

        return outcome(self.verdict, self.right, self.stores)

    @property
    def wrong(self) -> bool:
        """Whether the check ran, and found a fault or could not decide."""
        return self.outcome.wrong

    @property
    def beyond(self) -> bool:
        """Whether the scenario is beyond the subject, which says so."""
        from kvtool.core.verify.outcome import UNSUPPORTED

        return self.verdict == UNSUPPORTED

    def verdict_text(self, short: bool = False) -> str:
        """The verdict, as a sentence says it, or short for a table."""
        from kvtool.core.verify.outcome import NOT_CAUSAL, ROUNDING

        step = self.first_wrong_step
        if self.verdict == ROUNDING and not self.right:
            return "not exact" if short else "rounding, not exact"
        if step is None or self.right:
            return self.verdict
        if self.verdict == NOT_CAUSAL and short:
            return self.verdict
        return f"{self.verdict}, step {step}"

    @property
    def name(self) -> str:
        """What was checked, in words."""
        return check_name(self.cache, self.kernels, self.scenario)

    @property
    def explained(self) -> list[tuple[str, str]]:
        """Why it is wrong, where, and what it does, each behind its label."""
        found = (("", self.evidence), ("where: ", self.place), ("what: ", self.hint))
        return [(label, text) for label, text in found if text]

    @property
    def gaps(self) -> str:
        """Its gaps in words, as far as they were computed."""
        names = ("gap", "gap_float64", "gap_promoted")
        known = [(name, getattr(self, name)) for name in names]
        return ", ".join(
            f"{name.replace('_', ' ')} {gap:.1e}" for name, gap in known if gap is not None
        )

    def case(self, in_vain: bool) -> Case:
        """The check as a case. in_vain: nothing at all was proved of its kind of cache."""
        from kvtool.core.verify.outcome import NO_CACHE, Outcome

        if self.outcome == Outcome.RIGHT:
            return Case(self.name, Status.PASSED, self.verdict)
        if self.wrong:
            found = "; ".join([self.verdict_text(), *(f"{a}{b}" for a, b in self.explained)])
            lines = [self.verdict_text(), *(f"{a}{b}" for a, b in self.explained), self.gaps]
            detail = "\n".join(filter(None, lines))
            return Case(self.name, Status.FAILED, self.verdict, found, detail)
        failed = self.outcome == Outcome.NOTHING and in_vain
        status = Status.FAILED if failed else Status.SKIPPED
        why = "stores nothing, and is there to be compared with"
        said = why if self.verdict == NO_CACHE else self.evidence
        return Case(self.name, status, self.verdict, f"{self.verdict}: {said or why}")

    @property
    def cell(self) -> str:
        """The verdict in a table, with a mark for what was not judged."""
        short = self.verdict_text(short=True)
        return f"{short}, {self.not_judged} not judged" if self.not_judged else short


def check_name(cache: str, kernels: str, scenario: str) -> str:
    """What a check is called, in words."""
    return f"{cache}, {kernels} kernels, {scenario}"


@dataclass(frozen=True)
class NotRun:
    """A check that was not run."""

    cache: str
    kernels: str
    scenario: str


@dataclass
class CacheReport:
    """All rows, and whether the check found the bug that was planted to test it."""

    checks: list[Row]
    control: Row | None
    prompt_tokens: int
    dtype: str
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open
    seconds: float = 0.0
    ended: End | None = None  # by what, so that checks are missing
    not_run: list[NotRun] = field(default_factory=list)
    verbose: bool = field(default=False, repr=False)
    seen: Picture | None = field(default=None, repr=False)  # to be drawn, of the user's decoder

    @property
    def summary(self) -> Summary[Row]:
        """All rows in counts."""
        from kvtool.core.verify.outcome import Summary

        return Summary(self.checks, self.control.outcome if self.control else None)

    @property
    def bugs(self) -> list[Row]:
        """The rows that are wrong."""
        return self.summary.wrong

    @property
    def vacuous(self) -> list[str]:
        """Kinds that store something, and were only checked in vain."""
        return self.summary.unjudged_kinds

    @property
    def judged(self) -> list[Row]:
        """The rows that are right."""
        return self.summary.right

    @property
    def exit_code(self) -> int:
        """That of a signal; else 0 if all that was judged is right, else 1."""
        if self.ended is not None:
            return self.ended.exit_code
        return 0 if self.summary.ok else 1

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        if self.ended is None:
            return self._found()
        found = self._found() if self.bugs or self.judged else ""
        return "; ".join(filter(None, [found, self._left(self.ended)]))

    def _found(self) -> str:
        found = self._found_of_layers()
        layers = self.resolved.get("layers")
        what = "the first layer" if layers == 1 else f"the first {layers} layers"
        return f"{found}; judged: {what} alone" if layers else found

    def _found_of_layers(self) -> str:
        if self.bugs:
            kinds = dict.fromkeys((row.cache, row.verdict) for row in self.bugs)
            worst = [f"{kind}: {self._worst(kind, verdict)}" for kind, verdict in kinds]
            return "; ".join(worst + self._put_aside() + self._left_out())
        if self.ended is None and (vain := self._nothing()):
            return vain
        kernels = dict.fromkeys(row.kernels for row in self.judged)
        parts = [f"{name} kernels: {self._steps(name)}" for name in kernels]
        control = ["the planted bug was found"] * (self.control is not None)
        return "; ".join(parts + self._in_vain() + self._put_aside() + control + self._left_out())

    def _nothing(self) -> str:
        """The reason why the findings prove nothing; "" if they do."""
        if not self.summary.trustworthy:
            return "the check failed: it did not report the bug that was planted to test it"
        if self.vacuous:
            return f"nothing was checked of {', '.join(self.vacuous)}"
        if not self.judged:
            return "nothing was checked: no kind of cache was given that stores anything"
        return ""

    def _left(self, ended: End) -> str:
        """How far it came, and what was not run."""
        total = len(self.checks) + len(self.not_run)
        parts = [f"{ended.value} after {len(self.checks)} of {total} checks"]
        kinds = dict.fromkeys(check.cache for check in self.not_run)
        if kinds:
            parts.append(f"not run: {', '.join(self._left_of(kind) for kind in kinds)}")
        if self.control is None:
            parts.append("the planted bug was not tried")
        return "; ".join(parts)

    def _left_of(self, cache: str) -> str:
        """A kind that was not run, or its scenarios that were not."""
        left = [check for check in self.not_run if check.cache == cache]
        if all(row.cache != cache for row in self.checks):
            return cache
        kernels = dict.fromkeys(check.kernels for check in left)
        many = len({row.kernels for row in self.checks} | kernels.keys()) > 1
        parts = []
        for name in kernels:
            names = [check.scenario for check in left if check.kernels == name]
            some = any((row.cache, row.kernels) == (cache, name) for row in self.checks)
            words = ", ".join(names) if len(names) < 4 else f"{len(names)} scenarios"
            parts.append(" ".join([name] * many + [f"({words})"] * some))
        return f"{cache} {' and '.join(parts)}"

    def _in_vain(self) -> list[str]:
        """Scenarios that proved nothing, of kinds that others did prove right."""
        rows = self.summary.proved_nothing
        return [f"{row.cache}, {row.scenario}: proved nothing" for row in rows]

    def _left_out(self) -> list[str]:
        """The scenarios that are beyond all subjects, and why; what of the context was left out,
        since it would take too long."""
        from kvtool.core.verify.left_out import Judged, cut_short, left_out

        skipped = [(row.scenario, row.evidence) for row in self.checks if row.beyond]
        said = left_out(skipped, [row.scenario for row in self.checks if not row.beyond])
        less = cut_short(
            Judged(row.scenario, row.kernels, row.layers, row.not_fed) for row in self.judged
        )
        return [*filter(None, [said]), *(f"{part} (--thorough for more)" for part in less)]

    def _put_aside(self) -> list[str]:
        """The parts of judged caches that were not judged, since exact values replaced them."""
        rows = [row for row in (*self.judged, *self.bugs) if row.not_judged]
        parts = dict.fromkeys((row.cache, row.not_judged) for row in rows)
        return [f"{cache}: its {part} were not judged" for cache, part in parts]

    def _worst(self, kind: str, verdict: str) -> str:
        from kvtool.core.verify.outcome import LOSSY, PRECISION

        rows = [row for row in self.bugs if (row.cache, row.verdict) == (kind, verdict)]
        names = list(dict.fromkeys(row.scenario for row in rows))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        why = " (the cache stores lower)" if verdict == PRECISION else ""
        lost = [row.loss for row in rows if row.loss is not None]
        if verdict == LOSSY and lost:
            why = f", by {max(lost):.1e} (on purpose? --lossy says so)"
        return f"{rows[0].verdict_text()} in {names[0]}{more}{why}"

    def _steps(self, kernels: str) -> str:
        from kvtool.core.verify.outcome import IDENTICAL, LOSSY, ROUNDING

        rows = [row for row in self.judged if row.kernels == kernels]
        same, steps = sum(row.identical_steps for row in rows), sum(row.steps for row in rows)
        if same == steps:
            return f"{same:,} of {steps:,} steps identical, bit for bit"
        loose = [row for row in rows if row.verdict != IDENTICAL]
        lost = [row.loss for row in loose if row.verdict == LOSSY and row.loss is not None]
        if lost:
            return f"lossy as declared, by {max(lost):.1e} ({same:,} of {steps:,} steps identical)"
        precise = all(row.verdict == ROUNDING for row in loose)
        what = "rounding only" if precise else "rounding, or the model's own precision"
        return f"{what} ({same:,} of {steps:,} steps identical)"

    def rows(self) -> list[dict[str, Any]]:
        """Without the planted bug: it is no result, and the conclusion says that it was found."""
        return [{k: v for k, v in vars(row).items() if k != "gap_by_step"} for row in self.checks]

    def cases(self) -> list[Case]:
        """A case for each check, for the planted bug, and for what was not run."""
        vain = self.vacuous
        found = [row.case(row.cache in vain) for row in self.checks]
        if self.control is not None:
            wrong = self.control.wrong
            said = "" if wrong else "it was not reported, so the check proves nothing"
            status = Status.PASSED if wrong else Status.FAILED
            found.append(Case("the planted bug is found", status, self.control.verdict, said))
        if self.ended is None:
            return found
        left = [check_name(one.cache, one.kernels, one.scenario) for one in self.not_run]
        planted = ["the planted bug is found"] * (self.control is None)
        return found + not_run([*left, *planted], self.ended.value)

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        fields = {key: value for key, value in vars(self).items() if key not in NOT_TOLD}
        return {**fields, "exit_code": self.exit_code, "conclusion": self.conclusion}
