"""Is it a bug or rounding? The same ids, cached and uncached, in three precisions.

Rounding shrinks with the precision and a bug does not. In float64 a right cache is left with a gap
of about 1e-15 and a wrong one with the gap that it had, so no tolerance has to be tuned. What
stays in float64 but vanishes once every cast to a lower type is promoted is precision: the model
or the cache itself computes or stores lower. Other kernels may serve the working format, and a bug
be in them alone: there a cache must not be further from the float64 run than the uncached run is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kvtool.core.machine import dtype_name
from kvtool.core.verify.compare import Gap, compare, distances
from kvtool.core.verify.outcome import (
    BUG,
    ERROR,
    IDENTICAL,
    NO_CACHE,
    NOT_CAUSAL,
    PRECISION,
    ROUNDING,
    UNDECIDED,
    UNSUPPORTED,
    VACUOUS,
)
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.scenarios import Run, Scenario, TooShort
from kvtool.core.verify.subject import Source, Subject
from kvtool.errors import CacheOpUnsupported, CheckFailed, first_line, pass_on_shortage

ROUNDING_64 = 1e-12  # between right caches (about 1e-15) and everything else (1e-9 and more)
# How much further a right cache may be from float64 than the uncached run: 2.0 was the most in 144
# tiny models in each of float32, bfloat16 and float16.
NOISE = 10

RIGHT = (IDENTICAL, ROUNDING)


@dataclass(frozen=True)
class Case:
    """A scenario, the ids (1,N) that it feeds first, of which `n_prompt` are the prompt, and the
    source that an encoder-decoder reads first. Without them ids are drawn at random."""

    scenario: Scenario
    given: Tensor | None = None
    n_prompt: int = 0
    source: Source | None = None

    def run(self, subject: Subject, last: int | None = None) -> Run:
        """A run of it that has not begun; it stops behind step `last`, if that is given."""
        return Run(subject, self.given, self.n_prompt, last, self.source)


class Raised(NamedTuple):
    """What code that is judged raised, and where: a step of the cached arm has a number."""

    error: BaseException
    step: int | None = None
    where: str = ""

    @property
    def words(self) -> str:
        where = self.where or f"step {self.step}"
        return f"{where} raised {type(self.error).__name__}: {first_line(self.error)}"


@dataclass
class Played:
    """A scenario in one precision: for each step the logits of both arms, (B,n,V)."""

    found: list[Tensor] = field(default_factory=list)
    expected: list[Tensor] = field(default_factory=list)
    unrefused: int | None = None
    vacuous: str | None = None
    raised: Raised | None = None
    promoted: bool = False  # both arms ran without lower types


class Diagnosis(NamedTuple):
    """Where a bug is and what it does, as far as that could be found out."""

    layer: int | None = None
    part: str = ""
    heads: tuple[int, ...] = ()
    place: str = ""  # all of that in words
    bugs: tuple[str, ...] = ()  # the known ones that reproduce the wrong logits, all of them
    in_vain: str = ""  # what was tried, where none of it does

    @property
    def hint(self) -> str:
        """The bug in words, or that none of the known ones explains it; "" if none was tried."""
        return "; or: ".join(self.bugs) or self.in_vain


@dataclass(frozen=True)
class Finding:
    """What was found for one scenario, with the evidence. None was not computed: not needed."""

    scenario: str
    verdict: str
    evidence: str = ""
    working: Gap | None = None
    float64: Gap | None = None
    promoted: Gap | None = None
    first_wrong: int | None = None  # the first step that differs by more than rounding
    lossy: bool = False  # precision that the cache alone loses, and nobody asked for
    diagnosis: Diagnosis = field(default_factory=Diagnosis)

    @property
    def right(self) -> bool:
        return self.verdict in RIGHT or (self.verdict == PRECISION and not self.lossy)

    @property
    def by_step(self) -> dict[str, list[float]]:
        """The gap of each step in each precision that was computed, for a plot."""
        gaps = {"working": self.working, "float64": self.float64, "promoted": self.promoted}
        return {name: list(gap.by_step) for name, gap in gaps.items() if gap is not None}


@torch.inference_mode()
def play(subject: Subject, case: Case, promote: tuple[bool, bool] = (False, False)) -> Played:
    """Run the cached arm, then one uncached pass over each history that it went through.

    promote: whether the cached arm, and the uncached one, run without lower types.
    """
    run = case.run(subject)
    played = Played()
    with Promote() if promote[0] else contextlib.nullcontext():
        try:
            case.scenario.play(run)
        except (Exception, SystemExit) as error:  # a subject may raise anything: that is its result
            pass_on_shortage(error)
            played.raised = Raised(error, run.n_steps)
    played.unrefused, played.promoted = run.unrefused, all(promote)
    if played.raised is None:  # or asking whether its cache is used would only raise again
        try:
            played.vacuous = next(filter(None, (s.vacuous() for s in run.sessions)), None)
        except (Exception, SystemExit) as error:  # its code runs here too
            pass_on_shortage(error)
            played.raised = Raised(error, where="finding out whether the cache is used")
    answers: dict[int, tuple[Tensor, ...]] = {}
    with Promote() if promote[1] else contextlib.nullcontext():
        for segment in run.segments:
            if not segment.answers:
                continue
            logits = subject.full(segment.history, segment.start)
            for answer in segment.answers:
                last = answer.first + answer.found.shape[1]
                pair = (answer.found, logits[:, answer.first : last])
                answers[answer.step] = tuple(segment.real(t, answer.first) for t in pair)
    for step in sorted(answers):
        played.found.append(answers[step][0])
        played.expected.append(answers[step][1])
    return played


class Doctor(Protocol):
    """Finds out where and what a bug is."""

    def __call__(self, subject: Any, case: Case, step: int, played: Played) -> Diagnosis:
        """subject: in float64; step: the first wrong one; played: the float64 run."""


class Judge:
    """Judges one subject; what the scenarios share is computed once."""

    def __init__(self, subject: Subject, doctor: Doctor | None = None) -> None:
        self.subject = subject
        self.doctor = doctor
        self._double: Subject | None = None
        self._acausal: str | None = None

    @property
    def double(self) -> Subject:
        """The subject in float64. Raises what the subject raises if it cannot be converted."""
        if self._double is None:
            same = self.subject.dtype == torch.float64
            self._double = self.subject if same else self.subject.to(torch.float64)
        return self._double

    def not_causal(self) -> str:
        """How a later token changes an earlier logit in an uncached pass, or "" if it does not."""
        if self._acausal is None:
            self._acausal = _changed_by_later(self.double)
        return self._acausal

    def judge(self, case: Case, thorough: bool = False) -> Finding:
        """Play one scenario and say what the comparison means.

        `thorough` computes all three precisions where fewer would decide. Raises CheckFailed if
        the uncached logits are not finite.
        """
        scenario = case.scenario
        if lacking := scenario.lacking(self.subject):
            return Finding(scenario.name, UNSUPPORTED, f"needs {lacking}, which it has not")
        played = play(self.subject, case)
        _check_finite(played)
        if played.raised is not None:
            return _raised(scenario, played)
        working = compare(played.found, played.expected)
        finding = Finding(scenario.name, IDENTICAL, working=working)
        if played.unrefused is not None:
            text = "a token beyond the capacity was accepted (an error was expected)"
            return replace(finding, verdict=BUG, evidence=text, first_wrong=played.unrefused)
        if played.vacuous:
            verdict = VACUOUS if self.subject.stores else NO_CACHE
            finding = replace(finding, verdict=verdict, evidence=played.vacuous)
        if not _differs(finding) and not thorough:
            return finding
        return self._three(case, finding, played, thorough)

    def _three(self, case: Case, finding: Finding, played: Played, thorough: bool) -> Finding:
        """Decide by the float64 run, and by the promoted one where that is not enough."""
        exact = self._exact(case)
        if isinstance(exact, BaseException):
            return _not_in_float64(finding, exact)
        gap64 = compare(exact.found, exact.expected)
        finding = replace(finding, float64=gap64)
        wrong64 = _first_wrong(gap64)
        if thorough or wrong64 is not None:
            best = play(self.double, case, (True, True))
            promoted = compare(best.found, best.expected)
            finding = replace(finding, promoted=promoted)
            wrong = _first_wrong(promoted)
            if wrong is not None:
                return self._wrong(case, finding, wrong, exact)
            if wrong64 is not None:
                return _precision(finding, exact, best, wrong64)
        low = _beyond_noise(played, exact)
        if low is not None:
            low = _beyond_noise(played, exact, self._by_codes(case, exact))
        if low is not None:
            text = f"right in float64, wrong in {dtype_name(self.subject.dtype)} alone"
            return replace(finding, verdict=BUG, evidence=text, first_wrong=low)
        if finding.verdict == IDENTICAL and _differs(finding):
            return replace(finding, verdict=ROUNDING)
        return finding

    def _exact(self, case: Case) -> Played | BaseException:
        """The float64 run; the promoted one, where a cast to float32 does not fit its weights, or
        makes -inf of a mask of float64's least number. The error, if neither can be."""
        first: BaseException | None = None
        for promote in ((False, False), (True, True)):
            error: BaseException
            try:
                exact = play(self.double, case, promote)
            except (RuntimeError, NotImplementedError) as raised:
                pass_on_shortage(raised)
                error = raised
            else:
                if exact.raised is not None:
                    error = exact.raised.error
                elif _finite(exact):
                    return exact
                else:
                    error = ArithmeticError("its logits are not finite there")
            first = first or error
        assert first is not None
        return first

    def _by_codes(self, case: Case, exact: Played) -> float:
        """How far a quantizer moves the logits, all its codes together; 0 without one.

        Where a value lies between two codes, rounding decides, and the other code is no bug.
        """
        plain = self.double.unrounded()
        if plain is None:
            return 0.0
        return max(distances(play(plain, case).expected, exact.expected))

    def _wrong(self, case: Case, finding: Finding, step: int, exact: Played) -> Finding:
        if text := _random(self.double):
            return replace(finding, verdict=ERROR, evidence=text, first_wrong=step)
        if text := self.not_causal():
            return replace(finding, verdict=NOT_CAUSAL, evidence=text, first_wrong=step)
        gap = finding.promoted.relative if finding.promoted else float("nan")
        text = f"the gap stays in float64 ({gap:.1e})"
        found = Diagnosis()
        if self.doctor is not None:
            with Promote() if exact.promoted else contextlib.nullcontext():
                found = self.doctor(self.double, case, step, exact)
        return replace(finding, verdict=BUG, evidence=text, first_wrong=step, diagnosis=found)


def _first_wrong(gap: Gap) -> int | None:
    """The first step that differs in float64 by more than rounding."""
    return next((i for i, step in enumerate(gap.by_step) if not step <= ROUNDING_64), None)


def _precision(finding: Finding, exact: Played, best: Played, step: int) -> Finding:
    """Both arms compute lower somewhere, or the cached arm alone does: then it differs by more."""
    model = max(distances(exact.expected, best.expected))
    gap = max(distances(exact.found, exact.expected))
    if gap <= NOISE * model:
        text = f"the model itself computes below float64, cached or not (by {model:.1e})"
        return replace(finding, verdict=PRECISION, evidence=text)
    text = f"the cache stores or computes below the model's own format (a loss of {gap:.1e})"
    return replace(finding, verdict=PRECISION, evidence=text, first_wrong=step, lossy=True)


def _beyond_noise(played: Played, exact: Played, least: float = 0.0) -> int | None:
    """The first step at which the cached arm is further from float64 than rounding explains, or
    than `least`."""
    noise = max(distances(played.expected, exact.expected))
    limit = max(least, NOISE * max(noise, torch.finfo(played.expected[0].dtype).eps))
    gaps = distances(played.found, exact.expected)
    return next((i for i, gap in enumerate(gaps) if not gap <= limit), None)


def _finite(played: Played) -> bool:
    return all(bool(logits.isfinite().all()) for logits in played.expected)


def _check_finite(played: Played) -> None:
    for step, logits in enumerate(played.expected):
        if not bool(logits.isfinite().all()):
            raise CheckFailed(
                f"step {step}: the logits are not finite", "Look for NaN in the weights."
            )


def _raised(scenario: Scenario, played: Played) -> Finding:
    assert played.raised is not None
    raised = played.raised
    if isinstance(raised.error, (CacheOpUnsupported, TooShort)):
        return Finding(scenario.name, UNSUPPORTED, str(raised.error))
    return Finding(scenario.name, ERROR, raised.words, first_wrong=raised.step)


def _not_in_float64(finding: Finding, error: BaseException) -> Finding:
    """Without a float64 run only identical logits can be judged."""
    if finding.verdict != IDENTICAL or not _differs(finding):
        return finding
    text = f"cannot run in float64, which would decide ({type(error).__name__}: "
    return replace(finding, verdict=UNDECIDED, evidence=f"{text}{first_line(error)})")


def _differs(finding: Finding) -> bool:
    """Whether any step differs in the working format."""
    gap = finding.working
    return gap is not None and gap.identical < gap.steps


@torch.inference_mode()
def _random(subject: Subject) -> str:
    """Whether two uncached passes over the same tokens differ: then nothing can be compared."""
    run = Run(subject)
    start, ids = run.begin(), run.draw(1, 10)
    with Promote():
        gap = max(distances([subject.full(ids, start)], [subject.full(ids, start)]))
    if gap <= ROUNDING_64:
        return ""
    same = "two uncached passes over the same tokens differ"
    return f"{same} ({gap:.1e}): is dropout on, or noise added?"


@torch.inference_mode()
def _changed_by_later(subject: Subject) -> str:
    """Whether changing later tokens changes earlier logits of an uncached pass."""
    run = Run(subject)
    start = run.begin()
    ids = run.draw(1, 10)
    with Promote():
        whole = subject.full(ids, start)
        for cut in (3, 7):
            other = ids.clone()
            other[:, cut:] = (ids[:, cut:] + 1) % subject.vocab_size
            changed = subject.full(other, start)
            gap = max(distances([changed[:, :cut]], [whole[:, :cut]]))
            if not gap <= ROUNDING_64:
                return f"changing token {cut} changes logits before it ({gap:.1e}), uncached"
    return ""
