"""Finds wrong positions: numbers that a line of the decoder computes without token ids.

Positions, the angles and tables that are made of them, and biases do not depend on ids. Where a
step makes others than the pass does for the same tokens, the pass is given those of the steps: if
that gives the wrong logits, they are the bug, and nothing else is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify.arms import Case
from kvtool.core.verify.diagnosis.hypotheses.positions import (
    ByStep,
    HeldRows,
    NotAdvanced,
    OneTooFar,
    OneTooNear,
    PaddingIgnored,
    StepAtOnePlace,
    WithinWindow,
)
from kvtool.core.verify.diagnosis.locate import ranges
from kvtool.core.verify.scenario_run import Segment, Stopped
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.hypotheses import FedStep, TargetHypothesis, positions
from kvtool.core.verify.target.operations import Line, Operations, by_place, token_axis
from kvtool.core.verify.target.session import TargetSession
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import is_wrong

TRIED = 8  # lines of code
NUMBERS = "what it computes of the tokens' places is wrong"
AHEAD = 24  # tokens behind the history for which positions are known too


class Suspect(NamedTuple):
    """A line that numbers a step's tokens differently from the pass's."""

    line: Line
    axis: int  # of the tokens in its answers
    numbers: Tensor  # its first answer for a pass over the history, and AHEAD more tokens
    padding: tuple[int, ...] = ()


class WatchedSession(TargetSession):
    """The user's session, and the operations of its last step."""

    def __init__(self, subject: TargetSubject, start: Start, seen: list[Operations]) -> None:
        super().__init__(subject, start)
        self.seen = seen

    def feed(self, ids: Tensor) -> Tensor:
        with Operations() as operations:
            logits = super().feed(ids)
        self.seen[:] = [operations]
        return logits


class LinesGiven(TargetHypothesis):
    """Computes the whole history again, with the results that lines gave in the steps."""

    def __init__(
        self, subject: TargetSubject, start: Start, given: Sequence[Suspect], log: list[FedStep]
    ) -> None:
        self.axes = {suspect.line: suspect.axis for suspect in given}
        self.logged = given[0]
        # By line and time, over the tokens of the history.
        self.answers: dict[tuple[Line, int], Tensor] = {}
        super().__init__(subject, start, (), log)
        self.seen: list[Operations] = []
        self.inner = WatchedSession(subject, start, self.seen)

    def feed(self, ids: Tensor) -> Tensor:
        assert self.inner is not None
        n, past = ids.shape[1], self.tokens.shape[1]
        self.inner.feed(ids)
        for done in self.seen[0].done:
            if done.line in self.axes:
                before = self.answers.get(done[:2])
                parts = [done.answer] if before is None else [before, done.answer]
                if past == 0 or before is not None:
                    self.answers[done[:2]] = torch.cat(parts, dim=self.axes[done.line])
        numbers = self.answers[self.logged.line, 0].narrow(self.logged.axis, past, n)
        self.log.append(FedStep(past, numbers, positions(self.start, past, ids)))
        self.tokens = torch.cat([self.tokens, ids[..., None]], dim=1)
        with Operations(self._instead):
            return self.subject.call_full(self.tokens[..., 0], self.start)[:, -n:]

    def _instead(self, line: Line, time: int, answer: Tensor) -> Tensor | None:
        given = self.answers.get((line, time))
        return given if given is not None and given.shape == answer.shape else None

    def cut(self, length: int) -> None:
        super().cut(length)
        for place, answer in self.answers.items():
            self.answers[place] = answer.narrow(self.axes[place[0]], 0, length)

    def pick(self, rows: Tensor) -> None:
        batch = self.tokens.shape[0]
        super().pick(rows)
        for place, answer in self.answers.items():
            if self.axes[place[0]] and answer.shape[0] == batch:
                self.answers[place] = answer[rows]

    def begin_again(self, start: Start) -> None:
        super().begin_again(start)
        self.answers = {}

    def fork(self) -> TargetHypothesis:
        other = super().fork()
        assert isinstance(other, LinesGiven) and isinstance(other.inner, WatchedSession)
        other.answers, other.seen = dict(self.answers), []
        other.inner.seen = other.seen
        return other


def suspects(subject: TargetSubject, case: Case, step: int) -> list[Suspect]:
    """The lines whose answers, of the step's own tokens, differ: whole numbers, or what depends on
    no id."""
    seen: list[Operations] = []
    run = case.run(subject.with_session(lambda s, start: WatchedSession(s, start, seen)), last=step)
    try:
        case.scenario.play(run)
        return []
    except Stopped as stopped:
        segment, answer = stopped.segment, stopped.answer
    n, total = answer.logits.shape[1], segment.history.shape[1]
    whole = _pass(subject, segment, segment.history)
    others = _pass(subject, segment, (segment.history + 1) % subject.vocab_size)
    longer = _longer(subject, segment)
    pads = segment.start.padding
    padding = () if pads is None else tuple(pads.tolist())
    found: dict[Line, Suspect] = {}
    for place, done in by_place(seen[0].done).items():
        if place not in whole or place not in others or done.line in found:
            continue
        right = whole[place].answer
        axis = token_axis(done.answer.shape, right.shape, n, total)
        if axis is None or not (_whole(right) or torch.equal(right, others[place].answer)):
            continue
        if is_wrong(done.answer, right.narrow(axis, answer.first, n)):
            line = done.line
            numbers = longer.get((line, 0), whole[line, 0]).answer
            found[line] = Suspect(line, axis, numbers, padding)
    return list(found.values())[:TRIED]


def _whole(numbers: Tensor) -> bool:
    """Whether there is a whole number for each token: its position may depend on ids."""
    if numbers.dtype == torch.bool or numbers.is_complex():
        return False
    return bool((numbers == numbers.double().round()).all())


def _pass(subject: TargetSubject, segment: Segment, ids: Tensor) -> dict:
    with Operations() as operations:
        subject.call_full(ids, segment.start)
    return by_place(operations.done)


def _longer(subject: TargetSubject, segment: Segment) -> dict:
    """What a pass over more tokens than the history does, if the decoder takes so many."""
    history = segment.history
    n = min(AHEAD, subject.context - history.shape[1])
    if n <= 0:
        return {}
    return _pass(subject, segment, torch.cat([history, history[:, :1].expand(-1, n)], dim=1))


def wrong_numbers(
    subject: TargetSubject,
    case: Case,
    step: int,
    reproduces: Callable[[Callable[..., TargetHypothesis]], bool],
) -> tuple[str, bool]:
    """The error in the numbers that a line gives the tokens, in words, if nothing else is wrong;
    and whether they are positions."""
    tried = suspects(subject, case, step)
    for given in [*((one,) for one in tried), *_alike(tried)]:
        log: list[FedStep] = []
        if reproduces(lambda s, start, it=given, log=log: LinesGiven(s, start, it, log)):
            words = _words(given[0], log)
            said = words or NUMBERS
            lines = dict.fromkeys(str(suspect.line) for suspect in given)
            return f"{said} ({', '.join(lines)}; nothing else is wrong)", bool(words) and len(
                given
            ) == 1
    return "", False


def _alike(tried: list[Suspect]) -> list[tuple[Suspect, ...]]:
    """Suspects that may be parts of one thing, as tables of cosines and sines are."""
    groups: dict[Hashable, list[Suspect]] = {}
    for one in tried:
        key = (one.line.file, one.line.asked, one.axis, one.numbers.shape)
        groups.setdefault(key, []).append(one)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _words(suspect: Suspect, log: list[FedStep]) -> str:
    """How the steps' positions are wrong, "" if they are none."""
    asked: list[Tensor] = []
    right: list[Tensor] = []
    for fed in log:
        axis = suspect.axis
        there = suspect.numbers.narrow(axis, fed.past, fed.asked.shape[axis])
        found, expected = places(fed.asked, suspect), places(there, suspect)
        if found is None or expected is None or found.shape != expected.shape:
            return ""
        asked.append(found)
        right.append(expected)
    behind = [i for i, fed in enumerate(log) if fed.past]
    shifts = torch.cat([asked[i] - right[i] for i in behind], dim=1)
    if suspect.padding and any(suspect.padding):
        padding = torch.tensor(suspect.padding)[:, None]
        if len(shifts) == len(padding) and bool((shifts == padding).all()):
            return PaddingIgnored.hint
    if bool((shifts != shifts[:1]).any()):
        return ""
    counted = [fed.past + torch.arange(a.shape[1]) for fed, a in zip(log, asked, strict=True)]
    if any(bool((r - c).any()) for r, c in zip(right, counted, strict=True)):
        if all(not bool((asked[i] - counted[i]).any()) for i in behind):
            return "positions count tokens after the first step, and in the pass they do not"
        return ""
    return wrong_positions([a[0].tolist() for a in asked], [r[0].tolist() for r in right])


def places(answer: Tensor, suspect: Suspect) -> Tensor | None:
    """(R,n): which token of a pass has the numbers that each token of a step was given, of each
    row that has its own; whole numbers are themselves. None if no token has them."""
    found, known = _by_token(answer, suspect.axis), _by_token(suspect.numbers, suspect.axis)
    if found.shape[2] == 1 and bool((known == known.round()).all()):
        return found[..., 0].round().long()
    if found.shape[2] != known.shape[2]:
        return None
    table = known[0 if not suspect.padding else suspect.padding.index(min(suspect.padding))]
    gaps = (found[:, :, None] - table).abs().amax(-1)  # (R,n,T)
    least, where = gaps.min(2)
    return where if bool((least <= 1e-9).all()) else None


def _by_token(numbers: Tensor, axis: int) -> Tensor:
    """(R,T,N) float64: the numbers of each token, in rows where they come first."""
    moved = numbers.movedim(axis, 0)
    if moved.is_complex():
        moved = torch.view_as_real(moved)
    if axis == 0:
        return moved.reshape(1, moved.shape[0], -1).double()
    return moved.reshape(moved.shape[0], moved.shape[1], -1).double().transpose(0, 1)


def wrong_positions(asked: list[list[int]], right: list[list[int]]) -> str:
    """How positions are wrong, step by step those that were `asked` for and the `right` ones.

    The first step is right, and has the first position 0.
    """
    if asked == right:
        return ""
    steps = [(a, r) for a, r in zip(asked, right, strict=True) if r[0] > 0]
    shifts = {x - y for a, r in steps for x, y in zip(a, r, strict=True)}
    first = len(asked[0])
    if all(a == list(range(len(a))) for a, _ in steps):
        return NotAdvanced.hint
    if shifts == {1}:
        return OneTooFar.hint
    if shifts == {-1}:
        return OneTooNear.hint
    by_step = [list(range(first + i, first + i + len(a))) for i, (a, _) in enumerate(steps)]
    if [a for a, _ in steps] == by_step and any(len(a) > 1 for a, _ in steps):
        return ByStep.hint
    if all(a == r[:1] * len(a) for a, r in steps):
        return StepAtOnePlace.hint
    if how := _held(asked, right):
        return how
    again = [i for i, (a, r) in enumerate(zip(asked, right, strict=True)) if a[0] == 0 < r[0]]
    wrong = [i for i, (a, r) in enumerate(zip(asked, right, strict=True)) if a != r]
    if again and again[0] == wrong[0]:
        return f"positions start at 0 again at step {wrong[0]}"
    if len(shifts - {0}) != 1:
        return "positions are wrong"
    (shift,) = shifts - {0}
    direction = "far" if shift > 0 else "low"
    if shifts == {shift}:
        return f"positions are {abs(shift)} too {direction} after the first step"
    step = wrong[0]
    if len(wrong) < len(asked) - step:
        sizes = ranges(sorted({len(asked[i]) for i in wrong}))
        return f"positions are {abs(shift)} too {direction} in some steps (of {sizes} tokens)"
    return f"positions are {abs(shift)} too {direction} from step {step} on"


def _held(asked: list[list[int]], right: list[list[int]]) -> str:
    """How positions are counted within a window, in words; "" if they are not."""
    first = next(i for i, (a, r) in enumerate(zip(asked, right, strict=True)) if a != r)
    start, place = asked[first][0], right[first][0]
    starts = [(a[0], r[0]) for a, r in zip(asked, right, strict=True)]
    if start == 0 and place > 0 and len(starts) > first + 1:
        ring = all(a == [p % place for p in r] for a, r in zip(asked, right, strict=True))
        return f"{WithinWindow.hint} at {place}" if ring else ""
    steps = zip(asked, right, strict=True)
    if all(a[0] == min(r[0], start) and a == list(range(a[0], a[0] + len(a))) for a, r in steps):
        return f"{HeldRows.hint}: {start} at most" if len(starts) > first + 1 else ""
    return ""
