"""The second look before a cache is called wrong: does an innocent cause explain the gap?

All of it is in float64, where rounding is out of the question.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvtool.core.verify import noise
from kvtool.core.verify.arms import Arms, Case, play
from kvtool.core.verify.benign import arrays, by_own_prefix, controls, moved, played
from kvtool.core.verify.compare import distances, largest
from kvtool.core.verify.precision import promoting
from kvtool.core.verify.scenario_run import ScenarioRun, Segment
from kvtool.core.verify.subject import Subject
from kvtool.errors import pass_on_shortage

MOVES = (0.1, 0.03)  # relative moves of the weights: about a code of 4 bits, and of 6
SMOOTH = 0.3  # how far the logits may move with them; beyond, a bug's gap would change too
GROWN = 3.0  # times that rounding's gap may grow or shrink when weights are moved
LASTING = 0.5  # the share of a gap that stays in place above which it is a bug
LASTING_DECLARED = (
    0.8  # of a small gap of a cache that declares to round: codes cut off, not rounded
)
SMALL = 0.1  # share of the gap of one wrong token
EDGE = 1e-9  # a move that no bug notices, and a value between two codes does
MOOT = 4.0  # times what a pass's length changes of earlier tokens
CONSTANTS = 4.0  # times what numbers held in float32 explain


class OwnPrefixes(NamedTuple):
    """A run whose disputed steps were compared with passes over their own prefixes."""

    arms: Arms
    # The first step whose past no pass computes: earlier tokens were cached when a pass was shorter
    moot: int | None = None
    by: float = 0.0  # how far a pass's logits of earlier tokens change with its length


def by_own_prefixes(subject: Subject, arms: Arms, limit: float) -> OwnPrefixes | None:
    """The run with every step that is off by more than `limit` compared with a pass over just its
    own prefix, as far as that explains them; None if it does not explain the first."""
    scale, order = largest(arms.expected), _places(arms)
    expected, moot, by = list(arms.expected), None, 0.0
    helped = False
    for i, gap in enumerate(distances(arms.found, arms.expected)):
        segment, first, end = order[i]
        if gap <= limit:
            continue
        with promoting(arms.promoted):
            own = by_own_prefix(subject, segment, first, end)
            left = float((arms.found[i].double() - own.double()).abs().max()) / scale
            if not left <= limit:
                by = max(by, _change_with_length(subject, segment, first, end) / scale)
                if by <= limit or not left <= MOOT * by:
                    break
                moot, own = i if moot is None else moot, arms.found[i]
        helped, expected[i] = True, own
    return OwnPrefixes(replace(arms, expected=expected), moot, by) if helped else None


def _places(arms: Arms) -> list[tuple[Segment, int, int]]:
    """Of each step, in order: its history, and the columns that it answered."""
    found = {
        answer.step: (segment, answer.first, answer.first + answer.logits.shape[1])
        for segment in arms.segments
        for answer in segment.answers
    }
    return [found[step] for step in sorted(found)]


def _change_with_length(subject: Subject, segment: Segment, first: int, end: int) -> float:
    """How far the logits of what came before a step change when a pass covers the step as well."""
    if first == 0:
        return 0.0
    long = by_own_prefix(subject, segment, 0, end)[:, :first]
    done, change = 0, 0.0
    for column in sorted({first, *(a.first for a in segment.answers if 0 < a.first < first)})[:3]:
        short = by_own_prefix(subject, segment, 0, column)[:, done:]
        change = max(change, float((long[:, done:column] - short).abs().max()))
        done = column
    return change


def constants(subject: Subject, arms: Arms, working: torch.dtype) -> float:
    """How far the logits move with numbers that the subject holds in float32, and with tables that
    it holds in its working format, if they are computed anew: the largest gap that they explain."""
    moves = [(torch.finfo(torch.float32).eps, False), (torch.finfo(torch.float32).eps, True)]
    if working in (torch.bfloat16, torch.float16):
        moves.append((torch.finfo(working).eps, True))
    found = [0.0]
    for by, tables in moves:
        other = moved(subject, by / 2, 11, tables)
        if other is not None:
            with promoting(arms.promoted):
                found.append(max(distances(played(arms, other.full), arms.expected)))
    return CONSTANTS * max(x for x in found if math.isfinite(x))


def on_an_edge(subject: Subject, case: Case, arms: Arms, limit: float) -> str:
    """Why the gap is that of a value between two codes, which either arm may round up; else ""."""
    other = moved(subject, EDGE, 3)
    if other is None:
        return ""
    again = play(other, case, (arms.promoted, arms.promoted))
    if again.raised is None and max(distances(again.found, again.expected)) <= limit:
        return f"weights moved by {EDGE:.0e} of themselves leave no gap: a code had flipped"
    return ""


class Loss(NamedTuple):
    """The loss of a cache that rounds stored keys and values."""

    size: float  # root mean square, over that of the logits
    nats: float  # mean divergence of the cached from the uncached distribution
    changed: int  # steps in which another token is the likeliest
    steps: int
    fault: float  # what one replaced token does, as `size`
    lasting: float  # the share of the gap that does not depend on where values lie between codes

    def __str__(self) -> str:
        text = f"a loss of {self.size:.1e}, {self.nats:.1e} nats"
        if self.changed:
            text += f", another likeliest token at {self.changed} of {self.steps} positions"
        if self.fault:
            text += f"; one wrong token would be {self.fault:.1e}"
        return text


def loss_of(subject: Subject, case: Case, arms: Arms) -> Loss | None:
    """The loss of a cache, or None if no weights can be moved to tell rounding from a bug."""
    lasting = _lasting(subject, case, arms)
    if lasting is None:
        return None
    with promoting(arms.promoted):
        wrong = played_control(subject, arms)
    return measured_loss(arms, noise.spread(arrays(wrong), arrays(arms.expected)).total, lasting)


def played_control(subject: Subject, arms: Arms) -> list[Tensor]:
    """The uncached run with one token replaced."""
    return next(controls(subject, arms))


def measured_loss(arms: Arms, fault: float = 0.0, lasting: float = 0.0) -> Loss:
    """The loss of the cached arm against the uncached one."""
    found = [step.double().flatten(0, -2) for step in arms.found]
    expected = [step.double().flatten(0, -2) for step in arms.expected]
    a, b = torch.cat(found), torch.cat(expected)
    p, q = b.log_softmax(-1), a.log_softmax(-1)
    nats = float((p.exp() * (p - q)).nan_to_num(0.0).sum(-1).mean())
    changed = int((a.argmax(-1) != b.argmax(-1)).sum())
    size = noise.spread(arrays(arms.found), arrays(arms.expected)).total
    return Loss(size, max(nats, 0.0), changed, len(b), fault, lasting)


def is_rounding(loss: Loss, declared: bool) -> bool:
    """Whether a gap is the loss of a cache that rounds what it stores, and not a bug."""
    if declared and loss.size <= SMALL * loss.fault and loss.lasting <= LASTING_DECLARED:
        return True
    return loss.lasting <= LASTING


def loses_plainly(subject: Subject, arms: Arms, limit: float) -> bool:
    """Whether the same tokens lose more than `limit` too where they are only decoded: one row, no
    padding, nothing taken back or reordered. A cache that rounds what it stores does so there as
    well; what is right there is no loss, but a bug in what the scenario does.
    """
    scale = largest(arms.expected)
    gaps = distances(arms.found, arms.expected)
    segment, _, _ = _places(arms)[gaps.index(max(gaps))]
    for row in range(segment.start.batch):
        ids, sizes = _decoded_alone(segment, row)
        with promoting(arms.promoted), torch.inference_mode():
            session = ScenarioRun(subject).open(room=ids.shape[1])
            try:
                steps = [session.session.feed(step) for step in ids.split(sizes, dim=1)]
            except (Exception, SystemExit) as error:  # it takes no such steps: nothing is known
                pass_on_shortage(error)
                return True
            uncached = subject.full(ids, session.start)
        if float((torch.cat(steps, dim=1) - uncached).abs().max()) > limit * scale:
            return True
    return False


def _decoded_alone(segment: Segment, row: int) -> tuple[Tensor, list[int]]:
    """The real tokens (1,n) of a row, and the sizes of the steps that feed them."""
    history, n = segment.history[row : row + 1], segment.history.shape[1]
    real = torch.ones(n, dtype=torch.bool, device=history.device)
    if segment.start.padding is not None:
        real = segment.start.real(0, n)[row]
    ends = [answer.first + answer.logits.shape[1] for answer in segment.answers]
    counts = [int(real[:end].sum()) for end in (segment.answers[0].first, *ends)]
    sizes = [b - a for a, b in zip([0, *counts], counts, strict=False) if b > a]
    return history[:, real], sizes


def _lasting(subject: Subject, case: Case, arms: Arms) -> float | None:
    """The share of a gap that stays where it is when all weights are moved by about a code.

    The error of rounding changes with each value; the error of a bug moves with the logits. None if
    there is nothing to move.
    """
    before, shares = _gap(arms), []
    again = play(subject, case, (arms.promoted, arms.promoted))
    if again.raised is not None or max(distances(again.found, arms.found)) > 1e-9:
        return None  # it answers otherwise each time: that is no rounding
    for seed, by in enumerate(MOVES):
        other = moved(subject, by, 21 + seed)
        if other is None:
            return None
        again = play(other, case, (arms.promoted, arms.promoted))
        if again.raised is not None:
            continue
        far = noise.spread(arrays(again.expected), arrays(arms.expected)).total
        gap = _gap(again)
        if far <= SMOOTH and before.shape == gap.shape:
            grown = float(gap.norm() / before.norm().clamp(min=1e-300))
            if not 1 / GROWN <= grown <= GROWN:  # rounding takes off about as much everywhere
                return 1.0
            shares.append(float(before @ gap / (before.norm() * gap.norm()).clamp(min=1e-300)))
    shares = [share for share in shares if math.isfinite(share)]
    return min(shares) if shares else None


def _gap(arms: Arms) -> Tensor:
    gaps = zip(arms.found, arms.expected, strict=True)
    return torch.cat([(a.double() - b.double()).flatten() for a, b in gaps])
