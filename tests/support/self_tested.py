"""What the self-test says of all that is planted, if it is right: tests hold each against it."""

from __future__ import annotations

from kvtool.core.verify.mutants import Lookalike, Mutant
from kvtool.core.verify.mutants.selftest import Trial
from kvtool.core.verify.scenarios import SCENARIOS


def caught(mutant: Mutant) -> Trial:
    """But for its detail."""
    return Trial(
        mutant.name,
        mutant.bug_class,
        mutant.seen_in,
        mutant.scenario,
        mutant.verdict,
        found=mutant.verdict,
        caught=True,
        step_right=True,
        layer_right=True if mutant.part else None,
        hint_right=None if mutant.hint is None else True,
    )


def passed(lookalike: Lookalike) -> Trial:
    """But for the number of scenarios, and for what may be identical or rounding."""
    n = len(lookalike.scenarios or SCENARIOS)
    return Trial(
        lookalike.name,
        0,
        "",
        f"{n} scenario{'s' * (n > 1)}",
        lookalike.verdict or "right",
        found=", ".join(sorted({lookalike.verdict or "rounding", "rounding"})),
        quiet=True,
        detail=lookalike.why,
    )
