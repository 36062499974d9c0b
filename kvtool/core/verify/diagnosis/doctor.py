"""From a bug that was seen to the place where it is and the kind that it is, for models of ours."""

from __future__ import annotations

from kvtool.core.verify.diagnosis.hypotheses import UNKNOWN, explain
from kvtool.core.verify.diagnosis.locate import locate
from kvtool.core.verify.judge import Case, Diagnosis, Played
from kvtool.core.verify.subject import ModelSubject

BEYOND = 6  # steps behind the first wrong one that a hypothesis has to reproduce too


def examine(subject: ModelSubject, case: Case, step: int, played: Played) -> Diagnosis:
    """Locate the first wrong thing at `step`, and try out what would give these wrong logits."""
    place = locate(subject, case, step)
    end = step + BEYOND
    bugs = explain(subject, case, played.found[:end], played.expected[:end])
    if place is None:
        return Diagnosis(bugs=bugs, in_vain=UNKNOWN)
    return Diagnosis(place.layer, place.part, place.heads, str(place), bugs, UNKNOWN)
