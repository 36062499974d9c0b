"""What each token sees, measured from outside: change one token, and compare what changes with it.

A token that a query does not see moves nothing there. So an uncached pass and a replay through
the cache, both with the same token moved, say which keys the cache hides and which it shows,
whatever the decoder is made of. Where hooks reach the first wrong layer, what is moved is the
outputs of its own modules, and what is looked at is its attention: there one token reaches
another directly, and not by way of a third.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvtool.core.verify.arms import Case
from kvtool.core.verify.diagnosis.locate import TOLERANCE, scale
from kvtool.core.verify.scenario_run import ScenarioRun, Segment, Stopped
from kvtool.core.verify.target.attributes import owned_modules
from kvtool.core.verify.target.probe import (
    Probe,
    ProbedSession,
    Spot,
    Token,
    cells_of,
    with_others,
)
from kvtool.core.verify.target.subject import TargetSubject

SECONDS = 2.0  # seconds for all replays together
MAX_MOVED, MIN_MOVED = 96, 6  # tokens that are moved, at most; with less no map is made
MAX_BETWEEN = 12  # in one round
BESIDE = 5  # tokens on each side of an end
EDGES = 12  # rounds in which tokens between others are moved: what is seen ends there


@dataclass(frozen=True)
class Query:
    """A token of the history whose logits are judged: its step, and where that begins and ends."""

    column: int
    step: int
    past: int
    end: int


@dataclass
class Sight:
    """What each of Q queries sees, through the cache and without it, of B rows.

    known (B,K'): columns of the history that were moved, -1 for none, in ascending order.
    cached, uncached (B,Q,K') bool. across: row r was moved by the other row s, cached only: (r, s).
    stale: what else moved a row, by what became of it.
    """

    queries: tuple[Query, ...]
    columns: tuple[int, ...]
    cached: Tensor
    uncached: Tensor
    padding: tuple[int, ...]
    across: set[tuple[int, int]] = field(default_factory=set)
    stale: dict[str, set[int]] = field(default_factory=dict)
    ids: Tensor | None = None  # (B,T) of the whole history
    earlier: bool = False  # another session, without its tokens was fed before
    direct: bool = False  # seen by one attention, not through other tokens

    @property
    def differs(self) -> bool:
        """Whether any token sees another through the cache than without it."""
        return not torch.equal(self.cached, self.uncached)


class Prober:
    """Replays a case with one token moved at a time, cached and uncached."""

    def __init__(self, subject: TargetSubject, case: Case, step: int, last: int, spot: Spot):
        self.subject, self.case, self.step, self.last, self.spot = subject, case, step, last, spot
        began = time.thread_time()
        self.base, run = self._replay(None)
        self.segment = segment_of(run, step)
        self.earlier = is_later_session(run, self.segment)
        self.answers = [a for a in self.segment.answers if a.step < len(self.base.steps)]
        end = self.base.steps[self.answers[-1].step].origin.shape[1]
        self.origin = self.base.steps[self.answers[-1].step].origin
        self.history = self.segment.history[:, :end]
        self.whole = self._pass(None)
        self.seconds = time.thread_time() - began

    def _replay(self, move: Token | None) -> tuple[Probe, ScenarioRun]:
        probe = Probe(self.spot, move)
        make = self.subject.with_session(lambda s, start: ProbedSession(s, start, probe))
        run = self.case.run(make, last=self.last)
        with suppress(Stopped):
            self.case.scenario.play(run)
        return probe, run

    def _pass(self, move: Token | None) -> Tensor:
        """The uncached values (B,T,...) at the spot."""
        probe, cells = Probe(self.spot, move), cells_of(self.origin, move)
        moves_ids = not self.spot.moved
        ids = (
            with_others(self.history, cells, self.subject.vocab_size) if moves_ids else self.history
        )
        with probe.watch(owned_modules(self.subject.decoder), cells, ids.shape[1]) as seen:
            whole = self.subject.call_full if self.spot.site is not None else self.subject.full
            logits = whole(ids, self.segment.start)
        return probe.value(seen, logits)

    def look(self, token: Token) -> tuple[Tensor, Tensor]:
        """The queries that a token changes, cached and uncached: (B,Q) bool each."""
        probe, _ = self._replay(token)
        whole = _changed(self._pass(token), self.whole)
        cached, uncached = [], []
        for answer in self.answers:
            base, moved = self.base.steps[answer.step].value, probe.steps[answer.step].value
            assert base is not None and moved is not None
            cached.append(_changed(moved, base))
            uncached.append(whole[:, answer.first : answer.first + base.shape[1]])
        return torch.cat(cached, dim=1), torch.cat(uncached, dim=1)

    @property
    def queries(self) -> tuple[Query, ...]:
        """The tokens whose logits are compared, in order."""
        found = []
        for a in self.answers:
            end = a.first + a.logits.shape[1]
            found += [Query(c, a.step, a.first, end) for c in range(a.first, end)]
        return tuple(found)


def _changed(moved: Tensor, base: Tensor) -> Tensor:
    """Which tokens (B,n) of (B,n,...) differ."""
    if moved.shape != base.shape:
        raise ValueError("a replay answered in another shape")
    gap = (moved - base).abs().where(moved != base, 0.0).flatten(2).amax(-1)
    return ~(gap <= TOLERANCE * scale(base))


def is_later_session(run: ScenarioRun, segment: Segment) -> bool:
    """Whether a history began behind another one: at its beginning, and not as a fork of it."""
    number = next(i for i, s in enumerate(run.segments) if s is segment)
    begins = [s for s in run.segments[:number] if s.answers and s.answers[0].first == 0]
    first = [a.first for a in segment.answers][:1]
    return bool(begins) and first == [0]


def segment_of(run: ScenarioRun, step: int) -> Segment:
    """The segment that a step belongs to. Raises LookupError if it was not reached."""
    for segment in run.segments:
        if any(answer.step == step for answer in segment.answers):
            return segment
    raise LookupError(f"step {step} was not reached")


@torch.inference_mode()
def sight(subject: TargetSubject, case: Case, step: int, last: int, spot: Spot) -> Sight | None:
    """What each token of the wrong step's history sees. None where that would take too long."""
    prober = Prober(subject, case, step, last, spot)
    n_moves = min(MAX_MOVED, int(SECONDS / max(prober.seconds, 1e-4)))
    if n_moves < MIN_MOVED:
        return None
    batch = prober.history.shape[0]
    given_up = [
        Token(number, row)
        for number in sorted(prober.base.fates)[-(n_moves // 4) :]
        for row in range(batch)
        if not bool((prober.origin[..., 0] == number).any())
    ]
    columns = _chosen(prober, max(MIN_MOVED, (n_moves - len(given_up)) // batch - EDGES))
    looks: dict[Token, tuple[Tensor, Tensor]] = {}

    def look(token: Token) -> tuple[Tensor, Tensor]:
        if token not in looks:
            looks[token] = prober.look(token)
        return looks[token]

    found = Sight(
        prober.queries, (), torch.empty(0), torch.empty(0), _padding(prober.segment, batch)
    )
    found = replace(found, ids=prober.history, earlier=prober.earlier, direct=spot.site is not None)
    for _ in range(EDGES):
        _see(found, prober, columns, look)
        more = _between(found, columns, prober.step)
        if not more:
            break
        columns = sorted({*columns, *more})
    _others(found, prober, columns, look)
    for token in given_up:
        for row in look(token)[0].any(1).nonzero()[:, 0].tolist():
            found.stale.setdefault(prober.base.fates[token.number], set()).add(row)
    return found


def _see(found: Sight, prober: Prober, columns: list[int], look: Any) -> None:
    """Fill in what each row sees of its own history."""
    batch = prober.history.shape[0]
    size = (batch, len(found.queries), len(columns))
    found.cached, found.uncached = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
    found.columns = tuple(columns)
    for k, column in enumerate(columns):
        for row in range(batch):
            token = Token(*prober.origin[row, column].tolist())
            cached, uncached = look(token)
            found.cached[row, :, k], found.uncached[row, :, k] = cached[row], uncached[row]


def _others(found: Sight, prober: Prober, columns: list[int], look: Any) -> None:
    """Which rows are moved by tokens of other rows."""
    for row in range(prober.history.shape[0]):
        own = {tuple(pair) for pair in prober.origin[row].tolist()}
        for other in range(prober.history.shape[0]):
            for column in columns:
                token = Token(*prober.origin[other, column].tolist())
                if tuple(token) in own:
                    continue
                cached, uncached = look(token)
                if bool((cached[row] & ~uncached[row]).any()):
                    found.across.add((row, other))


def _padding(segment: Segment, batch: int) -> tuple[int, ...]:
    padding = segment.start.padding
    return (0,) * batch if padding is None else tuple(padding.tolist())


def _chosen(prober: Prober, n: int) -> list[int]:
    """Columns to move: all, or the first ones, the last ones, those around steps, and some of the
    others."""
    length = prober.history.shape[1]
    if length <= n:
        return list(range(length))
    wrong = next(a for a in prober.answers if a.step == prober.step)
    around = [wrong.first + d for d in (-2, -1, 0, 1, 2)]
    around += [wrong.first + wrong.logits.shape[1] + d for d in (-1, 0)]
    wanted = [0, 1, length - 1, *around, *range(0, length, max(1, length // max(1, n - 12)))]
    wanted += range(wrong.first - 1, -1, -1)
    inside = dict.fromkeys(c for c in wanted if 0 <= c < length)
    return sorted(list(inside)[:n])


def _between(found: Sight, columns: list[int], step: int) -> list[int]:
    """Columns halfway between neighbours, one seen by the wrong step's last token and one not."""
    query = max(i for i, q in enumerate(found.queries) if q.step == step)
    more: set[int] = set()
    for seen in (found.cached[:, query], found.uncached[:, query]):
        for k in range(len(columns) - 1):
            if not bool((seen[:, k] != seen[:, k + 1]).any()):
                continue
            low, high = columns[k], columns[k + 1]
            # Where what is seen ends is found by halves; the steps around end nearby.
            near = (
                range(high - BESIDE, high + BESIDE + 1) if high - low == 1 else [(low + high) // 2]
            )
            more.update(c for c in near if 0 <= c < columns[-1] and c not in columns)
    return sorted(more)[:MAX_BETWEEN]
