"""The outcome of findings: right, wrong, or nothing proved; and whether the check can be
trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

IDENTICAL, ROUNDING, PRECISION, BUG = "identical", "rounding", "precision", "bug"
NOT_CAUSAL, VACUOUS, ERROR, UNSUPPORTED = "not-causal", "vacuous", "error", "unsupported"
UNDECIDED = "undecided"  # it differs, and neither float64 nor the measured noise decides
LOSSY = "lossy"  # the cache rounds what it stores: right if that was declared
NO_CACHE = "no cache"  # vacuous, of a kind that stores nothing: it is there to be compared with


class Outcome(Enum):
    """The meaning of a verdict for a cache."""

    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"
    NOTHING = "nothing"  # it was played, and equality would prove nothing
    SKIPPED = "skipped"  # beyond the subject, or a kind that stores nothing, to compare with

    @property
    def wrong(self) -> bool:
        """Wrong, or may be: a difference that nothing can judge is no pass."""
        return self in (Outcome.WRONG, Outcome.UNDECIDED)


def outcome(verdict: str, right: bool, stores: bool) -> Outcome:
    """The outcome of a verdict on a cache; stores: whether it stores anything."""
    if verdict in (UNSUPPORTED, NO_CACHE) or (right and not stores):
        return Outcome.SKIPPED
    if verdict == UNDECIDED:
        return Outcome.UNDECIDED
    if verdict == VACUOUS:
        return Outcome.NOTHING
    return Outcome.RIGHT if right else Outcome.WRONG


class HasOutcome(Protocol):
    """A check of a kind of cache in a scenario."""

    @property
    def cache(self) -> str:
        """The kind of cache."""

    @property
    def stores(self) -> bool:
        """Whether that kind stores anything."""

    @property
    def outcome(self) -> Outcome:
        """The outcome of the check."""


C = TypeVar("C", bound=HasOutcome)


@dataclass(frozen=True)
class Summary(Generic[C]):
    """All checks, and the outcome of the planted bug that tests them; None: there was none."""

    checks: Sequence[C]
    control: Outcome | None

    @property
    def right(self) -> list[C]:
        """The right checks."""
        return [check for check in self.checks if check.outcome == Outcome.RIGHT]

    @property
    def wrong(self) -> list[C]:
        """The wrong checks, and the undecided ones."""
        return [check for check in self.checks if check.outcome.wrong]

    @property
    def proved_nothing(self) -> list[C]:
        """The checks that were played and proved nothing."""
        return [check for check in self.checks if check.outcome == Outcome.NOTHING]

    @property
    def unjudged_kinds(self) -> list[str]:
        """Kinds of cache that store something, but were not judged in any scenario."""
        kinds = dict.fromkeys(check.cache for check in self.checks if check.stores)
        known = {check.cache for check in (*self.right, *self.wrong)}
        return [kind for kind in kinds if kind not in known]

    @property
    def trustworthy(self) -> bool:
        """Whether the planted bug was called wrong."""
        return self.control in (None, Outcome.WRONG)

    @property
    def ok(self) -> bool:
        """Something is right, nothing wrong, no kind was checked in vain, and the bug was found."""
        return bool(self.right) and not self.wrong and not self.unjudged_kinds and self.trustworthy
