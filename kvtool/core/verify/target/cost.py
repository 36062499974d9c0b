"""The longest history that a decoder can be fed in the time of a check.

Times are CPU times, so that other work on the machine does not change the check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from kvtool.core.verify import schedules
from kvtool.core.verify.schedules import BRIEF, NORMAL, THOROUGH, Bounds
from kvtool.core.verify.subject import Start
from kvtool.errors import pass_on_shortage

BUDGET = {BRIEF: 2.0, NORMAL: 8.0, THOROUGH: 240.0}  # seconds for all schedules, in all precisions
RUNS = 2.5  # of each schedule: in the working format, in float64, and sometimes once more
HELD = 6  # times that the logits of a history are held: of both arms, in two formats
MAX_BYTES = 2**31  # bytes of those logits
MAX_TOKENS = {BRIEF: 600, NORMAL: 2100}  # tokens, however quick they are
REACHES = (4200, 2100, 1100, 600, 330, 160)  # tokens: longer histories are left out first
MIN_REACHES = (160, 64)  # tokens of what is fed in any case, with few sizes of steps
TIMED_BEHIND = 24  # tokens behind which a step is timed
PASSES = (TIMED_BEHIND, 96, 384, 1536)  # tokens of the passes that are timed
QUICK = 0.1  # seconds
SCHEDULES = (schedules.prompts, schedules.steps, schedules.boundaries, schedules.long)


class Timed(Protocol):
    """The calls that are timed: see TargetSubject."""

    vocab_size: int
    device: torch.device

    def seconds(self) -> float:
        """The time that its calls have taken so far."""

    def initial_state(self, start: Start) -> Any:
        """The state before the first token."""

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens, and the next state."""

    def full(self, ids: Tensor, start: Start) -> Tensor:
        """Whole sequences in one pass."""


def affordable(subject: Timed, limits: Bounds) -> Bounds:
    """The limits with which all schedules take BUDGET seconds at most. The longest histories are
    left out first, then most sizes of steps. The smallest choice is always fed.

    limits: those of the subject, with its context as reach.
    """
    most = min(limits.reach, MAX_TOKENS.get(limits.level, limits.reach))
    per_token = HELD * subject.vocab_size * torch.float64.itemsize
    lengths = sorted({min(n, most) for n in (most, *REACHES)}, reverse=True)
    lengths = [n for n in lengths if n * per_token <= MAX_BYTES] or lengths[-1:]
    choices = [replace(limits, reach=n) for n in lengths]
    choices += [replace(limits, reach=min(n, lengths[-1]), level=BRIEF) for n in MIN_REACHES]
    try:
        seconds = _seconds_of(subject, limits)
    except (Exception, SystemExit) as error:  # whatever it raises: the scenarios will report it
        pass_on_shortage(error)
        return choices[-1]
    for choice in choices[:-1]:
        if RUNS * seconds(choice) <= BUDGET[limits.level]:
            return choice
    return choices[-1]


def _seconds_of(subject: Timed, limits: Bounds) -> Callable[[Bounds], float]:
    """The seconds of all schedules: each start and step, the pass time of each history's tokens,
    and the uncached pass over the longest one, which judges all of its scenario."""
    start, step = _step_seconds(subject, limits.largest or TIMED_BEHIND)
    full = _pass_seconds(subject, limits.reach)

    def seconds(limits: Bounds) -> float:
        total = 0.0
        for make in SCHEDULES:
            found = make(limits)
            total += sum(start + step * len(fed) + full(sum(fed)) for fed in found)
            total += full(max(map(sum, found)))
        return total

    return seconds


@torch.inference_mode()
def _step_seconds(subject: Timed, largest: int) -> tuple[float, float]:
    """What a start takes, and a step of one token; `largest`: tokens that it takes at once."""
    ids, begun = _ids(subject, TIMED_BEHIND), subject.seconds()
    state = subject.initial_state(Start(1, TIMED_BEHIND))
    start = subject.seconds() - begun
    first = min(TIMED_BEHIND - 3, largest)
    _, state = subject.step(ids[:, :first], state)
    taken = []
    for end in range(first + 1, first + 4):
        begun = subject.seconds()
        _, state = subject.step(ids[:, end - 1 : end], state)
        taken.append(subject.seconds() - begun)
    return start, min(taken)


def _pass_seconds(subject: Timed, longest: int) -> Callable[[int], float]:
    """A function from n tokens to the seconds of a pass, from timed passes of growing length."""
    taken: list[tuple[int, float]] = []
    for n in PASSES:
        if taken and (taken[-1][1] > QUICK or taken[-1][0] == longest):
            break
        at_most = min(n, longest)
        taken.append((at_most, min(_timed_passes(subject, _ids(subject, at_most)))))
    return lambda n: _extrapolated(taken, n)


def _extrapolated(taken: list[tuple[int, float]], n: int) -> float:
    """The seconds for n tokens: linear between two measured lengths, and a power law beyond
    them."""
    (n0, t0), (n1, t1) = taken[-2:] if len(taken) > 1 else (taken[0], taken[0])
    if n > n1:
        power = math.log(max(t1 / t0, 1.0)) / math.log(n1 / n0) if n1 > n0 else 2.0
        return t1 * (n / n1) ** min(max(power, 1.0), 3.0)
    (low, t0), (high, t1) = next(
        ((a, b) for a, b in pairwise(taken) if n <= b[0]), (taken[0], taken[0])
    )
    return t0 + (t1 - t0) * max(n - low, 0) / max(high - low, 1)


@torch.inference_mode()
def _timed_passes(subject: Timed, ids: Tensor) -> Iterator[float]:
    for _ in range(2):
        begun = subject.seconds()
        subject.full(ids, Start(1, ids.shape[1]))
        yield subject.seconds() - begun


def _ids(subject: Timed, n: int) -> Tensor:
    ids = torch.arange(n, device=subject.device) * 7 % subject.vocab_size
    return ids[None]
