"""What the self-test finds of each planted bug, found once for all tests of a run."""

from __future__ import annotations

from kvtool.core.verify.mutants import Lookalike, Mutant, Planted, selftest
from kvtool.core.verify.mutants.selftest import Trial

TRY_MUTANT, TRY_LOOKALIKE = selftest.try_mutant, selftest.try_lookalike
FOUND: dict[str, Trial] = {}


def outcome_of(planted: Planted) -> Trial:
    """As `try_mutant` or `try_lookalike`."""
    if planted.name not in FOUND:
        if isinstance(planted, Mutant):
            FOUND[planted.name] = TRY_MUTANT(planted)
        else:
            assert isinstance(planted, Lookalike)
            FOUND[planted.name] = TRY_LOOKALIKE(planted)
    return FOUND[planted.name]
