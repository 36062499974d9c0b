"""Uncached passes over the tokens of a run: changed so that they only round differently, or with a
fault of known size. kvtool.core.verify.noise says what they mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvtool.core.verify.arms import Arms
from kvtool.core.verify.noise import Steps
from kvtool.core.verify.passes import uncached
from kvtool.core.verify.scenario_run import Segment
from kvtool.core.verify.subject import Start, Subject
from kvtool.errors import pass_on_shortage

Pass = Callable[[Tensor, Start], Tensor]  # a history (B,T) -> its logits (B,T,V)
TAILS = (5, 64)  # tokens that are added: the second crosses the switches of most kernels
PIECES = 5  # passes that a history is cut into
SEEDS = (1, 2, 3)  # of the weights that are moved by one unit in the last place


def arrays(logits: list[Tensor]) -> Steps:
    """Logits as `noise` takes them."""
    return [step.detach().to("cpu", torch.float64).numpy() for step in logits]


def played(arms: Arms, whole: Pass) -> list[Tensor]:
    """The expected logits of a run's steps, by another kind of pass over each history."""
    answers: dict[int, Tensor] = {}
    with torch.inference_mode():
        for segment in arms.segments:
            logits = whole(segment.history, segment.start)
            for answer in segment.answers:
                end = answer.first + answer.logits.shape[1]
                found = segment.zero_padding(logits[:, answer.first : end], answer.first)
                answers[answer.step] = found
    return [answers[step] for step in sorted(answers)]


class NotTaken(Exception):
    """The decoder refuses a pass that the run itself did not need."""


def _played(arms: Arms, whole: Pass) -> list[Tensor]:
    """`played`. Raises NotTaken for whatever the decoder raises."""
    try:
        return played(arms, whole)
    except (Exception, SystemExit) as error:
        pass_on_shortage(error)
        raise NotTaken from error


def benign(subject: Subject, arms: Arms, by_length: bool = True) -> Iterator[list[Tensor]]:
    """The runs of uncached passes of other shapes, and of weights moved by one unit in the last
    place, which rounds differently where the kernels of all shapes agree bit for bit.

    by_length: passes of other lengths too; not where what a pass computes depends on its length.
    """
    yield arms.expected
    passes: list[Pass] = []
    if by_length:
        passes += [partial(_with_tail, subject, n=n) for n in TAILS]
        passes += [partial(_in_pieces, subject)]
    if "batch" in subject.abilities:
        passes.append(partial(_in_other_rows, subject))
    for whole in passes:
        with contextlib.suppress(NotTaken):
            yield _played(arms, whole)
    for seed in SEEDS:
        other = moved(subject, torch.finfo(subject.dtype).eps / 2, seed)
        if other is not None:
            with contextlib.suppress(NotTaken):
                yield _played(arms, other.full)


def moved(subject: Subject, by: float, seed: int = 0, tables: bool = False) -> Subject | None:
    """The subject with weights that are off by about `by` of themselves; None if it has none."""
    try:
        return subject.moved(by, seed, tables)
    except NotImplementedError:
        return None


def controls(subject: Subject, arms: Arms) -> Iterator[list[Tensor]]:
    """The runs of uncached passes with one token replaced or missing."""

    def replaced(ids: Tensor, start: Start) -> Tensor:
        other, place = ids.clone(), _place(ids, start)
        other[:, place] = (other[:, place] + 1) % subject.vocab_size
        return _only_behind(uncached(subject, ids, start), uncached(subject, other, start), place)

    def missing(ids: Tensor, start: Start) -> Tensor:
        place = _place(ids, start)
        if ids.shape[1] < 3:
            return replaced(ids, start)
        shorter = torch.cat([ids[:, :place], ids[:, place + 1 :]], dim=1)
        logits = uncached(subject, shorter, start)
        logits = torch.cat([logits[:, :place], logits[:, place - 1 : place], logits[:, place:]], 1)
        return _only_behind(uncached(subject, ids, start), logits, place)

    for whole in (replaced, missing):
        with contextlib.suppress(NotTaken):
            yield _played(arms, whole)


def _place(ids: Tensor, start: Start) -> int:
    """A token of every row, early in it."""
    padded = 0 if start.padding is None else int(start.padding.max())
    return min(padded + 1, ids.shape[1] - 1)


def _only_behind(right: Tensor, wrong: Tensor, place: int) -> Tensor:
    """The right logits up to the token, and the faulty ones after it, as a cache that lost it would
    answer."""
    return torch.cat([right[:, : place + 1], wrong[:, place + 1 :]], dim=1)


def _with_tail(subject: Subject, ids: Tensor, start: Start, n: int) -> Tensor:
    n = min(n, subject.context - ids.shape[1])
    tail = ids[:, :1].expand(-1, max(n, 0))
    return uncached(subject, torch.cat([ids, tail], dim=1), start)[:, : ids.shape[1]]


def _in_pieces(subject: Subject, ids: Tensor, start: Start) -> Tensor:
    """Each piece of a history, from a pass that ends with it."""
    padded = 0 if start.padding is None else int(start.padding.max())
    n = ids.shape[1]
    ends = sorted({min(n, padded + 1 + (n - padded) * i // PIECES) for i in range(1, PIECES)} | {n})
    parts, done = [], 0
    for end in ends:
        parts.append(uncached(subject, ids[:, :end], start)[:, done:end])
        done = end
    return torch.cat(parts, dim=1)


def _in_other_rows(subject: Subject, ids: Tensor, start: Start) -> Tensor:
    """Each row of a batch alone, or a single row in a batch with copies of itself."""
    if start.batch == 1:
        rows = torch.zeros(3, dtype=torch.long, device=ids.device)
        return uncached(subject, ids[rows], start.select(rows))[:1]
    alone = [torch.tensor([row], device=ids.device) for row in range(start.batch)]
    return torch.cat([uncached(subject, ids[row], start.select(row)) for row in alone])


def by_own_prefix(subject: Subject, segment: Segment, first: int, end: int) -> Tensor:
    """The logits of the tokens from column `first` on, from a pass that ends at column `end`."""
    with torch.inference_mode():
        logits = uncached(subject, segment.history[:, :end], segment.start)[:, first:]
    return segment.zero_padding(logits, first)
