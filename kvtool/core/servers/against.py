"""How far are two servers' answers to the same ids from each other, and from their own noise?

Both answer every history of one text, without a cache and with one. The first server writes the
text. KL divergence is over the tokens that both list; all others count as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from kvtool.core.servers.engine import Engine
from kvtool.core.servers.gaps import distance, pooled_floor, scale_of
from kvtool.core.servers.texts import TAIL, Answer, Measured, Prompt
from kvtool.core.servers.verdict import IDENTICAL, WITHIN

COLD, CACHED = "without a cache", "with a cache"
APART = "apart"  # further from each other than either is from itself
MANY_FLIPS = 0.5  # share of all positions; no fault of a cache changes as many
TINY = 1e-30


@dataclass(frozen=True)
class Position:
    """Two servers at one history."""

    kind: str  # COLD or CACHED
    prompt: int
    history: int
    gap: float  # nats, root mean square over the first server's likeliest
    loss: float  # nats by which the text's next token is less likely for the second server
    kl: float  # nats
    flip: bool  # whether their likeliest tokens differ
    noise: float | None = None  # nats, the larger of both servers' own
    ratio: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All positions of a kind."""

    kind: str
    verdict: str
    positions: int
    gap: float  # the median, as are `noise` and `ratio`
    noise: float | None
    ratio: float | None
    loss: float  # the mean, as is `kl`
    kl: float
    worst_kl: float
    flips: int
    first_apart: int | None = None  # the shortest history that is beyond both servers' noise

    @property
    def other_model(self) -> bool:
        """Whether the answers differ by more than a cache or a build can explain."""
        return self.flips > MANY_FLIPS * self.positions


def divergence(a: Answer, b: Answer) -> float:
    """KL(a || b) in nats."""
    both = [(math.exp(p), math.exp(b[i])) for i, p in a.items() if i in b]
    both.append((1 - sum(p for p, _ in both), 1 - sum(q for _, q in both)))
    return max(0.0, sum(p * math.log(p / max(q, TINY)) for p, q in both if p > TINY))


def compare(
    first: Engine,
    second: Engine,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[str], None],
    found: list[Position],
    tail: int = TAIL,
) -> None:
    """Ask both servers, and add their answers to `found`. Raises ServerError."""
    for number, ids in enumerate(prompts):
        progress(f"prompt {number + 1}")
        ours = Prompt(first, number, ids, tail)
        others = ours.at(second)
        cold = [
            (length, answers[0], others.cold.answers[length][0])
            for length, answers in ours.cold.answers.items()
            if length in others.cold.answers
        ]
        found += _positions(COLD, ours, others, cold)
        found += _positions(CACHED, ours, others, _cached(ours, others))


def _cached(ours: Prompt, others: Prompt) -> list[tuple[int, Answer, Answer]]:
    split = ours.split(0)
    fork = ours.parted(split)
    answers = []
    for prompt in (ours, others):
        measured = Measured(CACHED, prompt.number, prompt.cold)
        prompt.ask(fork)
        prompt.probe(measured, split)
        answers.append({probe.history: probe.answer for probe in measured.probes})
    return [
        (n, answers[0][n], answers[1][n]) for n in sorted(answers[0].keys() & answers[1].keys())
    ]


def _positions(
    kind: str, ours: Prompt, others: Prompt, pairs: Sequence[tuple[int, Answer, Answer]]
) -> list[Position]:
    pooled = [pooled_floor([prompt.cold]) for prompt in (ours, others)]
    found = []
    for length, a, b in pairs:
        scales = [scale_of(p.cold.answers.get(length, [])) for p in (ours, others)]
        floors = [
            scale.floor_or(pool)
            for scale, pool in zip(scales, pooled, strict=True)
            if scale is not None
        ]
        nats = math.sqrt(fmean(v * v for v in sorted(a.values())[-30:])) or 1.0
        scale = scales[0] or scale_of([a, a, a])
        assert scale is not None
        apart = distance(b, scale, a)
        next_token = ours.ids[length] if length < ours.end else max(a, key=lambda i: a[i])
        floor = max(floors) if len(floors) == len(scales) else None
        found.append(
            Position(
                kind, ours.number, length, apart * nats,
                a.get(next_token, math.nan) - b.get(next_token, min(b.values())),
                divergence(a, b), max(a, key=lambda i: a[i]) != max(b, key=lambda i: b[i]),
                None if floor is None else floor * nats, None if floor is None else apart / floor,
            )
        )  # fmt: skip
    return found


def summaries(positions: Sequence[Position]) -> list[Comparison]:
    """The comparison of each kind."""
    kinds = dict.fromkeys(position.kind for position in positions)
    return [_summary(kind, [p for p in positions if p.kind == kind]) for kind in kinds]


def _summary(kind: str, found: Sequence[Position]) -> Comparison:
    ratios = [p.ratio for p in found if p.ratio is not None]
    noises = [p.noise for p in found if p.noise is not None]
    ratio = median(ratios) if ratios else None
    if all(p.gap == 0 for p in found):
        verdict = IDENTICAL
    else:
        verdict = WITHIN if ratio is not None and ratio <= 1 else APART
    beyond = [p.history for p in found if p.ratio is not None and p.ratio > 1]
    return Comparison(
        kind, verdict, len(found), median(p.gap for p in found),
        median(noises) if noises else None, ratio, fmean(p.loss for p in found),
        fmean(p.kl for p in found), max(p.kl for p in found), sum(p.flip for p in found),
        min(beyond) if verdict == APART and beyond else None,
    )  # fmt: skip
