"""What a run was started with, compared with what one that goes on has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"d_model": 16}} -> {"model.d_model": 16}, to name what differs."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        inside = value.items() if isinstance(value, Mapping) else None
        found.update({f"{name}.{key}": part for key, part in inside} if inside else {name: value})
    return found


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of the facts that differ, of facts without others inside."""
    return [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each fact that differs, of facts without others inside, in words.

    >>> changes({"tokens": 32, "seed": 0}, {"tokens": 64, "seed": 0})
    ['tokens was 32 and is now 64']
    """
    return [
        f"{name} was {_short(before.get(name))} and is now {_short(now.get(name))}"
        for name in changed(before, now)
    ]


def _short(value: Any) -> str:
    """A setting in a message; of a hash, enough to tell two apart."""
    text = repr(value)
    return text if len(text) < 40 else f"{text[:9]}...{text[-1]}"
