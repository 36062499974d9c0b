"""Locates a bug in a user's decoder, and finds the known bug that reproduces it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvtool.core.verify.arms import Arms, Case
from kvtool.core.verify.compare import distances
from kvtool.core.verify.diagnosis.hypotheses import REPRODUCED, STEPS_AFTER
from kvtool.core.verify.finding import Diagnosis
from kvtool.core.verify.scenario_run import Stopped
from kvtool.core.verify.target.attributes import owned_modules
from kvtool.core.verify.target.hypotheses import (
    TARGET_HYPOTHESES,
    FedStep,
    TargetHypothesis,
    TracedSession,
)
from kvtool.core.verify.target.influence import Sight, sight
from kvtool.core.verify.target.operands import OR_MASK, WEIGHTS, misread
from kvtool.core.verify.target.positions import NUMBERS, wrong_numbers, wrong_positions
from kvtool.core.verify.target.sight_rules import described, named
from kvtool.core.verify.target.spots import spots
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import Difference, Lookup, Trace, Tracer, first_difference
from kvtool.errors import first_line, pass_on_shortage

# Masks of a decoder of unknown make cannot be changed from outside.
UNNAMED = "none of the wrong positions and pasts that can be tried from outside reproduces it"
NOT_LOOKED = "not looked into: the bugs found before took the time for it"
SECONDS = 8.0  # seconds for the diagnosis of all bugs of a check
MAX_SECONDS = 12.0  # seconds for locating and explaining them
PADDING_COUNTED = "positions after the prompt count its padding: the length is taken in its place"
SEES_RIGHT = "each token sees just those that it should"


class Examiner:
    """The doctor of one check. After SECONDS of this thread it looks no further, and after
    MAX_SECONDS it no longer locates bugs."""

    def __init__(self) -> None:
        self.spent = 0.0

    def __call__(self, subject: TargetSubject, case: Case, step: int, arms: Arms) -> Diagnosis:
        if self.spent >= MAX_SECONDS:
            return Diagnosis(unexplained=NOT_LOOKED)
        began = time.thread_time()
        try:
            return examine(subject, case, step, arms, thorough=self.spent < SECONDS)
        except Exception as error:  # the verdict stands, even if the decoder cannot be traced
            pass_on_shortage(error)
            why = f"could not be looked into ({type(error).__name__}: {first_line(error)})"
            return Diagnosis(unexplained=why)
        finally:
            self.spent += time.thread_time() - began


def examine(
    subject: TargetSubject, case: Case, step: int, arms: Arms, thorough: bool = True
) -> Diagnosis:
    """Locate the first wrong value at `step`, and try known bugs that would give these logits.
    thorough: also find what tokens see and read."""
    located = locate(subject, case, step)
    if located is None:
        return Diagnosis()
    first, lookups, watched = located
    last = min(step + STEPS_AFTER, len(arms.found)) - 1
    bugs = explain(subject, case, arms.found[: last + 1], lookups)
    unexplained = UNNAMED if thorough else NOT_LOOKED
    if any(segment.start.has_holes for segment in arms.segments):
        unexplained = UNNAMED  # maps of what tokens see know padding on the left alone
    elif not bugs and thorough:
        bugs, unexplained = look(subject, case, step, arms.found[: last + 1], first)
    if first is None:
        behind = "the logits, after every module" if watched else "the logits: no module was seen"
        return Diagnosis(part="logits", place=behind, bugs=bugs, unexplained=unexplained)
    return Diagnosis(first.site.layer, first.part, first.heads, str(first), bugs, unexplained)


def look(
    subject: TargetSubject, case: Case, step: int, found: Sequence[Tensor], first: Difference | None
) -> tuple[tuple[str, ...], str]:
    """The bugs that show in what each token sees, in positions, or in what attention reads; and the
    words if there are none."""
    seen, bugs = see(subject, case, step, len(found) - 1, first)
    numbers, positions = numbered(subject, case, step, found)
    hidden = seen is not None and seen.differs  # then numbers may be those of a mask
    told_by_numbers = numbers and (positions or not hidden)
    if told_by_numbers and not numbers.startswith(NUMBERS):
        return (*bugs, numbers), UNNAMED
    if not told_by_numbers and bugs and (seen is None or not seen.across):
        return bugs, UNNAMED
    try:
        words, told = misread(subject, case, step)
    except Exception as error:  # the user's code may not like to be watched
        pass_on_shortage(error)
        words, told = "", False
    if words == WEIGHTS and (
        seen is None or not seen.direct
    ):  # a mask may be wrong: layers hide it
        words, told = OR_MASK, False
    if told and not (hidden and words == WEIGHTS):  # more than that rows read each other
        return (words,), UNNAMED
    if told_by_numbers:
        return (*bugs, numbers), UNNAMED
    if not bugs and seen is not None and (cells := described(seen, step)):
        return (cells,), UNNAMED
    words = "" if hidden else words
    right = SEES_RIGHT if seen is not None and seen.direct and not hidden else ""
    return bugs, "; ".join(filter(None, [UNNAMED, right, words]))


@torch.inference_mode()
def see(
    subject: TargetSubject, case: Case, step: int, last: int, first: Difference | None
) -> tuple[Sight | None, tuple[str, ...]]:
    """What each token sees, as near to the first wrong value as possible, and the bugs that show in
    it."""
    found = None
    for spot in spots(subject, first):
        try:
            seen = sight(subject, case, step, last, spot)
        except Exception as error:  # the user's code may not like what it is given here
            pass_on_shortage(error)
            continue
        if seen is not None and (bugs := named(seen, step)):
            return seen, bugs
        if found is None or (seen is not None and seen.differs and not found.differs):
            found = seen
    return found, ()


@torch.inference_mode()
def locate(
    subject: TargetSubject, case: Case, step: int
) -> tuple[Difference | None, tuple[Lookup, ...], bool] | None:
    """The first wrong value of a step, the step's lookups, and whether inputs and outputs of its
    modules could be compared, if it has any.

    None if the step cannot be replayed.
    """
    cached, full = Tracer(), Tracer()
    run = case.run(subject.with_session(partial(TracedSession, tracer=cached)), last=step)
    try:
        case.scenario.play(run)
        return None
    except Stopped as stopped:
        segment, answer = stopped.segment, stopped.answer
    batch, n = answer.logits.shape[:2]
    modules = owned_modules(subject.decoder)
    with full.on(modules):
        subject.call_full(segment.history, segment.start)
    first = first_difference(cached.trace, full.trace, answer.first, n, subject.decoder)
    watched = not modules or any(site in full.trace for site in cached.trace)
    return first, find_lookups(cached.trace, batch, n), watched


def find_lookups(trace: Trace, batch: int, n: int) -> tuple[Lookup, ...]:
    """The modules whose input is an integer for each token of a step: ids, positions."""
    found = {
        (site.module, site.name): None
        for site, value in trace.items()
        if site.module and site.side == "in" and value.numel() in (n, batch * n)
        if value.dtype in (torch.int64, torch.int32)
    }
    return tuple(found)


@torch.inference_mode()
def explain(
    subject: TargetSubject, case: Case, found: Sequence[Tensor], lookups: tuple[Lookup, ...]
) -> tuple[str, ...]:
    """The known bugs that reproduce the wrong logits `found`, by step, of a float64 subject.

    found may end before the scenario does.
    """

    def reproduces(hypothesis: type[TargetHypothesis], log: list[FedStep]) -> bool:
        session = partial(hypothesis, lookups=lookups, log=log)
        answers = _decode(subject.with_session(session), case, len(found))
        return len(answers) == len(found) and max(distances(answers, found)) <= REPRODUCED

    log: list[FedStep] = []
    if reproduces(TargetHypothesis, log):
        return (in_words(lookups, log),)
    names = [h.hint for h in TARGET_HYPOTHESES if reproduces(h, [])]
    return tuple(dict.fromkeys(names))


@torch.inference_mode()
def numbered(
    subject: TargetSubject, case: Case, step: int, found: Sequence[Tensor]
) -> tuple[str, bool]:
    """The token numbers that reproduce the wrong logits `found`, in words, with the line of code
    that computes them; and whether they are positions."""

    def reproduces(make: Callable[..., TargetHypothesis]) -> bool:
        answers = _decode(subject.with_session(make), case, len(found))
        return len(answers) == len(found) and max(distances(answers, found)) <= REPRODUCED

    try:
        return wrong_numbers(subject, case, step, reproduces)
    except Exception as error:  # the user's code may not like to be watched
        pass_on_shortage(error)
        return "", False


def _decode(subject: TargetSubject, case: Case, n_steps: int) -> list[Tensor]:
    """The logits of the first steps of a scenario under a hypothesis."""
    run = case.run(subject, last=n_steps - 1)
    try:
        case.scenario.play(run)
    except Stopped:
        pass
    except Exception as error:  # a hypothesis may make no sense here: then it explains nothing
        pass_on_shortage(error)
        return []
    answers = {a.step: s.zero_padding(a.logits, a.first) for s in run.segments for a in s.answers}
    return [answers[step] for step in sorted(answers)]


def in_words(lookups: tuple[Lookup, ...], log: list[FedStep]) -> str:
    """The error in the positions that were looked up, if nothing else is wrong."""
    right = [fed.right for fed in log]
    for i, (module, _) in enumerate(lookups):
        asked = [fed.asked[..., i] for fed in log]
        pairs = [torch.equal(a, r) for a, r in zip(asked, right, strict=True)]
        if not pairs[0] or all(pairs):
            continue  # these are ids, or positions that count otherwise
        return f"{_rows_in_words(log, asked)} ({module}; nothing else is wrong)"
    names = " and ".join(sorted({module for module, _ in lookups}))
    return f"what {names} was asked for explains all of it"


def _rows_in_words(log: list[FedStep], asked: list[Tensor]) -> str:
    """How positions (B,n) of steps are wrong, in the first row in which they are; or that all count
    the padding that stands before a step."""
    padded = any(not torch.equal(fed.right[:, 0], fed.right[:1, 0]) for fed in log)
    columns = [fed.past + torch.arange(fed.right.shape[1], device=fed.right.device) for fed in log]
    behind = [i for i, fed in enumerate(log) if fed.past]
    if padded and all(bool((asked[i] == columns[i]).all()) for i in behind):
        return PADDING_COUNTED
    for row in range(len(asked[0])):
        of_row = [[a[row].tolist() for a in steps] for steps in (asked, [f.right for f in log])]
        if len({len(a) for a in asked}) == 1 and of_row[0] != of_row[1]:
            return wrong_positions(*of_row)
    return "positions are wrong"
