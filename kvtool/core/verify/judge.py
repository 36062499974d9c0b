"""Is it a bug or rounding? The same ids, cached and uncached, in three precisions.

Rounding shrinks with the precision and a bug does not. In float64 a right cache is left with a gap
of about 1e-15 and a wrong one with the gap that it had, so no tolerance has to be tuned. What
stays in float64 but vanishes once every cast to a lower type is promoted is precision: the model
or the cache itself computes or stores lower. Other kernels may serve the working format, and a bug
be in them alone: there a cache must not be further from the float64 run than the uncached run is.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any, Protocol

import torch

from kvtool.core.machine import dtype_name
from kvtool.core.verify.arms import Arms, Case, play
from kvtool.core.verify.compare import Gap, compare, distances
from kvtool.core.verify.finding import Diagnosis, Finding
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
from kvtool.core.verify.reduced import reduced
from kvtool.core.verify.scenario_run import ScenarioRun, TooShort
from kvtool.core.verify.scenarios import Scenario
from kvtool.core.verify.subject import Subject
from kvtool.errors import CacheOpUnsupported, CheckFailed, first_line, pass_on_shortage

ROUNDING_64 = 1e-12  # between right caches (about 1e-15) and everything else (1e-9 and more)
# How much further a right cache may be from float64 than the uncached run: 2.0 was the most in 144
# tiny models in each of float32, bfloat16 and float16.
NOISE = 10


class Doctor(Protocol):
    """Finds out where and what a bug is."""

    def __call__(self, subject: Any, case: Case, step: int, arms: Arms) -> Diagnosis:
        """subject: in float64; step: the first wrong one; arms: the float64 run."""


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
        arms = play(self.subject, case)
        _check_finite(arms)
        if arms.raised is not None:
            return _raised(scenario, arms)
        working = compare(arms.found, arms.expected)
        finding = Finding(scenario.name, IDENTICAL, working=working)
        if arms.accepted_beyond_capacity is not None:
            text = "a token beyond the capacity was accepted (an error was expected)"
            return replace(
                finding, verdict=BUG, evidence=text, first_wrong=arms.accepted_beyond_capacity
            )
        if arms.vacuous:
            verdict = VACUOUS if self.subject.stores else NO_CACHE
            finding = replace(finding, verdict=verdict, evidence=arms.vacuous)
        if not _differs(finding) and not thorough:
            return finding
        return self._by_precision(case, finding, arms, thorough)

    def _by_precision(self, case: Case, finding: Finding, arms: Arms, thorough: bool) -> Finding:
        """Decide by the float64 run, and by the promoted one where that is not enough."""
        in_float64 = self._play_in_float64(case)
        if isinstance(in_float64, BaseException):
            return _not_in_float64(finding, in_float64)
        gap = compare(in_float64.found, in_float64.expected)
        finding = replace(finding, float64=gap)
        first_gap_in_float64 = _first_wrong(gap)
        if thorough or first_gap_in_float64 is not None:
            promoted = play(self.double, case, (True, True))
            gap = compare(promoted.found, promoted.expected)
            finding = replace(finding, promoted=gap)
            wrong = _first_wrong(gap)
            if wrong is not None:
                return self._wrong(case, finding, wrong, in_float64)
            if first_gap_in_float64 is not None:
                return _precision(finding, in_float64, promoted, first_gap_in_float64)
        return self._in_working_format(case, finding, arms, in_float64)

    def _in_working_format(
        self, case: Case, finding: Finding, arms: Arms, in_float64: Arms
    ) -> Finding:
        """Decide where float64 is right: other kernels may serve the working format."""
        wrong = _beyond_noise(arms, in_float64)
        if wrong is not None:
            wrong = _beyond_noise(arms, in_float64, self._by_codes(case, in_float64))
        if wrong is not None:
            text = f"right in float64, wrong in {dtype_name(self.subject.dtype)} alone"
            return replace(finding, verdict=BUG, evidence=text, first_wrong=wrong)
        if finding.verdict == IDENTICAL and _differs(finding):
            return replace(finding, verdict=ROUNDING)
        return finding

    def _play_in_float64(self, case: Case) -> Arms | BaseException:
        """The float64 run; the promoted one, where a cast to float32 does not fit its weights, or
        makes -inf of a mask of float64's least number. The first error, if neither can be."""
        errors: list[BaseException] = []
        for promote in ((False, False), (True, True)):
            try:
                in_float64 = play(self.double, case, promote)
            except (RuntimeError, NotImplementedError) as error:
                pass_on_shortage(error)
                errors.append(error)
                continue
            if in_float64.raised is not None:
                errors.append(in_float64.raised.error)
            elif not _finite(in_float64):
                errors.append(ArithmeticError("its logits are not finite there"))
            else:
                return in_float64
        return errors[0]

    def _by_codes(self, case: Case, in_float64: Arms) -> float:
        """How far a quantizer moves the logits, all its codes together; 0 without one.

        Where a value lies between two codes, rounding decides, and the other code is no bug.
        """
        plain = self.double.unrounded()
        if plain is None:
            return 0.0
        return max(distances(play(plain, case).expected, in_float64.expected))

    def _wrong(self, case: Case, finding: Finding, step: int, in_float64: Arms) -> Finding:
        if text := _random(self.double):
            return replace(finding, verdict=ERROR, evidence=text, first_wrong=step)
        if text := self.not_causal():
            return replace(finding, verdict=NOT_CAUSAL, evidence=text, first_wrong=step)
        if in_float64.mixed > ROUNDING_64:
            text = f"rows of a batch are not what each is alone, uncached ({in_float64.mixed:.1e})"
            return replace(finding, verdict=BUG, evidence=text, first_wrong=step)
        gap = finding.promoted.relative if finding.promoted else float("nan")
        text = f"the gap stays in float64 ({gap:.1e})"
        found = Diagnosis()
        if self.doctor is not None:
            shorter = reduced(self.double, case, step, in_float64, ROUNDING_64)
            with Promote() if in_float64.promoted else contextlib.nullcontext():
                found = self.doctor(self.double, *shorter)
        return replace(finding, verdict=BUG, evidence=text, first_wrong=step, diagnosis=found)


def _first_wrong(gap: Gap) -> int | None:
    """The first step that differs in float64 by more than rounding."""
    return next((i for i, step in enumerate(gap.by_step) if not step <= ROUNDING_64), None)


def _precision(finding: Finding, in_float64: Arms, promoted: Arms, step: int) -> Finding:
    """Both arms compute lower somewhere, or the cached arm alone does: then it differs by more."""
    model = max(distances(in_float64.expected, promoted.expected))
    gap = max(distances(in_float64.found, in_float64.expected))
    if gap <= NOISE * model:
        text = f"the model itself computes below float64, cached or not (by {model:.1e})"
        return replace(finding, verdict=PRECISION, evidence=text)
    text = f"the cache stores or computes below the model's own format (a loss of {gap:.1e})"
    return replace(finding, verdict=PRECISION, evidence=text, first_wrong=step, lossy=True)


def _beyond_noise(arms: Arms, in_float64: Arms, least: float = 0.0) -> int | None:
    """The first step at which the cached arm is further from float64 than rounding explains, or
    than `least`."""
    noise = max(distances(arms.expected, in_float64.expected))
    limit = max(least, NOISE * max(noise, torch.finfo(arms.expected[0].dtype).eps))
    gaps = distances(arms.found, in_float64.expected)
    return next((i for i, gap in enumerate(gaps) if not gap <= limit), None)


def _finite(arms: Arms) -> bool:
    return all(bool(logits.isfinite().all()) for logits in arms.expected)


def _check_finite(arms: Arms) -> None:
    for step, logits in enumerate(arms.expected):
        if not bool(logits.isfinite().all()):
            raise CheckFailed(
                f"step {step}: the logits are not finite", "Look for NaN in the weights."
            )


def _raised(scenario: Scenario, arms: Arms) -> Finding:
    assert arms.raised is not None
    raised = arms.raised
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
    """How two uncached passes over the same tokens differ, since nothing can be compared then; ""
    if they do not."""
    run = ScenarioRun(subject)
    start, ids = run.start(), run.next_ids(1, 10)
    with Promote():
        gap = max(distances([subject.full(ids, start)], [subject.full(ids, start)]))
    if gap <= ROUNDING_64:
        return ""
    same = "two uncached passes over the same tokens differ"
    return f"{same} ({gap:.1e}): is dropout on, or noise added?"


@torch.inference_mode()
def _changed_by_later(subject: Subject) -> str:
    """How changing later tokens changes earlier logits of an uncached pass, "" if it does not."""
    run = ScenarioRun(subject)
    start = run.start()
    ids = run.next_ids(1, 10)
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
