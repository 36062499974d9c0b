"""Where a bug in a user's decoder is, and what reproduces it.

A decoder of which nothing is known cannot be decoded by the book. But its uncached pass can be
given another history, and its lookups other positions: what then gives, to rounding, the wrong
logits that the cache gave, is the bug.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify.compare import distances
from kvtool.core.verify.diagnosis.hypotheses import HEALED
from kvtool.core.verify.diagnosis.hypotheses.positions import (
    ByStep,
    NotAdvanced,
    OneTooFar,
    OneTooNear,
)
from kvtool.core.verify.judge import Case, Diagnosis, Played
from kvtool.core.verify.scenarios import Stopped
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.subject import TargetSession, TargetSubject
from kvtool.core.verify.target.trace import Index, Spot, Trace, Watch, first_difference
from kvtool.errors import pass_on_shortage

BEYOND = 6  # steps behind the first wrong one that a hypothesis has to reproduce too

# Masks of a decoder of unknown make cannot be changed from outside.
UNNAMED = "none of the wrong positions and pasts that can be tried from outside reproduces it"


def examine(subject: TargetSubject, case: Case, step: int, played: Played) -> Diagnosis:
    """Locate the first wrong thing at `step`, and try out what would give these wrong logits."""
    seen = locate(subject, case, step)
    if seen is None:
        return Diagnosis()
    spot, lookups = seen
    bugs = explain(subject, case, played.found[: step + BEYOND], lookups)
    if spot is None:
        behind = "the logits, behind every module"
        return Diagnosis(part="logits", place=behind, bugs=bugs, in_vain=UNNAMED)
    return Diagnosis(spot.key.layer, spot.part, spot.heads, str(spot), bugs, UNNAMED)


# Where


class Watched(TargetSession):
    """The user's session, under a watch that keeps the last step alone."""

    def __init__(self, subject: TargetSubject, start: Start, watch: Watch) -> None:
        super().__init__(subject, start)
        self.watch = watch

    def feed(self, ids: Tensor) -> Tensor:
        self.watch.empty()
        with self.watch.on(self.subject.decoder):
            return super().feed(ids)


@torch.inference_mode()
def locate(
    subject: TargetSubject, case: Case, step: int
) -> tuple[Spot | None, tuple[Index, ...]] | None:
    """The first value of a step that is wrong, and the lookups that the step made.

    None if the step cannot be reached again.
    """
    watch = Watch()
    run = case.run(subject.with_session(partial(Watched, watch=watch)), last=step)
    try:
        case.scenario.play(run)
        return None
    except Stopped as stopped:
        segment, answer = stopped.segment, stopped.answer
    batch, n = answer.found.shape[:2]
    whole = Watch()
    with whole.on(subject.decoder):
        subject.whole(segment.history, segment.start)
    spot = first_difference(watch.trace, whole.trace, answer.first, n, subject.decoder)
    return spot, lookups(watch.trace, batch, n)


def lookups(trace: Trace, batch: int, n: int) -> tuple[Index, ...]:
    """The modules that were given a whole number for each token of a step: ids, positions."""
    found = {
        (key.module, key.name): None
        for key, value in trace.items()
        if key.module and key.side == "in" and value.numel() in (n, batch * n)
        if value.dtype in (torch.int64, torch.int32)
    }
    return tuple(found)


# What


class Fed(NamedTuple):
    """What the lookups of one step were asked for: (B,n,K)."""

    past: int
    places: Tensor


class History:
    """A session that computes the whole history again at each step, as a right cache answers.

    Subclasses get the history wrong in one way, as a cache might. Beside each id stands what the
    lookups were asked for when the user's session was fed it: the pass is told the same.
    """

    hint = ""

    def __init__(
        self,
        subject: TargetSubject,
        start: Start,
        wanted: tuple[Index, ...] = (),
        log: list[Fed] | None = None,
    ) -> None:
        self.subject, self.wanted = subject, wanted
        self.log = [] if log is None else log
        self.watch = Watch()
        self.inner: TargetSession | None = None
        if wanted:
            self.inner = Watched(subject, start, self.watch)
        self.begin(start)

    def begin(self, start: Start) -> None:
        self.start = start
        size = (start.batch, 0, 1 + len(self.wanted))
        self.tokens = torch.empty(size, dtype=torch.long, device=self.subject.device)

    def feed(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        places = self.asked(ids)
        self.log.append(Fed(self.tokens.shape[1], places))
        self.tokens = torch.cat([self.tokens, torch.cat([ids[..., None], places], dim=2)], dim=1)
        read = self.read(n)
        given = {index: read[..., 1 + i] for i, index in enumerate(self.wanted)}
        with Watch(given).on(self.subject.decoder):
            return self.subject.whole(read[..., 0], self.start)[:, -n:]

    def asked(self, ids: Tensor) -> Tensor:
        """What the lookups are asked for when the user's session is fed the ids: (B,n,K)."""
        if self.inner is None:
            return ids.new_empty(*ids.shape, 0)
        self.inner.feed(ids)
        columns = [self.watch.given(index).reshape(-1, ids.shape[1]) for index in self.wanted]
        return torch.stack([column.expand(ids.shape).long() for column in columns], dim=2)

    def read(self, n: int) -> Tensor:
        """The tokens that a step of n reads, its own included."""
        return self.tokens

    # What the user's session is told, the history is told too.

    def crop(self, length: int) -> None:
        if self.inner is not None:
            self.inner.crop(length)
        self.cut(length)

    def select(self, rows: Tensor) -> None:
        if self.inner is not None:
            self.inner.select(rows)
        self.pick(rows)

    def reset(self, start: Start) -> None:
        if self.inner is not None:
            self.inner.reset(start)
        self.begin_again(start)

    def fork(self) -> History:
        other = copy.copy(self)
        other.inner = None if self.inner is None else self.inner.fork()
        return other

    def vacuous(self) -> str | None:
        return None

    # What becomes of it

    def cut(self, length: int) -> None:
        self.tokens = self.tokens[:, :length]

    def pick(self, rows: Tensor) -> None:
        self.tokens, self.start = self.tokens[rows], self.start.select(rows)

    def begin_again(self, start: Start) -> None:
        self.begin(start)


class PastLost(History):
    hint = "the past is not read: each step is computed as if it were the first"

    def read(self, n: int) -> Tensor:
        return self.tokens[:, -n:]


class FirstLost(History):
    hint = "the first token is lost behind the first step"

    def read(self, n: int) -> Tensor:
        return self.tokens[:, 1:] if self.tokens.shape[1] > n else self.tokens


class LatestLost(History):
    hint = "the token before the step is lost"

    def read(self, n: int) -> Tensor:
        cut = self.tokens.shape[1] - n
        return torch.cat([self.tokens[:, : max(cut - 1, 0)], self.tokens[:, cut:]], dim=1)


class PromptOnly(History):
    hint = "the first step alone is stored: tokens behind it are forgotten"

    def read(self, n: int) -> Tensor:
        cut, first = self.tokens.shape[1] - n, self.log[0].places.shape[1]
        return torch.cat([self.tokens[:, : min(first, cut)], self.tokens[:, cut:]], dim=1)


class LastStepOnly(History):
    hint = "the step before replaces the past in place of joining it"

    def read(self, n: int) -> Tensor:
        before = self.log[-2].places.shape[1] if len(self.log) > 1 else 0
        return self.tokens[:, -(before + n) :]


class CropIgnored(History):
    hint = "crop does nothing: the tokens taken back stay"

    def cut(self, length: int) -> None:
        pass


class CropShort(History):
    hint = "crop leaves one token too many"
    change = 1

    def cut(self, length: int) -> None:
        super().cut(length + self.change)


class CropLong(CropShort):
    hint = "crop takes one token too many"
    change = -1


class CropTakes(History):
    hint = "crop takes as many tokens as it should leave"

    def cut(self, length: int) -> None:
        super().cut(max(self.tokens.shape[1] - length, 0))


class ResetIgnored(History):
    hint = "reset does nothing: the second sequence goes on behind the first"

    def begin_again(self, start: Start) -> None:
        self.start = start


class SelectIgnored(History):
    hint = "select does nothing: every row goes on from another row's past"

    def pick(self, rows: Tensor) -> None:
        pass


class SelectInverse(History):
    hint = "select applies the inverse order"

    def pick(self, rows: Tensor) -> None:
        super().pick(rows.argsort())


HISTORIES: tuple[type[History], ...] = (
    PastLost, FirstLost, LatestLost, PromptOnly, LastStepOnly, CropIgnored, CropShort, CropLong,
    CropTakes, ResetIgnored, SelectIgnored, SelectInverse,
)  # fmt: skip


@torch.inference_mode()
def explain(
    subject: TargetSubject, case: Case, found: Sequence[Tensor], wanted: tuple[Index, ...]
) -> tuple[str, ...]:
    """The known bugs that reproduce the wrong logits `found`, by step, of a float64 subject.

    found may end before the scenario does.
    """

    def reproduces(history: type[History], log: list[Fed]) -> bool:
        session = partial(history, wanted=wanted, log=log)
        answers = _decode(subject.with_session(session), case, len(found))
        return len(answers) == len(found) and max(distances(answers, found)) <= HEALED

    log: list[Fed] = []
    if reproduces(History, log):
        return (in_words(wanted, log),)
    names = [history.hint for history in HISTORIES if reproduces(history, [])]
    return tuple(dict.fromkeys(names))


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
    answers = {a.step: s.real(a.found, a.first) for s in run.segments for a in s.answers}
    return [answers[step] for step in sorted(answers)]


def in_words(wanted: tuple[Index, ...], log: list[Fed]) -> str:
    """What is wrong with the positions that were asked for, when nothing else is wrong."""
    for i, (module, _) in enumerate(wanted):
        asked = [fed.places[0, :, i].tolist() for fed in log]
        right = [
            list(range(fed.past, fed.past + len(a))) for fed, a in zip(log, asked, strict=True)
        ]
        if asked[0] != right[0] or asked == right:
            continue  # these are ids, or positions that count otherwise
        return f"{_pattern(asked, right)} ({module}; nothing else is wrong)"
    names = " and ".join(sorted({module for module, _ in wanted}))
    return f"what {names} was asked for explains all of it"


def _pattern(asked: list[list[int]], right: list[list[int]]) -> str:
    later = [(a, r) for a, r in zip(asked, right, strict=True) if r[0] > 0]
    shifts = {x - y for a, r in later for x, y in zip(a, r, strict=True)}
    if all(a == list(range(len(a))) for a, _ in later):
        return NotAdvanced.hint
    if shifts in ({1}, {-1}):
        return OneTooFar.hint if shifts == {1} else OneTooNear.hint
    start = len(asked[0])
    by_step = [list(range(start + k, start + k + len(a))) for k, (a, _) in enumerate(later)]
    if [a for a, _ in later] == by_step:
        return ByStep.hint
    wrong = {x - y for a, r in later for x, y in zip(a, r, strict=True)} - {0}
    if len(wrong) == 1:
        shift = wrong.pop()
        first = next(i for i, (a, r) in enumerate(zip(asked, right, strict=True)) if a != r)
        where = "behind the first step" if len(shifts) == 1 else f"from step {first} on"
        return f"positions are {abs(shift)} too {'far' if shift > 0 else 'low'} {where}"
    return "positions are wrong"
