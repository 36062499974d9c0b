"""The map of what each token of a scenario sees, through the cache and without it, for a plot."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvtool.core.verify.arms import Case
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.core.verify.target.doctor import locate
from kvtool.core.verify.target.influence import Sight, sight
from kvtool.core.verify.target.probe import Spot
from kvtool.core.verify.target.spots import first_attention, spots
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.errors import pass_on_shortage

SHORT = "chunks"  # the scenario that is drawn where all are right: a prompt, and steps of all kinds
SHOWN = 48  # tokens that a picture has room for


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
    for spot in _spots(subject, case, step):
        try:
            found = sight(subject, case, step or 0, 10**6 if step is None else step + 5, spot)
        except Exception as error:  # the user's code may not like what it is given here
            pass_on_shortage(error)
            continue
        if found is not None and (best is None or found.differs):
            best = found
        if best is not None and (best.differs or step is None):
            break
    return None if best is None else _drawn(best, case.scenario.name)


def _double(subject: TargetSubject) -> TargetSubject:
    """The subject in float64 if it converts, where rounding hides less."""
    try:
        return subject.to(torch.float64)
    except Exception as error:
        pass_on_shortage(error)
        return subject


def _spots(subject: TargetSubject, case: Case, step: int | None) -> list[Spot]:
    if step is not None:
        located = locate(subject, case, step)
        return list(spots(subject, located[0] if located else None))
    first = first_attention(subject)
    return [first, Spot()] if first is not None else [Spot()]


def _drawn(found: Sight, scenario: str) -> Picture:
    """The row with the most wrong marks, its last SHOWN tokens."""
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
