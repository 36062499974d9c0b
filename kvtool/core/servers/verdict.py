"""Is a server's cached answer further from its cold ones than those are from each other?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtool.core.servers.arms import ARMS
from kvtool.core.servers.texts import (
    MIN_VARIANTS,
    Answer,
    Cold,
    Measured,
    Probe,
    Tally,
    likeliest,
    vector,
)
from kvtool.core.verify import noise

IDENTICAL, WITHIN, BEYOND = "identical", "within noise", "beyond noise"
HIDDEN, VACUOUS, LOSSY, UNSUPPORTED = "cannot tell", "vacuous", "lossy", "unsupported"
NOT_REACHED = "not reached"  # too little was reused
CONTRARY = "contradicts itself"  # with the cache it chose tokens that its logprobs do not
ROUNDING, BUG = "rounding", "bug"  # where a promoted server decides
RIGHT = (IDENTICAL, WITHIN, ROUNDING, LOSSY)
WRONG = (BEYOND, BUG, HIDDEN, CONTRARY)
NOTHING_SAID = (VACUOUS, NOT_REACHED)  # neither for a cache nor against it

MIN_FLOOR = float(np.finfo(np.float32).eps)  # of a floor, relative: logprobs are float32
NOTHING = 1e-12  # the floor of equal answers, whose mean is rounded
RARE = 4.0  # times the floor, for a single answer while the others are within it
RARE_SIZE = 0.5  # of the smaller control: such an answer has at least this size
SMALL = 0.05  # of the smaller control: a gap below it is beyond the noise from RARE times on alone
# Of 30 healthy trials of a prototype one was above the noise, at 1.04; its faults began at 1.24.
LIMIT = 1.15  # times the noise, a median over prompts
CROWDED = 1.5  # times the noise, where others' tokens lie between: llama.cpp's unified cache then
# adds in another order than any cold request, and is right at 1.0 to 1.3
AS_NOISY = 0.5  # of the plain server's noise: a server in F32 has far less
DOUBTED = 2.0  # times the noise: below it a promoted server that is right decides, and what is
# CROWDED cannot be told: of many right servers one was above 1.5


@dataclass(frozen=True)
class ProbeGap:
    """One cached answer compared with the engine's noise at the same history. Distances are the
    root mean square over the likeliest tokens, in nats."""

    prompt: int
    run: int
    history: int
    gap: float
    floor: float
    ratio: float
    identical: bool


@dataclass(frozen=True)
class ArmVerdict:
    """The verdict of an arm over all prompts. None: nothing was compared."""

    arm: str
    verdict: str
    evidence: str = ""
    ratio: float | None = None  # median over prompts, of the median over requests
    worst: float | None = None  # of a single request
    worst_gap: float | None = None  # nats, of that request
    gap: float | None = None  # nats, as all that follow
    floor: float | None = None
    fault: float | None = None  # of the smaller control
    reused: int | None = None  # the most tokens that were taken from the cache
    requests: int = 0  # whose answers were compared
    reached: int | None = None  # of them, that reused as much as the arm is about
    prompts: int = 0
    first_beyond: int | None = None  # the shortest history whose answer is beyond the noise
    gaps: tuple[ProbeGap, ...] = ()
    limit: float = LIMIT  # of the ratio: above it is beyond the noise
    promoted: str = ""  # the verdict on the promoted server, if one was asked
    promoted_ratio: float | None = None
    promoted_gap: float | None = None
    promoted_worst: float | None = None
    promoted_worst_gap: float | None = None

    @property
    def right(self) -> bool:
        """Whether nothing speaks against the cache."""
        return self.verdict in RIGHT


class Scale(NamedTuple):
    """The scale for cached answers to one history."""

    ids: list[int]
    benign: list[list[NDArray[np.floating]]]
    middle: list[NDArray[np.floating]]
    floor: float  # relative to the root mean square of the logprobs
    nats: float  # that root mean square


def scale_of(cold: Sequence[Answer]) -> Scale | None:
    """The scale of a history; None if it has too few cold answers."""
    if len(cold) < MIN_VARIANTS:
        return None
    ids = likeliest(cold[0])
    benign: list[list[NDArray[np.floating]]] = [[vector(answer, ids)] for answer in cold]
    middle = noise.mean(benign)
    size = float(np.sqrt(np.mean(np.square(middle[0])))) or 1.0
    floor = noise.floor(benign).total
    return Scale(ids, benign, middle, floor if floor > NOTHING else 0.0, size)


def pooled_floor(colds: Iterable[Cold]) -> float:
    """The median of all floors that are not 0. A history's floor is 0, and says nothing, if all its
    shapes use the same kernels. 0 if all floors are."""
    scales = [scale_of(answers) for cold in colds for answers in cold.answers.values()]
    return float(median([s.floor for s in scales if s is not None and s.floor > 0] or [0.0]))


def judge_arm(measured: Sequence[Measured], pooled: float = 0.0, grown: float = 1.0) -> ArmVerdict:
    """The verdict of one arm on several prompts (five or more are a sound number).

    pooled: see `pooled_floor`. grown: how many times the noise grew while the server was asked.
    """
    arm, asked = measured[0].arm, [m for m in measured if not m.unsupported]
    if not asked:
        return ArmVerdict(arm, UNSUPPORTED, measured[0].unsupported)
    told = [m.reused for m in asked if m.reused is not None]
    reused = max(told) if told else None
    odd = _odd(asked)
    found = [_Compared.of(m, pooled, grown) for m in asked]
    found = [compared for compared in found if compared.gaps]
    if not found:
        verdict, evidence = odd or (VACUOUS, NOT_SHARED)
        return ArmVerdict(arm, verdict, evidence, reused=reused)
    limit = _limit(arm, found)
    verdict, evidence = _judged(found, reused, limit)
    if verdict == BEYOND and asked[0].approximate:
        verdict = LOSSY
    if odd and verdict != BEYOND:
        verdict, evidence = odd
    reach = _reach(asked)
    if verdict in RIGHT:
        verdict, evidence = _reached(reach, asked) or (verdict, evidence)
    gaps = tuple(gap for compared in found for gap in compared.gaps)
    beyond = [gap.history for gap in gaps if gap.ratio > limit]
    faults = [compared.fault for compared in found if compared.fault is not None]
    runs = [run for c in found for run in zip(c.runs(), c.runs("gap"), strict=True)]
    return ArmVerdict(
        arm, verdict, evidence, _typical(found, "ratio"), *max(runs), _typical(found, "gap"),
        _typical(found, "floor"), median(faults) if faults else None,
        reused, len(runs), sum(reach) if told else None, len(found),
        min(beyond) if verdict in (BEYOND, LOSSY) and beyond else None, gaps, limit=limit,
    )  # fmt: skip


def _odd(asked: Sequence[Measured]) -> tuple[str, str] | None:
    """The verdict on answers that are odd in themselves, if they are with the cache."""
    warm, cold = _sum([m.tally for m in asked]), _sum([m.cold.tally for m in asked])
    for tally in (cold, warm):
        if tally.contrary:
            said = f"{tally.contrary:,} of {tally.tokens:,} tokens are not their own likeliest"
            return (HIDDEN, f"{said}{SAMPLED}") if tally is cold else (CONTRARY, said)
    if warm.cut and not cold.cut:
        said = f"{warm.cut:,} of {warm.requests:,} answers were cut short"
        return HIDDEN, f"{said}, by {warm.lacking:,} tokens, and none without the cache"
    return None


def _sum(tallies: Sequence[Tally]) -> Tally:
    fields = [[*vars(tally).values()] for tally in tallies]
    return Tally(*map(sum, zip(*fields, strict=True)))


def _reach(asked: Sequence[Measured]) -> list[bool]:
    """Whether each request reused as much as its arm is about, of those that say what they did."""
    runs = {(m.prompt, p.run): (p.reused, m.least) for m in asked for p in m.probes}
    return [reused >= least for reused, least in runs.values() if reused is not None]


def _reached(reach: Sequence[bool], asked: Sequence[Measured]) -> tuple[str, str] | None:
    """The verdict on an arm that reused next to nothing, as a right answer is then no evidence."""
    if not reach or 2 * sum(reach) >= len(reach):
        return None
    least, n = max(m.least for m in asked), sum(reach)
    some = f"{n} of {len(reach)} requests" if n else "no request"
    return NOT_REACHED, f"{some} reused the {least} tokens that it takes"


NOT_SHARED = "too few cold answers had the same history as the cached one"
NOT_TOLD = "the server does not report cached tokens, so it may have used none"
NOT_REUSED = "the server took nothing from its cache"
NO_NOISE = "no cold request differed from another by a bit, so that the noise is not known"
BLIND = "a wrong token changes none of its answers, so that they say nothing"
IN_DOUBT = "above its noise, as a right server is now and then where others' tokens lie between"
SAMPLED = ", without the cache too: does it sample, or penalise?"
TOO_NOISY = "the engine's own noise is as large as a wrong token"


@dataclass(frozen=True)
class _Compared:
    """One prompt's cached answers and controls, over the floor."""

    gaps: list[ProbeGap]
    controls: list[float]
    fault: float | None

    @classmethod
    def of(cls, measured: Measured, pooled: float, grown: float) -> _Compared:
        answers = measured.cold.answers
        scales = {length: scale_of(cold) for length, cold in answers.items()}
        gaps = []
        for probe in measured.probes:
            scale = scales.get(probe.history)
            if scale is not None:
                gaps.append(_gap(measured.prompt, probe, scale, pooled, grown))
        end = scales.get(len(measured.cold.ids))
        if end is None or not measured.cold.controls:
            return cls(gaps, [], None)
        faults = [distance(control, end) for control in measured.cold.controls]
        floor = _floor(end, pooled) * grown
        return cls(gaps, [f / floor for f in faults], min(faults) * end.nats)

    def runs(self, name: str = "ratio") -> list[float]:
        """The median of a figure over the answers of each request."""
        runs = {gap.run for gap in self.gaps}
        return [median(getattr(g, name) for g in self.gaps if g.run == run) for run in runs]

    def rare(self) -> int:
        """How many requests are far beyond the noise and as far off as a fault."""
        if self.fault is None:
            return 0
        sizes = zip(self.runs(), self.runs("gap"), strict=True)
        return sum(ratio > RARE and gap > RARE_SIZE * self.fault for ratio, gap in sizes)


def _typical(found: Sequence[_Compared], name: str) -> float:
    return float(median(median(compared.runs(name)) for compared in found))


def _limit(arm: str, found: Sequence[_Compared]) -> float:
    """The ratio to the floor up to which a distance is noise."""
    faults = [compared.fault for compared in found if compared.fault is not None]
    if faults and _typical(found, "gap") < SMALL * median(faults):
        return RARE
    return CROWDED if arm in ARMS and ARMS[arm].crowded else LIMIT


def _judged(found: Sequence[_Compared], reused: int | None, limit: float) -> tuple[str, str]:
    """The verdict of an arm, and the reason if it is neither right nor wrong."""
    if reused == 0:
        return VACUOUS, NOT_REUSED
    gaps = [gap for compared in found for gap in compared.gaps]
    controls = [times for compared in found for times in compared.controls]
    faults = [compared.fault for compared in found if compared.fault is not None]
    if all(gap.identical for gap in gaps):
        if faults and max(faults) <= NOTHING:
            return HIDDEN, BLIND
        return (VACUOUS, NOT_TOLD) if reused is None else (IDENTICAL, "")
    if all(gap.floor == 0 for gap in gaps) and faults:
        large = _typical(found, "gap") > RARE_SIZE * median(faults)
        return (BEYOND, "") if large else (HIDDEN, NO_NOISE)
    said = noise.judge(_typical(found, "ratio"), controls, limit)
    if said == noise.BEYOND:
        doubtful = limit == CROWDED and _typical(found, "ratio") <= DOUBTED
        return (HIDDEN, IN_DOUBT) if doubtful else (BEYOND, "")
    rare, n = sum(compared.rare() for compared in found), sum(len(c.runs()) for c in found)
    if rare:
        return BEYOND, f"in {rare} of {n} requests"
    if said == noise.HIDDEN:
        return HIDDEN, TOO_NOISY
    return (VACUOUS, NOT_TOLD) if reused is None else (WITHIN, "")


def _gap(prompt: int, probe: Probe, scale: Scale, pooled: float, grown: float) -> ProbeGap:
    away = distance(probe.answer, scale)
    floor = (scale.floor or pooled) * grown
    found = vector(probe.answer, scale.ids)
    same = any(np.array_equal(found, b[0]) for b in scale.benign)
    ratio = 0.0 if same and not floor else away / (_floor(scale, pooled) * grown)
    nats = scale.nats
    return ProbeGap(prompt, probe.run, probe.history, away * nats, floor * nats, ratio, same)


def _floor(scale: Scale, pooled: float) -> float:
    """The floor that a distance is divided by."""
    return max(scale.floor or pooled, MIN_FLOOR)


def distance(answer: Answer, scale: Scale, other: Answer | None = None) -> float:
    """The relative distance from another answer to the same history, or from the mean of the benign
    ones; infinite for NaN."""
    middle = scale.middle if other is None else [vector(other, scale.ids)]
    return noise.spread([vector(answer, scale.ids)], middle).total


def with_promoted(plain: ArmVerdict, promoted: ArmVerdict) -> ArmVerdict:
    """The verdict of an arm with the promoted server's answers. In F32 the noise is far smaller:
    rounding is within it, and a bug is not."""
    found = replace(
        plain, promoted=promoted.verdict, promoted_ratio=promoted.ratio, promoted_gap=promoted.gap,
        promoted_worst=promoted.worst, promoted_worst_gap=promoted.worst_gap,
    )  # fmt: skip
    if plain.verdict in (*NOTHING_SAID, LOSSY, UNSUPPORTED, CONTRARY):
        return found
    noisy = bool(plain.floor and promoted.floor and promoted.floor > AS_NOISY * plain.floor)
    if noisy and plain.verdict != IDENTICAL:
        return replace(found, verdict=HIDDEN, evidence=NOT_F32)
    if promoted.verdict == BEYOND:
        evidence = promoted.evidence
        return replace(found, verdict=BUG, evidence=evidence, first_beyond=promoted.first_beyond)
    if promoted.verdict not in (IDENTICAL, WITHIN) or plain.verdict == IDENTICAL:
        return found
    if plain.verdict == BEYOND and (plain.worst or 0) > DOUBTED:
        return replace(found, evidence=KERNELS)
    return replace(found, verdict=ROUNDING, evidence="")


NOT_F32 = "the promoted server is as noisy: is it F32?"
KERNELS = "in F32 it is within: the cache's logic is right there, so look at kernels of low formats"
