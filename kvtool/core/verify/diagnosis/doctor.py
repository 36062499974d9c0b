"""From a bug that was seen to the place where it is and the kind that it is, for models of ours."""

from __future__ import annotations

from kvtool.core.verify.arms import Arms, Case
from kvtool.core.verify.diagnosis.hypotheses import STEPS_AFTER, UNKNOWN, explain
from kvtool.core.verify.diagnosis.locate import locate
from kvtool.core.verify.finding import Diagnosis
from kvtool.core.verify.model_subject import ModelSubject


def examine(subject: ModelSubject, case: Case, step: int, arms: Arms) -> Diagnosis:
    """Locate the first wrong thing at `step`, and try out what would give these wrong logits."""
    place = locate(subject, case, step)
    end = step + STEPS_AFTER
    bugs = explain(subject, case, arms.found[:end], arms.expected[:end])
    if place is None:
        return Diagnosis(bugs=bugs, unexplained=UNKNOWN)
    return Diagnosis(place.layer, place.part, place.heads, str(place), bugs, UNKNOWN)
