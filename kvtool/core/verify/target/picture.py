"""What each token of a scenario can see, through the cache and without it, to be drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvtool.core.verify.arms import Case
from kvtool.core.verify.scenario_run import ScenarioRun
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.attributes import owned_modules
from kvtool.core.verify.target.doctor import locate, spots
from kvtool.core.verify.target.influence import Sight, Spot, sight
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import Tracer, is_wrong, token_axis
from kvtool.errors import pass_on_shortage

SHORT = "chunks"  # the scenario that is drawn where all are right: a prompt, and steps of all kinds
SHOWN = 48  # tokens that a picture has room for
N = 6  # tokens of the pass in which attention is looked for


class Picture(NamedTuple):
    """A map of one row. Marks: 0 not seen, 1 seen, 2 hidden by the cache, 3 shown by it alone."""

    scenario: str
    queries: tuple[int, ...]  # columns of the history
    steps: tuple[int, ...]  # of each query
    keys: tuple[int, ...]
    uncached: list[list[int]]
    cached: list[list[int]]
    padding: int
    row: int
    n_rows: int
    where: str  # what is looked at, in words


@torch.inference_mode()
def picture(subject: TargetSubject, case: Case | None, step: int | None) -> Picture | None:
    """The map of a wrong step, or of a scenario that is right; None where none can be made."""
    subject = _double(subject)
    case = case or Case(SCENARIOS[SHORT])
    best: Sight | None = None
    try:
        for spot in _spots(subject, case, step):
            found = sight(subject, case, step or 0, 10**6 if step is None else step + 5, spot)
            if found is not None and (best is None or found.differs):
                best = found
            if best is not None and (best.differs or step is None):
                break
    except Exception as error:  # the user's code may not like what it is given here
        pass_on_shortage(error)
    return None if best is None else _drawn(best, case.scenario.name)


def _double(subject: TargetSubject) -> TargetSubject:
    """In float64 if that can be had: less is lost in rounding."""
    try:
        return subject.to(torch.float64)
    except Exception as error:
        pass_on_shortage(error)
        return subject


def _spots(subject: TargetSubject, case: Case, step: int | None) -> list[Spot]:
    if step is not None:
        located = locate(subject, case, step)
        return list(spots(located[0] if located else None))
    first = first_attention(subject)
    return [first, Spot()] if first is not None else [Spot()]


def first_attention(subject: TargetSubject) -> Spot | None:
    """The first value of a pass by which a token sees another; None if no hook reaches one."""
    ids = ScenarioRun(subject).next_ids(1, N)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % subject.vocab_size
    traces = []
    for given in (ids, other, ids[:, :-1]):
        tracer = Tracer()
        with tracer.on(owned_modules(subject.decoder)):
            subject.call_full(given)
        traces.append(tracer.trace)
    base, moved, shorter = traces
    for site, value in base.items():
        if site not in moved or site not in shorter or not value.is_floating_point():
            continue
        axis = token_axis(shorter[site].shape, value.shape, N - 1, N)
        found, expected = (t[site].movedim(axis, 0)[1:] for t in (moved, base))
        if value.dim() > 2 and found.shape[0] == N - 1 and is_wrong(found, expected):
            return Spot(site, axis)
    return None


def _drawn(found: Sight, scenario: str) -> Picture:
    """The row that has most wrong in it, its last SHOWN tokens."""
    row = int((found.cached != found.uncached).flatten(1).sum(1).argmax())
    keys = found.columns[-SHOWN:]
    queries = [i for i, q in enumerate(found.queries) if q.column >= found.padding[row]][-SHOWN:]
    cached, uncached = (t[row][queries][:, -SHOWN:].int() for t in (found.cached, found.uncached))
    own = torch.tensor([[k == found.queries[i].column for k in keys] for i in queries])
    cached[own] = uncached[own] = 1
    marked = torch.where(cached > uncached, 3, torch.where(uncached > cached, 2, cached))
    return Picture(
        scenario,
        tuple(found.queries[i].column for i in queries),
        tuple(found.queries[i].step for i in queries),
        keys,
        uncached.tolist(),
        marked.tolist(),
        found.padding[row],
        row,
        len(found.padding),
        "in one layer of attention" if found.direct else "in its logits, through all layers",
    )
