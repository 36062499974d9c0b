"""The scenarios that were not run, and why, in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

LACKING = ("needs ", ", which it has not")  # around an ability, in the evidence of a finding
MAX_REASON = 60  # characters of a reason


def left_out(skipped: Iterable[tuple[str, str]], run: Iterable[str]) -> str:
    """One line about the scenarios that no subject could run. skipped: each with the evidence.

    run: scenarios that some subject did.

    >>> left_out([("crop", "needs crop, which it has not"), ("permuted", "no rows")], [])
    'not run: permuted (no rows), crop'
    """
    done, reasons = set(run), dict(skipped)
    groups: dict[str, list[str]] = {}
    for scenario, evidence in reasons.items():
        if scenario not in done:
            groups.setdefault(_reason(scenario, evidence), []).append(scenario)
    groups[""] = groups.pop("", [])  # last, so that no reason seems to be theirs
    said = [
        ", ".join(names) + (f" ({why})" if why else "") for why, names in groups.items() if names
    ]
    return f"not run: {', '.join(said)}" if said else ""


class Judged(NamedTuple):
    """What a scenario was judged on."""

    scenario: str
    kernels: str
    layers: int = 0  # the first ones of a large model alone; 0: all
    not_fed: str = ""  # of the context


def cut_short(judged: Iterable[Judged]) -> list[str]:
    """What was left out since it would take too long: of layers, and of the context."""
    found = list(judged)
    parts = dict.fromkeys(one.not_fed for one in found if one.not_fed)
    not_fed = f"not fed: {', '.join(parts)}" if parts else ""
    return [part for part in (layers_left_out(found), not_fed) if part]


def layers_left_out(judged: Sequence[Judged]) -> str:
    """In words, the layers of a large model that scenarios did not go through.

    >>> layers_left_out([Judged("crop", "exact", 2), Judged("fork", "exact", 2)])
    'not judged: layers beyond the first 2 in 2 scenarios'
    """
    deep = {one.scenario for one in judged if not one.layers}
    cut: dict[tuple[int, str], dict[str, None]] = {}
    for one in judged:
        if one.layers:
            kernels = one.kernels if one.scenario in deep else ""
            cut.setdefault((one.layers, kernels), {})[one.scenario] = None
    parts = []
    for (n, kernels), names in cut.items():
        where = next(iter(names)) if len(names) == 1 else f"{len(names)} scenarios"
        some = f" with {kernels} kernels of all kinds but one" if kernels else ""
        parts.append(f"beyond the first {n} in {where}{some}")
    return f"not judged: layers {', '.join(parts)}" if parts else ""


def _reason(scenario: str, evidence: str) -> str:
    """The reason in few words; none if the scenario has the name of the missing ability."""
    before, after = LACKING
    if evidence.startswith(before) and evidence.endswith(after):
        ability = evidence[len(before) : -len(after)]
        return "" if ability == scenario else f"no {ability}"
    _, cannot, what = evidence.partition(" cannot ")
    text = what.partition(": ")[2] or f"cannot {what}" if cannot else evidence
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
