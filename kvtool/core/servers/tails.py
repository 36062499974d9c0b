"""What the medians of an arm hide: a fault at few positions, or in few requests.

Four views, each a figure over the engine's noise, and each with the size of a fault beside it: the
positions that engines get wrong first (ends of blocks, an answer's first tokens), nine tenths of
all positions, one request, and one position. Right servers have tails too, so that each view has a
limit of its own, and a band below it in which nothing can be told. So it is with what is beyond the
limit over the noise of its own history alone: what is sure is beyond it over the largest noise of
its prompt too, at a kind of positions over the prompt's median one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np

from kvtool.core.servers.gaps import Compared, ProbeGap

BLOCK = 16  # tokens: engines' blocks are multiples
MIN_PROMPTS = 3  # that have a position of a kind, without which it has no median
MIN_ANSWERS = 5  # of a request that is judged by itself
LARGE = 0.5  # of a wrong token: a smaller gap is noise up to FAR times it
FAR = 4.0
TINY = 0.05  # of a wrong token: the same of an arm's median


class Limits(NamedTuple):
    """Times the noise: up to `doubt` a right server, from `fault` on a wrong one."""

    doubt: float
    fault: float


class Views(NamedTuple):
    """The limits of each view."""

    place: Limits
    nine_tenths: Limits
    request: Limits
    position: Limits


VIEWS = Views(Limits(1.4, 1.7), Limits(1.7, 2.0), Limits(1.6, 2.0), Limits(3.2, FAR))
# Where others' tokens lie between, right servers have longer tails.
CROWDED = Limits(2.5, FAR)
CROWDED_VIEWS = Views(CROWDED, CROWDED, CROWDED, Limits(FAR, 2 * FAR))


class Seen(NamedTuple):
    """Something beyond the limits of a view."""

    sure: bool
    said: str
    ratio: float
    gap: float  # nats
    first: int  # the shortest history that has it


Found = Sequence[Compared]
Where = Callable[[ProbeGap, int], bool]  # a position, and how many of its answer are before it
PLACES: dict[str, Where] = {
    f"at every {BLOCK}th token": lambda gap, _: gap.history % BLOCK == 0,
    f"one before every {BLOCK}th token": lambda gap, _: gap.history % BLOCK == BLOCK - 1,
    f"one behind every {BLOCK}th token": lambda gap, _: gap.history % BLOCK == 1,
    "at the first token of each answer": lambda _, i: i == 0,
    "at the second token of each answer": lambda _, i: i == 1,
}


def hidden(found: Found, crowded: bool) -> Seen | None:
    """The fault that medians hide, if there is any: what is sure before what is not.

    crowded: whether others' tokens lie between, so that few answers may differ by more.
    """
    faults = [compared.fault for compared in found if compared.fault is not None]
    if not faults:
        return None
    fault = median(faults)
    views = CROWDED_VIEWS if crowded else VIEWS
    typical = [_over(compared, _typical(compared)) for compared in found]
    largest = [_over(compared, _largest(compared)) for compared in found]

    def seen(by_three: Found, by_place: Found, by_position: Found) -> list[Seen]:
        each = (
            _request(by_three, fault, views.request), _places(by_place, fault, views.place),
            _nine_tenths(by_three, fault, views.nine_tenths),
            _position(by_position, fault, views.position),
        )  # fmt: skip
        return [view for view in each if view is not None]

    sure = [view for view in seen(largest, typical, largest) if view.sure]
    doubtful = seen(found, found, typical)
    return next(iter([*sure, *(view._replace(sure=False) for view in doubtful)]), None)


def _typical(compared: Compared) -> float:
    return median(gap.floor for gap in compared.gaps)


def _largest(compared: Compared) -> float:
    return max(compared.largest, *(gap.floor for gap in compared.gaps))


def _over(compared: Compared, least: float) -> Compared:
    """The same over no smaller noise than that. Of many floors some are too small by chance. And a
    kernel for many tokens rounds in long histories alone, but with the cache in short ones too,
    whose prefix a longer request has left."""
    gaps = [
        replace(gap, floor=least, ratio=gap.gap / least) if gap.floor < least else gap
        for gap in compared.gaps
    ]
    return replace(compared, gaps=gaps)


def _seen(
    limits: Limits, said: str, ratio: float, gap: float, fault: float, first: int
) -> Seen | None:
    """What is beyond the limits of a view."""
    if ratio <= limits.doubt or (not gap > LARGE * fault and ratio <= FAR):
        return None
    return Seen(ratio > limits.fault, said, ratio, gap, first)


def _places(found: Found, fault: float, limits: Limits) -> Seen | None:
    """The kind of positions that is furthest off."""
    seen = []
    for said, where in PLACES.items():
        of_prompts = [at for c in found if (at := [g for g, i in _indexed(c) if where(g, i)])]
        if len(of_prompts) < MIN_PROMPTS:
            continue
        ratio, gap = (
            float(median(median(getattr(g, name) for g in at) for at in of_prompts))
            for name in ("ratio", "gap")
        )
        first = min(g.history for at in of_prompts for g in at if g.ratio >= ratio)
        seen.append(_seen(limits, said, ratio, gap, fault, first))
    return max((each for each in seen if each), key=lambda each: each.ratio, default=None)


def _indexed(compared: Compared) -> list[tuple[ProbeGap, int]]:
    """Each position with its place in the answer that it is of."""
    counts: dict[int, int] = {}
    found = []
    for gap in compared.gaps:
        counts[gap.run] = counts.get(gap.run, -1) + 1
        found.append((gap, counts[gap.run]))
    return found


def _nine_tenths(found: Found, fault: float, limits: Limits) -> Seen | None:
    gaps = [gap for compared in found for gap in compared.gaps]
    ratio = float(np.quantile([gap.ratio for gap in gaps], 0.9, method="lower"))
    beyond = [gap for gap in gaps if gap.ratio >= ratio]
    said = f"at {len(beyond)} of {len(gaps)} positions"
    size = min(gap.gap for gap in beyond)
    return _seen(limits, said, ratio, size, fault, min(gap.history for gap in beyond))


def _request(found: Found, fault: float, limits: Limits) -> Seen | None:
    runs = [
        [gap for gap in compared.gaps if gap.run == run]
        for compared in found
        for run in {gap.run for gap in compared.gaps}
    ]
    beyond = []
    for run in runs:
        ratio, gap = (median(getattr(g, name) for g in run) for name in ("ratio", "gap"))
        doubt = limits.doubt if len(run) >= MIN_ANSWERS else max(limits.doubt, FAR)
        if ratio > doubt and gap > LARGE * fault:
            beyond.append((ratio, gap, min(g.history for g in run)))
    if not beyond:
        return None
    ratio, gap, _ = max(beyond)
    said = f"in {len(beyond)} of {len(runs)} requests"
    return _seen(limits, said, ratio, gap, fault, min(first for *_, first in beyond))


def _position(found: Found, fault: float, limits: Limits) -> Seen | None:
    gaps = [gap for compared in found for gap in compared.gaps]
    beyond = [
        (gap.ratio, gap.gap, gap.history)
        for gap in gaps
        if gap.ratio > limits.doubt and gap.gap > LARGE * fault
    ]
    if not beyond:
        return None
    ratio, nats, _ = max(beyond)
    said = f"at {len(beyond)} of {len(gaps)} positions"
    return _seen(limits, said, ratio, nats, fault, min(first for *_, first in beyond))
