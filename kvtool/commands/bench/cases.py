"""The rows that --fail-if decides, as cases."""

from __future__ import annotations

from kvtool.commands.bench.compare import Comparison
from kvtool.ui.cases import Case, Status


def limit_cases(comparison: Comparison) -> list[Case]:
    """A case for each row of the baseline or of this run; none without a limit."""
    if not comparison.limits:
        return []
    failed: dict[str, list[str]] = {}
    for sentence in comparison.regressions:
        name, colon, said = sentence.partition(": ")
        if colon:
            failed.setdefault(name, []).append(said)
    found = []
    for change in comparison.changes:
        if change.name not in failed:
            found.append(Case(change.name, Status.PASSED, seconds=change.now_s))
    for name, limits in failed.items():
        lines = "\n".join(limits)
        found.append(Case(name, Status.FAILED, "regression", "; ".join(limits), lines))
    for sentence in comparison.not_in_baseline:
        name, _, said = sentence.partition(": ")
        found.append(Case(name, Status.SKIPPED, "new", said))
    return found
