"""What a bug might be: each hypothesis decodes with it, and is named only if it reproduces it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.core.verify.arms import Case
from kvtool.core.verify.compare import distances
from kvtool.core.verify.diagnosis.hypotheses.contents import CONTENTS
from kvtool.core.verify.diagnosis.hypotheses.masks import MASKS
from kvtool.core.verify.diagnosis.hypotheses.pages import PAGES
from kvtool.core.verify.diagnosis.hypotheses.positions import POSITIONS
from kvtool.core.verify.diagnosis.hypotheses.quantized import QUANTIZED
from kvtool.core.verify.diagnosis.hypotheses.rollback import ROLLBACK
from kvtool.core.verify.diagnosis.hypotheses.windows import WINDOWS
from kvtool.core.verify.diagnosis.hypothesis import Hypothesis
from kvtool.core.verify.model_subject import ModelSubject
from kvtool.core.verify.scenario_run import Answer, Segment, Stopped
from kvtool.errors import pass_on_shortage

STEPS_AFTER = 6  # steps after the first wrong one that a hypothesis has to reproduce too
REPRODUCED = 1e-10  # a right hypothesis leaves about 1e-15, a wrong one 1e-5 and more
UNKNOWN = "none of the known bugs reproduces it"
NOT_A_NUMBER = (
    "NaN is read: a mask does not keep out what unwritten memory holds (0 x NaN is NaN), "
    "and a token that sees no key gives NaN"
)
HYPOTHESES = (*POSITIONS, *MASKS, *WINDOWS, *ROLLBACK, *PAGES, *QUANTIZED, *CONTENTS)


@torch.inference_mode()
def explain(
    subject: ModelSubject, case: Case, found: Sequence[Tensor], expected: Sequence[Tensor]
) -> tuple[str, ...]:
    """The known bugs that reproduce the wrong logits `found`, by step, of a float64 subject.

    found and expected may end before the scenario does. Several bugs may look alike in a scenario.
    NOT_A_NUMBER is the bug of logits that are none.
    """
    if any(bool(logits.isnan().any()) for logits in found):
        return (NOT_A_NUMBER,)
    if not reproduces(Hypothesis, subject, case, expected):
        return ()  # this model's attention is not what a hypothesis computes
    there = {
        *case.scenario.needs,
        *({"window", "source", "quantized", "pages"} & subject.abilities),
    }
    names = [
        hypothesis.hint
        for hypothesis in HYPOTHESES
        if there.issuperset(hypothesis.needs) and reproduces(hypothesis, subject, case, found)
    ]
    return tuple(dict.fromkeys(names))


class _Refuted(Exception):
    """A hypothesis gives other logits than were found."""


def reproduces(
    hypothesis: type[Hypothesis], subject: ModelSubject, case: Case, logits: Sequence[Tensor]
) -> bool:
    """Whether a hypothesis gives these logits in the first steps of a scenario."""

    def compare(segment: Segment, answer: Answer) -> None:
        found = segment.zero_padding(answer.logits, answer.first)
        if not max(distances([found], [logits[answer.step]])) <= REPRODUCED:
            raise _Refuted

    run = case.run(subject.with_session(hypothesis), last=len(logits) - 1)
    run.on_answer = compare
    try:
        case.scenario.play(run)
    except Stopped:
        return True
    except Exception as error:  # a hypothesis may make no sense here: then it explains nothing
        pass_on_shortage(error)
        return False
    return False
