"""Which options contradict or need each other: rules as data, which each command has a table of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvtool.errors import UsageError


@dataclass(frozen=True)
class Rule:
    """Options that are refused beside another one, or without it."""

    flags: str  # with blanks between; the first that was given is named
    verb: str  # "contradicts" or "needs"
    other: str  # a flag, or a flag and its value: "--impl transformers"
    hint: str
    said: str = ""  # of the flag, in place of the verb and the other

    @property
    def message(self) -> str:
        """The error message for each of the flags."""
        return self.said or f"{self.verb} {self.other}"


def contradicts(other: str, flags: str, hint: str) -> Rule:
    """`flags` are refused where `other` is given."""
    return Rule(flags, "contradicts", other, hint)


def needs(other: str, flags: str, hint: str, said: str = "") -> Rule:
    """`flags` are refused where `other` is not given."""
    return Rule(flags, "needs", other, hint, said)


def require(rules: Iterable[Rule], given: Mapping[str, object]) -> None:
    """Raise UsageError for the first rule that is broken.

    given: every flag that a rule names, and whether it says something else than it does by itself.
    """
    for rule in rules:
        if bool(given[rule.other]) == (rule.verb == "needs"):
            continue
        for flag in rule.flags.split():
            if given[flag]:
                raise UsageError(f"{flag}: {rule.message}", rule.hint)
