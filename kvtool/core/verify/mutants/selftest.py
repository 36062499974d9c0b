"""The self-test: every planted bug must be reported as what it is, and no right cache."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvtool.core.verify.arms import Case
from kvtool.core.verify.finding import Finding
from kvtool.core.verify.judge import Judge
from kvtool.core.verify.mutants import LOOKALIKES, MUTANTS, Lookalike, Mutant
from kvtool.core.verify.outcome import UNSUPPORTED
from kvtool.core.verify.scenarios import SCENARIOS


@dataclass(frozen=True)
class Trial:
    """The check's result for one planted bug, or one look-alike. None: does not apply."""

    name: str
    bug_class: int  # of BUG_CLASSES; 0: none of them
    seen_in: str  # where it happened
    scenario: str  # the one it is planted in, or that was loud about a look-alike
    expected: str  # the verdict
    found: str
    caught: bool | None = None
    step_right: bool | None = None
    layer_right: bool | None = None  # the layer, and what is wrong in it
    hint_right: bool | None = None
    quiet: bool | None = None  # a look-alike that no scenario reported
    detail: str = ""  # what was said; why a look-alike is right

    @property
    def ok(self) -> bool:
        """Whether nothing that the check had to say was wrong."""
        answers = (self.caught, self.step_right, self.layer_right, self.hint_right, self.quiet)
        return False not in answers


def names() -> list[str]:
    """What there is to try, mutants first; each has a name of its own."""
    return [planted.name for planted in (*MUTANTS, *LOOKALIKES)]


def run(
    progress: Callable[[str], None] = lambda name: None, skip: Container[str] = ()
) -> Iterator[Trial]:
    """Judge every mutant in its scenario and every look-alike in its own, mutants first, but
    for those whose names are in `skip`. progress is told the name of what comes next."""
    everything: tuple[Mutant | Lookalike, ...] = (*MUTANTS, *LOOKALIKES)
    for planted in everything:
        if planted.name not in skip:
            progress(planted.name)
            yield try_mutant(planted) if isinstance(planted, Mutant) else try_lookalike(planted)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch uses one thread. Small models gain nothing from more, and on two busy cores the
    self-test took 393 s with two threads, and 27 s with one."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


@one_thread()
def try_mutant(mutant: Mutant) -> Trial:
    """Judge a planted bug as a user would."""
    finding = Judge(mutant.subject(), mutant.due_doctor).judge(Case(SCENARIOS[mutant.scenario]))
    caught = finding.verdict == mutant.verdict and not finding.right
    place = (finding.diagnosis.layer, finding.diagnosis.part)
    said = in_one_line(finding)
    bugs, unexplained = finding.diagnosis.bugs, finding.diagnosis.unexplained
    named = mutant.hint in bugs if mutant.hint else bool(unexplained) and not bugs
    return Trial(
        mutant.name,
        mutant.bug_class,
        mutant.seen_in,
        mutant.scenario,
        mutant.verdict,
        finding.verdict,
        caught=caught,
        step_right=caught and finding.first_wrong == mutant.step,
        layer_right=caught and place == (mutant.layer, mutant.part) if mutant.part else None,
        hint_right=None if mutant.hint is None else caught and named,
        detail=said if caught else f"{said} ({caught_elsewhere(mutant)})",
    )


def caught_elsewhere(mutant: Mutant) -> str:
    """Which scenarios catch a mutant that its own does not."""
    judge = Judge(mutant.subject())
    names = [s.name for s in SCENARIOS.values() if judge.judge(Case(s)).verdict == mutant.verdict]
    return f"caught in {', '.join(names)}" if names else "no scenario catches it"


@one_thread()
def try_lookalike(lookalike: Lookalike) -> Trial:
    """Judge right behaviour in its scenarios: quiet if none of them reports it."""
    judge = Judge(lookalike.subject(), lookalike.doctor)
    findings = [judge.judge(Case(SCENARIOS[name])) for name in lookalike.scenarios or SCENARIOS]
    tried = [finding for finding in findings if finding.verdict != UNSUPPORTED]
    loud = [finding for finding in tried if not finding.right]
    verdicts = {finding.verdict for finding in loud or tried}
    as_expected = not lookalike.verdict or lookalike.verdict in verdicts
    return Trial(
        lookalike.name,
        0,
        "",
        loud[0].scenario if loud else f"{len(tried)} scenario{'s' * (len(tried) != 1)}",
        lookalike.verdict or "right",
        ", ".join(sorted(verdicts)),
        quiet=bool(tried) and not loud and as_expected,
        detail=in_one_line(loud[0]) if loud else lookalike.why,
    )


def in_one_line(finding: Finding) -> str:
    """A finding in a line: the place and the hint, or else the evidence."""
    diagnosis = finding.diagnosis
    known = filter(None, [diagnosis.place, diagnosis.hint])
    return "; ".join(known) or finding.evidence
