"""The process of a sweep that judges one type."""

from __future__ import annotations

import dataclasses
import os
import signal
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection

from kvtool.core.verify.check import Checked
from kvtool.core.verify.hf.task import NOT_BUILT, Swept, Task
from kvtool.core.verify.outcome import (
    BUG,
    ERROR,
    IDENTICAL,
    LOSSY,
    NOT_CAUSAL,
    PRECISION,
    ROUNDING,
    UNDECIDED,
    UNSUPPORTED,
    VACUOUS,
    Outcome,
)
from kvtool.errors import CheckFailed, UsageError, first_line, short_of_memory

# The worst first. A model that is not causal has wrong logits too, and that is why.
UNTRUSTWORTHY = "the check did not report the bug that was planted to test it"
ORDER = (
    NOT_CAUSAL, BUG, ERROR, LOSSY, PRECISION, UNDECIDED, ROUNDING, IDENTICAL, VACUOUS, UNSUPPORTED,
)  # fmt: skip


def limit_memory(n_bytes: int) -> None:
    """Let an allocation beyond that fail, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
    except (ImportError, ValueError, OSError):  # Windows has none; others may have a lower one
        pass


def judge(task: Task) -> Swept:
    """Build the type's tiny model, and judge it with every kind of cache that it takes."""
    from kvtool.core.verify.hf.check import check_transformers
    from kvtool.core.verify.hf.tiny import tiny_model

    try:
        model, note = tiny_model(task.type, task.seed, kind=task.kind)
    except UsageError as error:
        reason = error.message.removeprefix(f"{task.type}: ")
        return Swept(task.type, NOT_BUILT, False, reason)
    remarks: list[str] = []
    try:
        given = (model, task.caches, task.scenarios, task.tokens)
        checked = list(check_transformers(*given, diagnose=False, remark=remarks.append))
        note = joined(note, *remarks)
        swept = summary(task.type, checked, note)
        if swept.verdict == BUG:  # to locate one takes longer than to find all
            worst = worst_of(checked)
            again = check_transformers(model, [worst.cache], [worst.finding.scenario], task.tokens)
            place = next(iter(again)).finding.diagnosis.place
            swept = dataclasses.replace(swept, reason=joined(swept.reason, place))
        return swept
    except (CheckFailed, UsageError) as error:
        return Swept(task.type, ERROR, False, joined(note, error.message))
    except (Exception, SystemExit) as error:  # a model may raise anything: that is its result
        if short_of_memory(error):
            reason = f"there is not enough memory for it (within {task.memory / 2**30:.3g} GiB)"
            return Swept(task.type, NOT_BUILT, False, joined(note, reason))
        reason = f"{type(error).__name__}: {first_line(error)}"
        return Swept(task.type, ERROR, False, joined(note, reason))


def summary(name: str, checked: Sequence[Checked], note: str = "") -> Swept:
    """What the findings for all kinds of caches and scenarios come to, the planted bug included."""
    judged = [c for c in checked if not c.planted]
    kinds = {c.cache: [d for d in judged if d.cache == c.cache] for c in judged}
    verdicts = {cache: worst_of(of_kind).finding.verdict for cache, of_kind in kinds.items()}
    played = [c for c in judged if c.outcome != Outcome.SKIPPED]
    if not played:
        reasons = dict.fromkeys(c.finding.evidence for c in judged)
        return Swept(name, UNSUPPORTED, False, joined(note, *list(reasons)[:1]), by_cache=verdicts)
    worst = worst_of(played)
    found, right = worst.finding, worst.outcome == Outcome.RIGHT
    working, double, promoted = (
        gap and gap.relative for gap in (found.working, found.float64, found.promoted)
    )
    if right and checked[-1].outcome != Outcome.WRONG:
        found, right = dataclasses.replace(found, verdict=ERROR, evidence=UNTRUSTWORTHY), False
    reason = joined(note, "" if right else explained(worst, found.evidence, played))
    return Swept(name, found.verdict, right, reason, working, double, promoted, by_cache=verdicts)


def worst_of(checked: Sequence[Checked]) -> Checked:
    """The first of those whose verdict is the worst; what cannot be decided is worse than right."""

    def rank(c: Checked) -> tuple[bool, int]:
        return not c.outcome.wrong, ORDER.index(c.finding.verdict)

    return min(checked, key=rank)


def explained(worst: Checked, evidence: str, played: Sequence[Checked]) -> str:
    """Which scenarios came out like the worst, and why."""
    verdict = worst.finding.verdict
    alike = [c for c in played if c.finding.verdict == verdict and c.outcome == worst.outcome]
    if len(alike) == len(played):
        return evidence
    names = ", ".join(dict.fromkeys(c.finding.scenario for c in alike))
    caches = ", ".join(dict.fromkeys(c.cache for c in alike))
    return f"{caches} in {names}: {evidence}"


def joined(*parts: str) -> str:
    """The parts that say something, in one line."""
    return "; ".join(filter(None, parts))


def answer(task: Task, sender: Connection) -> None:
    """What the process runs: judge the type, and send what it came to."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides, and kills this one

    limit_memory(task.memory)
    torch.set_num_threads(task.threads)
    warnings.simplefilter("ignore")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # also what is written below Python
        os.dup2(nowhere, stream)
    sender.send(judge(task))
    sender.close()
