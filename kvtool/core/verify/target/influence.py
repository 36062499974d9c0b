"""What each token can see, found from outside: move one token, and look at what moves with it.

A token that a query does not see moves nothing there. So an uncached pass and a replay through
the cache, both with the same token moved, say which keys the cache hides and which it shows,
whatever the decoder is made of. Where hooks reach the first wrong layer, what is moved is the
outputs of its own modules, and what is looked at is its attention: there one token reaches
another directly, and not by way of a third.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvtool.core.verify.arms import Case
from kvtool.core.verify.diagnosis.locate import TOLERANCE, scale
from kvtool.core.verify.scenario_run import ScenarioRun, Segment, Stopped
from kvtool.core.verify.subject import Start
from kvtool.core.verify.target.attributes import owned_modules, running_modules
from kvtool.core.verify.target.subject import TargetSession, TargetSubject
from kvtool.core.verify.target.trace import Site, parameter_names

SECONDS = 2.0  # that all replays together may take
MOST, LEAST = 96, 6  # tokens that are moved, at most; with less no map is made
MOST_BETWEEN = 12  # in one round
BESIDE = 5  # tokens on each side of an end
EDGES = 12  # rounds in which tokens between others are moved: what is seen ends there


class Token(NamedTuple):
    """One token that a session was fed: the how manieth of its run, and the row."""

    number: int
    row: int


class Spot(NamedTuple):
    """Where influence begins and where it is looked at. None: at the ids, and at the logits."""

    site: Site | None = None
    axis: int = 1  # of the tokens, in the site's value
    moved: tuple[str, ...] = ()  # modules whose outputs are moved


@dataclass
class FedStep:
    """A step as it ran: its tokens, those it goes on from, and what was seen at the spot."""

    past: int
    origin: Tensor  # (B,T,2) the number and the row of each token of the history
    value: Tensor | None = None  # (B,n,...)


@dataclass
class Probe:
    """One replay: what is moved in it, and what the steps were."""

    spot: Spot
    move: Token | None = None
    n_fed: int = 0
    steps: list[FedStep] = field(default_factory=list)
    fates: dict[int, str] = field(default_factory=dict)  # of tokens that were given up

    def value(self, seen: list[Tensor], logits: Tensor) -> Tensor:
        """The tokens' values at the spot, (B,n,...)."""
        if self.spot.site is None:
            return logits
        return seen[0].movedim(self.spot.axis, 1) if self.spot.axis else seen[0][None]

    @contextmanager
    def watch(
        self, modules: dict[str, nn.Module], cells: list[tuple[int, int]], n: int
    ) -> Iterator[list[Tensor]]:
        """Within, the spot's values are kept, and the outputs at `cells` (row, column) moved."""
        seen: list[Tensor] = []
        site, handles = self.spot.site, []
        if site is not None:
            handles.append(_keep(modules[site.module], site, seen))
        for name in self.spot.moved if cells else ():
            handles.append(modules[name].register_forward_hook(_moving(cells, n)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _keep(module: nn.Module, site: Site, seen: list[Tensor]) -> Any:
    """A hook that keeps what a site has in its module's `site.call`th call."""
    calls: list[None] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameter_names(module, len(args)), args, strict=False)), **kwargs}
        if len(calls) == site.call:
            seen.append(given[site.name].clone())
        calls.append(None)

    def leave(module: nn.Module, args: Any, answer: Any) -> None:
        values = answer if isinstance(answer, (tuple, list)) else [answer]
        if len(calls) == site.call:
            seen.append(values[int(site.name)].clone())
        calls.append(None)

    if site.side == "in":
        return module.register_forward_pre_hook(enter, with_kwargs=True)
    return module.register_forward_hook(leave)


def _moving(cells: list[tuple[int, int]], n: int) -> Any:
    """A hook that moves a module's output (B,n,...) at some cells."""

    def hook(module: nn.Module, args: Any, answer: Any) -> Any:
        if not isinstance(answer, Tensor) or not answer.is_floating_point() or answer.dim() < 3:
            return None
        if answer.shape[1] != n or answer.shape[0] <= max(row for row, _ in cells):
            return None
        generator = torch.Generator().manual_seed(n + len(cells))
        moved = answer.clone()
        for row, column in cells:
            noise = torch.randn(answer.shape[2:], generator=generator, dtype=torch.float64)
            moved[row, column] += noise.to(answer) * (1 + moved[row, column].abs())
        return moved

    return hook


class ProbedSession:
    """The user's session, which knows where each of its tokens came from."""

    def __init__(self, subject: TargetSubject, start: Start, probe: Probe) -> None:
        self.inner, self.probe, self.subject = TargetSession(subject, start), probe, subject
        self._begin(start)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _begin(self, start: Start) -> None:
        size = (start.batch, 0, 2)
        self.origin = torch.empty(size, dtype=torch.long, device=self.subject.device)

    def feed(self, ids: Tensor) -> Tensor:
        probe, (batch, n), past = self.probe, ids.shape, self.origin.shape[1]
        numbers = torch.arange(probe.n_fed, probe.n_fed + n, device=ids.device).expand(batch, n)
        rows = torch.arange(batch, device=ids.device)[:, None].expand(batch, n)
        self.origin = torch.cat([self.origin, torch.stack([numbers, rows], dim=2)], dim=1)
        probe.n_fed += n
        cells = _cells(self.origin[:, past:], probe.move)
        step = FedStep(past, self.origin)
        fed = ids if probe.spot.moved else _moved(ids, cells, self.subject.vocab_size)
        modules = running_modules(self.subject.decoder, self.inner.state)
        with probe.watch(modules, cells, n) as seen:
            logits = self.inner.feed(fed)
        step.value = probe.value(seen, logits)
        probe.steps.append(step)
        return logits

    def crop(self, length: int) -> None:
        self.inner.crop(length)
        self._give_up(self.origin[:, length:], "taken back")
        self.origin = self.origin[:, :length]

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)
        self.origin = self.origin[rows]

    def reset(self, start: Start) -> None:
        self.inner.reset(start)
        self._give_up(self.origin, "of the sequence before the reset")
        self._begin(start)

    def fork(self) -> ProbedSession:
        other = ProbedSession.__new__(ProbedSession)
        other.inner, other.probe, other.subject = self.inner.fork(), self.probe, self.subject
        other.origin = self.origin
        return other

    def _give_up(self, origin: Tensor, fate: str) -> None:
        self.probe.fates.update(dict.fromkeys(origin[..., 0].flatten().tolist(), fate))


def _cells(origin: Tensor, token: Token | None) -> list[tuple[int, int]]:
    """Where in (B,T,2) a token stands: rows and columns."""
    if token is None:
        return []
    there = (origin == torch.tensor(token, device=origin.device)).all(-1)
    return [(int(row), int(column)) for row, column in there.nonzero().tolist()]


def _moved(ids: Tensor, cells: list[tuple[int, int]], vocab_size: int) -> Tensor:
    """The ids with others at the cells."""
    moved = ids.clone()
    for row, column in cells:
        moved[row, column] = (moved[row, column] + 1 + vocab_size // 3) % vocab_size
    return moved


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
    direct: bool = False  # seen by attention itself, and not by way of other tokens

    @property
    def differs(self) -> bool:
        """Whether any token sees another through the cache than without it."""
        return not torch.equal(self.cached, self.uncached)


class Prober:
    """Replays a case with one token moved at a time, cached and uncached."""

    def __init__(self, subject: TargetSubject, case: Case, step: int, last: int, spot: Spot):
        self.subject, self.case, self.step, self.last, self.spot = subject, case, step, last, spot
        began = time.perf_counter()
        self.base, run = self._replay(None)
        self.segment = segment_of(run, step)
        self.answers = [a for a in self.segment.answers if a.step < len(self.base.steps)]
        end = self.base.steps[self.answers[-1].step].origin.shape[1]
        self.origin = self.base.steps[self.answers[-1].step].origin
        self.history = self.segment.history[:, :end]
        self.whole = self._pass(None)
        self.seconds = time.perf_counter() - began

    def _replay(self, move: Token | None) -> tuple[Probe, ScenarioRun]:
        probe = Probe(self.spot, move)
        make = self.subject.with_session(lambda s, start: ProbedSession(s, start, probe))
        run = self.case.run(make, last=self.last)
        with suppress(Stopped):
            self.case.scenario.play(run)
        return probe, run

    def _pass(self, move: Token | None) -> Tensor:
        """The uncached values (B,T,...) at the spot."""
        probe, cells = Probe(self.spot, move), _cells(self.origin, move)
        moves_ids = not self.spot.moved
        ids = _moved(self.history, cells, self.subject.vocab_size) if moves_ids else self.history
        with probe.watch(owned_modules(self.subject.decoder), cells, ids.shape[1]) as seen:
            whole = self.subject.call_full if self.spot.site is not None else self.subject.full
            logits = whole(ids, self.segment.start)
        return probe.value(seen, logits)

    def look(self, token: Token) -> tuple[Tensor, Tensor]:
        """Which queries a token moves, cached and uncached: (B,Q) bool each."""
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
        """The tokens whose answers are looked at, in order."""
        found = []
        for a in self.answers:
            end = a.first + a.logits.shape[1]
            found += [Query(c, a.step, a.first, end) for c in range(a.first, end)]
        return tuple(found)


def _changed(moved: Tensor, base: Tensor) -> Tensor:
    """Which tokens (B,n) of (B,n,...) are others."""
    if moved.shape != base.shape:
        raise ValueError("a replay answered in another shape")
    gap = (moved - base).abs().where(moved != base, 0.0).flatten(2).amax(-1)
    return ~(gap <= TOLERANCE * scale(base))


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
    n_moves = min(MOST, int(SECONDS / max(prober.seconds, 1e-4)))
    if n_moves < LEAST:
        return None
    batch = prober.history.shape[0]
    given_up = [
        Token(number, row)
        for number in sorted(prober.base.fates)[-(n_moves // 4) :]
        for row in range(batch)
        if not bool((prober.origin[..., 0] == number).any())
    ]
    columns = _chosen(prober, max(LEAST, (n_moves - len(given_up)) // batch - EDGES))
    looks: dict[Token, tuple[Tensor, Tensor]] = {}

    def look(token: Token) -> tuple[Tensor, Tensor]:
        if token not in looks:
            looks[token] = prober.look(token)
        return looks[token]

    found = Sight(
        prober.queries, (), torch.empty(0), torch.empty(0), _padding(prober.segment, batch)
    )
    found = replace(found, direct=spot.site is not None)
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
    """Columns in the middle between neighbours of which the wrong step's last token sees one."""
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
    return sorted(more)[:MOST_BETWEEN]
