"""The scenarios that were not run, and why, in one line."""

from __future__ import annotations

from collections.abc import Iterable

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


def cut_short(judged: Iterable[tuple[str, int, str]]) -> list[str]:
    """What was left out since it would take too long: of layers, and of the context.

    judged: scenarios, each with its layers as in `layers_left_out`, and what it was not fed.
    """
    found = list(judged)
    parts = dict.fromkeys(not_fed for _, _, not_fed in found if not_fed)
    not_fed = f"not fed: {', '.join(parts)}" if parts else ""
    layers = layers_left_out((scenario, n) for scenario, n, _ in found)
    return [part for part in (layers, not_fed) if part]


def layers_left_out(judged: Iterable[tuple[str, int]]) -> str:
    """In words, the layers of a large model that scenarios did not go through.

    judged: scenarios, each with how many first layers alone it went through; 0: all.

    >>> layers_left_out([("crop", 2), ("fork", 2), ("decode", 0)])
    'not judged: layers beyond the first 2 in 2 scenarios'
    """
    cut = {scenario: n for scenario, n in judged if n}
    parts = []
    for n in dict.fromkeys(cut.values()):
        names = [scenario for scenario, layers in cut.items() if layers == n]
        where = names[0] if len(names) == 1 else f"{len(names)} scenarios"
        parts.append(f"beyond the first {n} in {where}")
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
