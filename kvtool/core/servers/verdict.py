"""Is a server's cached answer further from its cold ones than those are from each other?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from kvtool.core.servers.arms import ARMS
from kvtool.core.servers.gaps import NOTHING, Compared, ProbeGap, typical
from kvtool.core.servers.tails import FAR, LARGE, TINY, Seen, hidden
from kvtool.core.servers.texts import Measured
from kvtool.core.verify import noise

IDENTICAL, WITHIN, BEYOND = "identical", "within noise", "beyond noise"
HIDDEN, VACUOUS, LOSSY, UNSUPPORTED = "cannot tell", "vacuous", "lossy", "unsupported"
NOT_REACHED = "not reached"  # too little was reused
CONTRARY = "contradicts itself"  # with the cache it chose tokens that its logprobs do not
ROUNDING, BUG = "rounding", "bug"  # where a promoted server decides
RIGHT = (IDENTICAL, WITHIN, ROUNDING, LOSSY)
WRONG = (BEYOND, BUG, HIDDEN, CONTRARY)
NOTHING_SAID = (VACUOUS, NOT_REACHED)  # neither for a cache nor against it

# Of 30 healthy trials of a prototype one was above the noise, at 1.04; its faults began at 1.24.
LIMIT = 1.15  # times the noise, a median over prompts
CROWDED = 1.5  # times the noise, where others' tokens lie between: llama.cpp's unified cache then
# adds in another order than any cold request, and is right at 1.0 to 1.3
AS_NOISY = 0.5  # of the plain server's noise: a server in F32 has far less
DOUBTED = 2.0  # times the noise: below it a promoted server that is right decides, and what is
# CROWDED cannot be told: of many right servers one was above 1.5


@dataclass(frozen=True)
class ArmVerdict:
    """The verdict of an arm over all prompts. None: nothing was compared."""

    arm: str
    verdict: str
    evidence: str = ""
    ratio: float | None = None  # median over prompts, of the median over requests
    worst: float | None = None  # of a single request
    worst_gap: float | None = None  # nats, of that request
    tail: float | None = None  # of what the medians hide, if that is beyond the noise
    tail_gap: float | None = None  # nats, of that
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


def judge_arm(measured: Sequence[Measured], pooled: float = 0.0, grown: float = 1.0) -> ArmVerdict:
    """The verdict of one arm on several prompts (five or more are a sound number).

    pooled: see `pooled_floor`. grown: how many times the noise grew while the server was asked.
    """
    arm, asked = measured[0].arm, [m for m in measured if not m.unsupported]
    if not asked:
        return ArmVerdict(arm, UNSUPPORTED, measured[0].unsupported)
    told = [m.reused for m in asked if m.reused is not None]
    reused = max(told) if told else None
    found = [Compared.of(m, pooled, grown) for m in asked]
    found = [compared for compared in found if compared.gaps]
    odd = _odd(asked, typical(found, "floor") if found else 0.0)
    if not found:
        verdict, evidence = odd or (VACUOUS, NOT_SHARED)
        return ArmVerdict(arm, verdict, evidence, reused=reused)
    limit = _limit(arm, found)
    tail = hidden(found, _crowded(arm))
    verdict, evidence = _judged(found, reused, limit, tail)
    if verdict == BEYOND and asked[0].approximate:
        verdict = LOSSY
    if odd and verdict != BEYOND:
        verdict, evidence = odd
    reach = _reach(asked)
    if verdict in RIGHT:
        verdict, evidence = _reached(reach, asked) or (verdict, evidence)
    gaps = tuple(gap for compared in found for gap in compared.gaps)
    faults = [compared.fault for compared in found if compared.fault is not None]
    runs = [run for c in found for run in zip(c.runs(), c.runs("gap"), strict=True)]
    ratio = typical(found, "ratio")
    beyond = [gap.history for gap in gaps if gap.ratio > limit]
    first = min(beyond, default=None) if ratio > limit or tail is None else tail.first
    worst, worst_gap = max(runs)
    return ArmVerdict(
        arm, verdict, evidence, ratio, worst, worst_gap,
        None if tail is None else tail.ratio, None if tail is None else tail.gap,
        typical(found, "gap"), typical(found, "floor"), median(faults) if faults else None,
        reused, len(runs), sum(reach) if told else None, len(found),
        first if verdict in (BEYOND, LOSSY) else None, gaps, limit=limit,
    )  # fmt: skip


def _odd(asked: Sequence[Measured], floor: float) -> tuple[str, str] | None:
    """The verdict on answers that are odd in themselves, if they are with the cache. floor: of the
    noise, in nats."""
    warm, cold = [m.tally for m in asked], [m.cold.tally for m in asked]
    chosen = set[int]().union(*(tally.chosen for tally in (*warm, *cold)))
    for tallies in (cold, warm):
        if n := sum(tally.contrary(chosen) for tally in tallies):
            of = sum(tally.tokens for tally in tallies)
            which = "is not the likeliest by its" if n == 1 else "are not the likeliest by their"
            said = f"{n:,} of {of:,} tokens {which} own logprobs"
            if tallies is cold:
                return HIDDEN, f"{said}{SAMPLED}"
            clear = any(tally.contrary(chosen, floor) for tally in tallies)
            return (CONTRARY, said) if clear else (HIDDEN, f"{said}{SLIGHTLY}")
    if (n := sum(tally.cut for tally in warm)) and not any(tally.cut for tally in cold):
        of, lacking = sum(t.requests for t in warm), sum(t.lacking for t in warm)
        said = f"{n:,} of {of:,} answers were cut short, by {lacking:,} tokens"
        return HIDDEN, f"{said}, and none without the cache"
    return None


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
SLIGHTLY = ", but by no more than its noise: chosen in another pass?"
UNTOLD = "though it says that it took nothing from its cache"
FEW = "which a right server seldom is"
TOO_NOISY = "the engine's own noise is as large as a wrong token"


def _crowded(arm: str) -> bool:
    return arm in ARMS and ARMS[arm].crowded


def _limit(arm: str, found: Sequence[Compared]) -> float:
    """The ratio to the floor up to which a distance is noise."""
    faults = [compared.fault for compared in found if compared.fault is not None]
    if faults and typical(found, "gap") < TINY * median(faults):
        return FAR
    return CROWDED if _crowded(arm) else LIMIT


def _judged(
    found: Sequence[Compared], reused: int | None, limit: float, tail: Seen | None
) -> tuple[str, str]:
    """The verdict of an arm, and the reason if it is neither right nor wrong."""
    verdict, evidence = _compared(found, reused, limit, tail)
    if reused != 0:
        return verdict, evidence
    beyond = verdict == BEYOND and typical(found, "ratio") > limit
    return (BEYOND, UNTOLD) if beyond else (VACUOUS, NOT_REUSED)


def _compared(
    found: Sequence[Compared], reused: int | None, limit: float, tail: Seen | None
) -> tuple[str, str]:
    """The same, whatever the server says that it reused, if only it does."""
    gaps = [gap for compared in found for gap in compared.gaps]
    controls = [times for compared in found for times in compared.controls]
    faults = [compared.fault for compared in found if compared.fault is not None]
    if all(gap.identical for gap in gaps):
        if faults and max(faults) <= NOTHING:
            return HIDDEN, BLIND
        return (VACUOUS, NOT_TOLD) if reused is None else (IDENTICAL, "")
    if all(gap.floor == 0 for gap in gaps) and faults:
        large = LARGE * median(faults)
        if tail is not None and typical(found, "gap") <= large < tail.gap:
            return BEYOND, tail.said
        return (BEYOND, "") if typical(found, "gap") > large else (HIDDEN, NO_NOISE)
    said = noise.judge(typical(found, "ratio"), controls, limit)
    if said == noise.BEYOND:
        doubtful = limit == CROWDED and typical(found, "ratio") <= DOUBTED
        return (HIDDEN, IN_DOUBT) if doubtful else (BEYOND, "")
    if tail is not None and tail.sure:
        return BEYOND, tail.said
    if said == noise.HIDDEN:
        return HIDDEN, TOO_NOISY
    if tail is not None:
        return HIDDEN, f"{tail.said} {tail.ratio:.2f} times the noise, {FEW}"
    return (VACUOUS, NOT_TOLD) if reused is None else (WITHIN, "")


def with_promoted(plain: ArmVerdict, promoted: ArmVerdict) -> ArmVerdict:
    """The verdict of an arm with the promoted server's answers. In F32 the noise is far smaller:
    rounding is within it, and a bug is not."""
    found = replace(
        plain, promoted=promoted.verdict, promoted_ratio=promoted.ratio, promoted_gap=promoted.gap,
        promoted_worst=promoted.tail or promoted.worst,
        promoted_worst_gap=promoted.tail_gap or promoted.worst_gap,
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
    if plain.verdict == BEYOND and max(plain.worst or 0, plain.tail or 0) > DOUBTED:
        return replace(found, evidence=KERNELS)
    return replace(found, verdict=ROUNDING, evidence="")


NOT_F32 = "the promoted server is as noisy: is it F32?"
KERNELS = "in F32 it is within: the cache's logic is right there, so look at kernels of low formats"
