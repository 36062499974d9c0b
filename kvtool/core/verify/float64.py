"""A subject in float64, where a right cache differs by rounding of about 1e-15 alone."""

from __future__ import annotations

import torch

from kvtool.core.verify.arms import Arms, Case, play
from kvtool.core.verify.comparable import changed_by_later
from kvtool.core.verify.compare import ROUNDING_64, Gap, distances
from kvtool.core.verify.subject import Subject
from kvtool.errors import pass_on_shortage


class Float64:
    """The float64 form of a subject: converted once, and only when it is needed."""

    def __init__(self, given: Subject) -> None:
        self.given = given
        self._double: Subject | None = None
        self._acausal: str | None = None

    @property
    def subject(self) -> Subject:
        """The subject in float64. Raises what the subject raises if it cannot be converted."""
        if self._double is None:
            same = self.given.dtype == torch.float64
            self._double = self.given if same else self.given.to(torch.float64)
        return self._double

    def not_causal(self) -> str:
        """How a later token changes an earlier logit in an uncached pass, or "" if it does not."""
        if self._acausal is None:
            self._acausal = changed_by_later(self.subject)
        return self._acausal

    def play(self, case: Case) -> Arms | BaseException:
        """The float64 run; the promoted one, where a cast to float32 does not fit its weights, or
        makes -inf of a mask of float64's least number. The first error, if neither can be."""
        shared = self.shared(case)
        if shared is not None and first_wrong(shared.gap) is None:
            return shared
        errors: list[BaseException] = []
        for promote in ((False, False), (True, True)):
            try:
                in_float64 = play(self.subject, case, promote)
            except Exception as error:  # of the user's code: it refuses, or asserts a format
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

    def shared(self, case: Case, plain: bool = False) -> Arms | None:
        """The evidence that the subject has in common with others, if any."""
        evidence = getattr(self.given, "evidence", None)
        return None if evidence is None else evidence.arms(self.given, case, plain)

    def within_codes(self, case: Case, arms: Arms, in_float64: Arms) -> bool:
        """Whether the cached arm is no further off than quantization moves the logits.

        Where a value lies between two codes, rounding decides, and the other code is no bug.
        """
        unrounded = self.shared(case, plain=True)
        if unrounded is None:
            plain = self.subject.unrounded()
            if plain is None:
                return False
            unrounded = play(plain, case)
        codes = max(distances(unrounded.expected, in_float64.expected))
        return max(distances(arms.found, in_float64.expected)) <= codes


def first_wrong(gap: Gap) -> int | None:
    """The first step that differs in float64 by more than rounding."""
    return next((i for i, step in enumerate(gap.by_step) if not step <= ROUNDING_64), None)


def _finite(arms: Arms) -> bool:
    return all(bool(logits.isfinite().all()) for logits in arms.expected)
