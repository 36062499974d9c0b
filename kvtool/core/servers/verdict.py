"""Is a server's cached answer further from its cold ones than those are from each other?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from kvtool.core.servers.arms import Answer, Measured, Probe, likeliest, vector
from kvtool.core.verify import noise

IDENTICAL, WITHIN, BEYOND = "identical", "within noise", "beyond noise"
HIDDEN, VACUOUS, LOSSY = "cannot tell", "vacuous", "lossy"
ROUNDING, BUG = "rounding", "bug"  # where a promoted server decides
RIGHT = (IDENTICAL, WITHIN, ROUNDING, LOSSY)

LEAST = float(np.finfo(np.float32).eps)  # of a floor, relative: logprobs are float32


@dataclass(frozen=True)
class ProbeGap:
    """One cached answer beside the engine's noise at the same history. Distances are the root mean
    square over the likeliest tokens, in nats."""

    history: int
    gap: float
    floor: float
    ratio: float
    controls: tuple[float, ...]  # times the floor
    fault: float  # the smaller control, in nats
    identical: bool


@dataclass(frozen=True)
class ArmVerdict:
    """What an arm says of the cache, over all prompts."""

    arm: str
    verdict: str
    ratio: float  # median over prompts of the median over answers
    gap: float
    floor: float
    fault: float
    reused: int | None
    prompts: int
    first_beyond: int | None = None  # the shortest history whose answer is beyond the noise
    gaps: tuple[ProbeGap, ...] = ()

    @property
    def right(self) -> bool:
        """Whether nothing speaks against the cache."""
        return self.verdict in RIGHT


def judge_arm(measured: Sequence[Measured]) -> ArmVerdict:
    """The verdict of one arm on several prompts (five or more are a sound number)."""
    arm, reused = measured[0].arm, max((m.reused or 0 for m in measured), default=0)
    told = any(m.reused is not None for m in measured)
    by_prompt = [gaps for m in measured if (gaps := _gaps(m))]
    gaps = [gap for found in by_prompt for gap in found]
    if not gaps:
        return ArmVerdict(arm, VACUOUS, 0.0, 0.0, 0.0, 0.0, reused if told else None, 0)

    def typical(name: str) -> float:
        return float(median(median(getattr(g, name) for g in found) for found in by_prompt))

    ratio, seen = typical("ratio"), [c for g in gaps for c in g.controls]
    beyond = [g.history for g in gaps if g.ratio > 1]
    if told and not reused:
        verdict = VACUOUS
    elif measured[0].approximate:
        verdict = IDENTICAL if all(g.identical for g in gaps) else LOSSY
    elif all(g.identical for g in gaps):
        verdict = IDENTICAL
    else:
        verdict = {noise.WITHIN: WITHIN, noise.BEYOND: BEYOND, noise.HIDDEN: HIDDEN}[
            noise.judge(ratio, seen)
        ]
    return ArmVerdict(
        arm, verdict, ratio, typical("gap"), typical("floor"), typical("fault"),
        reused if told else None, len(by_prompt),
        min(beyond) if verdict == BEYOND and beyond else None, tuple(gaps),
    )  # fmt: skip


def with_promoted(plain: ArmVerdict, promoted: ArmVerdict) -> ArmVerdict:
    """The verdict of an arm once the same numbers in F32 were asked too: what only rounds is within
    the far smaller noise there, and a bug stays."""
    decided = {WITHIN: ROUNDING, IDENTICAL: ROUNDING, BEYOND: BUG}.get(promoted.verdict)
    if decided is None or plain.verdict in (VACUOUS, LOSSY):
        return plain
    if decided == ROUNDING and plain.verdict == IDENTICAL:
        return plain
    return ArmVerdict(**{**vars(plain), "verdict": decided})


def _gaps(measured: Measured) -> list[ProbeGap]:
    return [
        gap
        for probe in measured.probes
        if (gap := _gap(probe, measured.cold[probe.history], measured)) is not None
    ]


def _gap(probe: Probe, cold: Sequence[Answer], measured: Measured) -> ProbeGap | None:
    """None where too few cold answers have the same history."""
    if not cold:
        return None
    ids = likeliest(cold[0])
    benign = [[vector(answer, ids)] for answer in cold]
    found = [vector(probe.answer, ids)]
    same = all(np.array_equal(found[0], b[0]) for b in benign)
    if len(benign) < 2:
        gap = _nats(noise.spread(found, benign[0]), benign[0])
        return ProbeGap(probe.history, gap, 0.0, 0.0, (), 0.0, same)
    floor, middle = noise.floor(benign), noise.mean(benign)
    of_end = probe.history == max(measured.cold)
    faults = [noise.spread([vector(c, ids)], middle) for c in measured.controls if of_end]
    spread = noise.spread(found, middle)
    return ProbeGap(
        probe.history, _nats(spread, middle), _nats(floor, middle), spread.over(floor, LEAST),
        tuple(f.over(floor, LEAST) for f in faults),
        min((_nats(f, middle) for f in faults), default=0.0), same,
    )  # fmt: skip


def _nats(spread: noise.Spread, scale: Sequence[noise.NDArray[np.floating]]) -> float:
    """A relative distance in nats."""
    return spread.total * float(np.sqrt(np.mean([np.square(s).mean() for s in scale])))
