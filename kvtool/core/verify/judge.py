"""Is it a bug or rounding? The same ids, cached and uncached, in three precisions.

Rounding shrinks with the precision and a bug does not. In float64 a right cache is left with a gap
of about 1e-15 and a wrong one with the gap that it had, so no tolerance has to be tuned. What
stays in float64 but vanishes once every cast to a lower type is promoted is precision: the model
or the cache itself computes or stores lower.

The evidence has an order. A clean float64 run of the same model decides that the cache is right;
what is left is whether other kernels serve the working format, and a bug is in them alone: then the
cached run is further from the float64 one than the uncached run is. A float64 run that is not of
the same model, or cannot be had, decides nothing: the noise of the working format is measured
instead (`measured`). Where float64 says bug, innocent causes are tried first (`second_look`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch

from kvtool.core.machine import dtype_name
from kvtool.core.verify import noise
from kvtool.core.verify.arms import Arms, Case, play
from kvtool.core.verify.comparable import differs_from_itself
from kvtool.core.verify.compare import ROUNDING_64, compare, distances
from kvtool.core.verify.finding import Diagnosis, Finding
from kvtool.core.verify.float64 import Float64, first_wrong
from kvtool.core.verify.measured import Beyond, Measured
from kvtool.core.verify.outcome import (
    BUG,
    ERROR,
    IDENTICAL,
    LOSSY,
    NO_CACHE,
    NOT_CAUSAL,
    PRECISION,
    ROUNDING,
    UNDECIDED,
    UNSUPPORTED,
    VACUOUS,
)
from kvtool.core.verify.precision import promoting
from kvtool.core.verify.reduced import reduced
from kvtool.core.verify.scenario_run import TooShort
from kvtool.core.verify.scenarios import Scenario
from kvtool.core.verify.second_look import (
    OwnPrefixes,
    by_own_prefixes,
    constants,
    is_rounding,
    loses_plainly,
    loss_of,
    measured_loss,
    on_an_edge,
)
from kvtool.core.verify.subject import Subject
from kvtool.errors import CacheOpUnsupported, CheckFailed, first_line

NOISE = 10  # times the model's own loss, from which the cached arm alone computes lower
DOUBT = 0.9  # of a gap that few tokens show: what stays in place below that may be rounding
OWN_PREFIX = "what a pass computes depends on its length; each step equals one over its own prefix"


class Doctor(Protocol):
    """Finds out where and what a bug is."""

    def __call__(self, subject: Any, case: Case, step: int, arms: Arms) -> Diagnosis:
        """subject: in float64; step: the first wrong one; arms: the float64 run."""


class Judge:
    """Judges one subject; what the scenarios share is computed once."""

    def __init__(self, subject: Subject, doctor: Doctor | None = None) -> None:
        self.subject = subject
        self.doctor = doctor
        self.float64 = Float64(subject)

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
        # Float64 would decide nothing, and of a large model it takes long.
        if finding.verdict == NO_CACHE and getattr(self.subject, "evidence", None) is not None:
            return finding
        return self._by_precision(case, finding, arms, thorough)

    def _by_precision(self, case: Case, finding: Finding, arms: Arms, thorough: bool) -> Finding:
        """Decide by the float64 run, and by the promoted one where that is not enough."""
        in_float64 = self.float64.play(case)
        if isinstance(in_float64, BaseException):
            why = f"cannot run in float64 ({type(in_float64).__name__}: {first_line(in_float64)})"
            return self._by_noise(finding, Measured(self.subject, case, arms), why)
        gap = in_float64.gap
        finding = replace(finding, float64=gap)
        first_gap_in_float64 = first_wrong(gap)
        promoted = None
        if (thorough and not in_float64.by_attention) or first_gap_in_float64 is not None:
            promoted = play(self.float64.subject, case, (True, True))
            finding = replace(finding, promoted=compare(promoted.found, promoted.expected))
        if promoted is None or first_gap_in_float64 is None:
            return self._clean(case, finding, arms, in_float64)
        wrong = finding.promoted and first_wrong(finding.promoted)
        if wrong is None:
            return self._precision(case, finding, arms, in_float64, promoted, first_gap_in_float64)
        return self._disputed(case, finding, arms, (in_float64, promoted), wrong)

    def _clean(
        self,
        case: Case,
        finding: Finding,
        arms: Arms,
        in_float64: Arms,
        by_length: bool = True,
        why: str = "",
    ) -> Finding:
        """Decide where float64 is right: other kernels may serve the working format."""
        measured = Measured(self.subject, case, arms, by_length)
        if other := measured.same_model(in_float64):
            text = f"in float64 it is another model (its uncached logits are off by {other})"
            return self._by_noise(finding, measured, text)
        beyond = self._beyond(case, arms, in_float64, measured)
        if beyond is not None:
            name = dtype_name(self.subject.dtype)
            text = (
                f"right in float64, wrong in {name} alone "
                f"({beyond.times:.1f} times the noise, {beyond.floor:.1e})"
            )
            return replace(
                finding, verdict=BUG, evidence=text, first_wrong=beyond.step, noise=beyond.times
            )
        if finding.verdict == IDENTICAL and _differs(finding):
            return replace(finding, verdict=ROUNDING, evidence=why)
        return finding

    def _beyond(
        self, case: Case, arms: Arms, in_float64: Arms, measured: Measured
    ) -> Beyond | None:
        """How far the cached run is beyond the noise, where codes do not explain it."""
        asks_codes_first = self.float64.shared(case, plain=True) is not None  # it costs nothing
        if asks_codes_first and self.float64.within_codes(case, arms, in_float64):
            return None
        beyond = measured.beyond(in_float64)
        if beyond is None or asks_codes_first:
            return beyond
        return None if self.float64.within_codes(case, arms, in_float64) else beyond

    def _by_noise(self, finding: Finding, measured: Measured, why: str) -> Finding:
        """Decide without a float64 run, by how far uncached passes are from each other."""
        if finding.verdict != IDENTICAL or not _differs(finding):
            return finding
        beyond = measured.beyond()
        if beyond is not None and measured.unmeasurable:
            text = f"{why}, which would decide; uncached passes do not differ, and show no noise"
            return replace(finding, verdict=UNDECIDED, evidence=text)
        if beyond is not None:
            times = f"{beyond.times:.1e}" if beyond.times >= 1000 else f"{beyond.times:.1f}"
            text = f"{why}; {times} times as far as uncached passes are from each other"
            return replace(
                finding, verdict=BUG, evidence=text, first_wrong=beyond.step, noise=beyond.times
            )
        if measured.verdict() == noise.HIDDEN:
            text = f"{why}, which would decide; the noise would hide a wrong token"
            return replace(finding, verdict=UNDECIDED, evidence=text)
        text = f"{why}; no further than uncached passes are from each other"
        return replace(finding, verdict=ROUNDING, evidence=text)

    def _precision(
        self,
        case: Case,
        finding: Finding,
        arms: Arms,
        in_float64: Arms,
        promoted: Arms,
        step: int,
    ) -> Finding:
        """Tell whether both arms compute below float64, or the cached arm alone, which then differs
        by more. A loss counts only if the working format shows it."""
        model = max(distances(in_float64.expected, promoted.expected))
        gap = max(distances(in_float64.found, in_float64.expected))
        if gap <= NOISE * model:
            text = f"the model itself computes below float64, cached or not (by {model:.1e})"
            return replace(finding, verdict=PRECISION, evidence=text)
        if (
            self.subject.dtype != torch.float64
            and Measured(self.subject, case, arms).beyond() is None
        ):
            text = f"the cached arm computes below float64 (by {gap:.1e}), and not below its format"
            return replace(finding, verdict=PRECISION, evidence=text)
        lost = measured_loss(in_float64)
        text = f"the cache stores or computes below the model's own format (a loss of {gap:.1e})"
        told = self.subject.lossy
        return replace(
            finding,
            verdict=LOSSY if told else PRECISION,
            evidence=f"declared: {lost}" if told else text,
            first_wrong=None if told else step,
            lossy=not told,
            loss=lost.size,
        )

    def _disputed(
        self, case: Case, finding: Finding, arms: Arms, exact: tuple[Arms, Arms], step: int
    ) -> Finding:
        """Try what else would explain a gap that stays in float64, then call it a bug.

        exact: the float64 run, and the promoted one.
        """
        in_float64, promoted = exact
        if text := differs_from_itself(self.float64.subject):
            return replace(finding, verdict=ERROR, evidence=text, first_wrong=step)
        if text := self.float64.not_causal():
            return replace(finding, verdict=NOT_CAUSAL, evidence=text, first_wrong=step)
        if in_float64.mixed > ROUNDING_64:
            text = f"rows of a batch are not what each is alone, uncached ({in_float64.mixed:.1e})"
            return replace(finding, verdict=BUG, evidence=text, first_wrong=step)
        own = by_own_prefixes(self.float64.subject, promoted, ROUNDING_64)
        if own is not None:
            wrong = first_wrong(gap := compare(own.arms.found, own.arms.expected))
            if wrong is None:
                return self._by_length(
                    case, replace(finding, float64=gap, promoted=None), arms, own
                )
            promoted, step = own.arms, wrong
        sure = own is not None or self._surely_wrong(case, finding, step, promoted)
        innocent = None if sure else self._innocent(case, finding, arms, promoted)
        return innocent or self._wrong(case, finding, step, in_float64)

    def _surely_wrong(self, case: Case, finding: Finding, step: int, exact: Arms) -> bool:
        """Whether one short history of a generated scenario proves a bug, so that the others, which
        take long, need no second look."""
        if self.subject.rounds_alike:
            return False
        piece, _, short = reduced(self.float64.subject, case, step, exact, ROUNDING_64)
        if piece is case:
            return False
        arms = play(self.subject, piece)
        if arms.raised is not None:
            return False
        return self._innocent(piece, finding, arms, short, DOUBT) is None

    def _by_length(self, case: Case, finding: Finding, arms: Arms, own: OwnPrefixes) -> Finding:
        """Decide where passes over own prefixes leave no gap in float64."""
        if own.moot is not None:
            text = (
                "what a pass computes for earlier tokens depends on its length "
                f"(by {own.by:.1e}): no cache can hold it"
            )
            return replace(finding, verdict=UNDECIDED, evidence=text, first_wrong=own.moot)
        eps = torch.finfo(self.subject.dtype).eps
        again = by_own_prefixes(self.subject, arms, 4 * eps)
        if again is not None:
            arms = again.arms
            finding = replace(finding, working=compare(arms.found, arms.expected))
        return self._clean(case, finding, arms, own.arms, False, OWN_PREFIX)

    def _innocent(
        self, case: Case, finding: Finding, arms: Arms, exact: Arms, doubt: float = 0.0
    ) -> Finding | None:
        """The finding for a gap in float64 with an innocent cause, or None.

        doubt: the share of a gap that must stay in place for a bug, if more than usual.
        """
        if self.subject.rounds_alike:
            return None
        gap = max(distances(exact.found, exact.expected))
        measured = Measured(self.subject, case, arms)
        if self.subject.dtype != torch.float64:
            held = gap <= constants(self.float64.subject, exact, self.subject.dtype)
            other = "" if held else measured.same_model(exact)
            if (held or other) and measured.beyond() is None:  # last, as it takes longest
                if held:
                    text = f"both arms agree to the numbers that they hold rounded (to {gap:.1e})"
                    return replace(finding, verdict=PRECISION, evidence=text)
                text = f"in float64 it is another model (its uncached logits are off by {other})"
                return self._by_noise(finding, measured, text)
        if text := on_an_edge(self.float64.subject, case, exact, ROUNDING_64):
            return replace(finding, verdict=ROUNDING, evidence=text)
        lost = loss_of(self.float64.subject, case, exact)
        if lost is None:
            return None
        if lost.lasting > doubt and not is_rounding(lost, self.subject.lossy):
            return None
        if not loses_plainly(self.float64.subject, exact, ROUNDING_64):
            return None
        text = f"the cache rounds what it stores: {lost}"
        wrong = None if self.subject.lossy else first_wrong(compare(exact.found, exact.expected))
        return replace(
            finding,
            verdict=LOSSY,
            evidence=text,
            loss=lost.size,
            lossy=not self.subject.lossy,
            first_wrong=wrong,
        )

    def _wrong(self, case: Case, finding: Finding, step: int, in_float64: Arms) -> Finding:
        gap = max(distances(in_float64.found, in_float64.expected))
        text = f"the gap stays in float64 ({gap:.1e})"
        found = Diagnosis()
        if self.doctor is not None:
            shorter = reduced(self.float64.subject, case, step, in_float64, ROUNDING_64)
            with promoting(in_float64.promoted):
                found = self.doctor(self.float64.subject, *shorter)
        return replace(finding, verdict=BUG, evidence=text, first_wrong=step, diagnosis=found)


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


def _differs(finding: Finding) -> bool:
    """Whether any step differs in the working format."""
    gap = finding.working
    return gap is not None and gap.identical < gap.steps
