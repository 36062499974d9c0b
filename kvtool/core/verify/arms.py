"""A scenario in one precision: what the cached arm answers, and what the uncached one does."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify.compare import Gap, compare, distances
from kvtool.core.verify.passes import uncached
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.scenario_run import ScenarioRun, Segment
from kvtool.core.verify.scenarios import Scenario
from kvtool.core.verify.subject import Source, Subject
from kvtool.errors import first_line, pass_on_shortage


@dataclass(frozen=True)
class Case:
    """A scenario, the ids (1,N) that it feeds first, of which `n_prompt` are the prompt, and the
    source that an encoder-decoder reads first. Without them ids are drawn at random."""

    scenario: Scenario
    given: Tensor | None = None
    n_prompt: int = 0
    source: Source | None = None
    thorough: bool = False  # schedules with all that there is to feed

    def run(self, subject: Subject, last: int | None = None) -> ScenarioRun:
        """A run of it that has not begun; it stops after step `last`, if that is given."""
        seed = zlib.crc32(self.scenario.name.encode())  # other ids for each, the same in each run
        given = (self.given, self.n_prompt, last, self.source)
        return ScenarioRun(subject, *given, seed, self.thorough)


class Raised(NamedTuple):
    """What code that is judged raised, and where: a step of the cached arm has a number."""

    error: BaseException
    step: int | None = None
    where: str = ""

    @property
    def words(self) -> str:
        """The error in one line, and where it was raised."""
        where = self.where or f"step {self.step}"
        return f"{where} raised {type(self.error).__name__}: {first_line(self.error)}"


@dataclass
class Arms:
    """A scenario in one precision: for each step the logits of both arms, (B,n,V)."""

    found: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)
    accepted_beyond_capacity: int | None = None
    vacuous: str | None = None
    raised: Raised | None = None
    promoted: bool = False  # both arms ran without lower types
    segments: list[Segment] = field(default_factory=list)  # the histories that were answered
    mixed: float = 0.0  # how far uncached rows of a batch are from passes over each row alone
    # Where attention was compared in place of logits, which both arms then have in common.
    by_attention: Gap | None = None

    @property
    def gap(self) -> Gap:
        """How far the arms are apart."""
        return self.by_attention or compare(self.found, self.expected)


@torch.inference_mode()
def play(subject: Subject, case: Case, promote: tuple[bool, bool] = (False, False)) -> Arms:
    """Run the cached arm, then one uncached pass over each history that it went through.

    promote: whether the cached arm, and the uncached one, run without lower types.
    """
    run, arms = case.run(subject), Arms(promoted=all(promote))
    with Promote() if promote[0] else contextlib.nullcontext():
        arms.raised = _play_cached(case, run)
    arms.accepted_beyond_capacity = run.accepted_beyond_capacity
    if arms.raised is None:  # or asking whether its cache is used would only raise again
        arms.vacuous, arms.raised = _vacuous(run)
    with Promote() if promote[1] else contextlib.nullcontext():
        answers = _answers(subject, run, arms)
    arms.segments = [segment for segment in run.segments if segment.answers]
    for step in sorted(answers):
        found, expected = answers[step]
        arms.found.append(found)
        arms.expected.append(expected)
    return arms


def _play_cached(case: Case, run: ScenarioRun) -> Raised | None:
    """What a subject raised: it may raise anything, and that is its result."""
    try:
        case.scenario.play(run)
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        return Raised(error, run.n_steps)
    return None


def _vacuous(run: ScenarioRun) -> tuple[str | None, Raised | None]:
    """Why equal logits would prove nothing, if so; and what the subject's code raised."""
    try:
        return next(filter(None, (s.vacuous() for s in run.sessions)), None), None
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        return None, Raised(error, where="finding out whether the cache is used")


def _answers(subject: Subject, run: ScenarioRun, arms: Arms) -> dict[int, tuple[Tensor, Tensor]]:
    """The cached and the uncached logits (B,n,V) by step."""
    answers = {}
    for segments in sharing(run.segments):
        whole = _uncached(subject, segments[0], arms)
        for segment in segments:
            for answer in segment.answers:
                uncached = whole[:, answer.first : answer.first + answer.logits.shape[1]]
                answers[answer.step] = (
                    segment.zero_padding(answer.logits, answer.first),
                    segment.zero_padding(uncached, answer.first),
                )
    return answers


def sharing(segments: Sequence[Segment]) -> list[list[Segment]]:
    """The segments that answered, in groups that one pass judges: histories of one row with which
    the first of the group begins."""
    groups: list[list[Segment]] = []
    answered = [segment for segment in segments if segment.answers]
    for segment in sorted(answered, key=lambda s: -s.history.shape[1]):
        group = next((g for g in groups if _begins(g[0], segment)), None)
        if group is None:
            groups.append([segment])
        else:
            group.append(segment)
    return groups


def _begins(longer: Segment, segment: Segment) -> bool:
    """Whether a pass over the longer history answers for the other one as well."""
    starts = (longer.start, segment.start)
    if any(s.batch > 1 or s.padding is not None or s.source is not None for s in starts):
        return longer is segment
    n = segment.history.shape[1]
    return torch.equal(longer.history[:, :n], segment.history)


def _uncached(subject: Subject, segment: Segment, arms: Arms) -> Tensor:
    """The uncached logits (B,T,V) of a history: of a pass over all rows, or over each alone."""
    whole = uncached(subject, segment.history, segment.start)
    if not segment.alone:
        return whole
    rows = torch.arange(segment.start.batch, device=segment.history.device).split(1)
    alone = torch.cat(
        [uncached(subject, segment.history[row], segment.start.select(row)) for row in rows]
    )
    arms.mixed = max(arms.mixed, *distances([whole], [alone]))
    return alone
