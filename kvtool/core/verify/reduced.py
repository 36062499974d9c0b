"""The shortest beginning of a generated scenario that still goes wrong: a diagnosis repeats it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvtool.core.verify.arms import Arms, Case, play
from kvtool.core.verify.compare import distances
from kvtool.core.verify.schedules import Bounds, Schedule
from kvtool.core.verify.subject import Subject

MORE = 3  # steps of one token behind the wrong one


def reduced(
    subject: Subject, case: Case, step: int, arms: Arms, rounding: float
) -> tuple[Case, int, Arms]:
    """A case, its first wrong step and its arms, for the wrong step of a generated scenario: one of
    its histories, if need be cut to the past and the step. Others stay as they are."""
    if case.scenario.schedules is None:
        return case, step, arms
    limits = case.run(subject).limits
    for schedule in _shorter(case.scenario.schedules(limits), step, limits):
        one = replace(case, scenario=case.scenario.of((schedule,)))
        found = play(subject, one, (arms.promoted, arms.promoted))
        if found.raised is None:
            gaps = distances(found.found, found.expected)
            wrong = next((i for i, gap in enumerate(gaps) if not gap <= rounding), None)
            if wrong is not None:
                return one, wrong, found
    return case, step, arms


def _shorter(schedules: list[Schedule], step: int, limits: Bounds) -> Iterator[Schedule]:
    """Possible replacements of the history with the step, the shortest first."""
    for schedule in schedules:
        if step < len(schedule):
            past, n = sum(schedule[:step]), schedule[step]
            if past and not limits.largest and not (limits.single and n > 1):
                more = min(MORE, limits.reach - past - n)  # what they see tells bugs apart
                yield (past, n, *[1] * more)
            yield schedule[: step + 1]
            return
        step -= len(schedule)
