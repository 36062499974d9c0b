"""Spots to measure what tokens see: between two spots is one layer of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from kvtool.core.verify.scenario_run import ScenarioRun
from kvtool.core.verify.target.attributes import owned_modules
from kvtool.core.verify.target.probe import Probe, Spot, Token
from kvtool.core.verify.target.subject import TargetSubject
from kvtool.core.verify.target.trace import Difference, Site, Trace, Tracer, is_wrong, token_axis
from kvtool.errors import pass_on_shortage

N = 6  # tokens of the passes that are compared


def spots(subject: TargetSubject, first: Difference | None) -> Iterator[Spot]:
    """At the first wrong value, and moved just before it; then at the logits, from the ids on."""
    if first is not None and first.moved:
        moved: tuple[str, ...] = ()
        if first.found.is_floating_point():  # else it is a mask, and no token is in it
            try:
                moved = _behind_attention(subject, Spot(first.site, first.axis, first.moved))
            except Exception as error:  # the user's code may not like what it is given here
                pass_on_shortage(error)
        if moved and not first.site.call:
            yield Spot(first.site, first.axis, moved)
        elif first.site.layer == 0 and (attention := _safely(first_attention, subject)):
            yield attention
    yield Spot()


def _safely(find: Callable[[TargetSubject], Spot | None], subject: TargetSubject) -> Spot | None:
    try:
        return find(subject)
    except Exception as error:  # the user's code may not like what it is given here
        pass_on_shortage(error)
        return None


def _behind_attention(subject: TargetSubject, spot: Spot) -> tuple[str, ...]:
    """Those of the moved modules behind which no token reaches another but at the spot."""
    base, shorter = _traced(subject), _traced(subject, n=N - 1)
    spot = spot._replace(moved=tuple(n for n in spot.moved if _by_token(n, base, shorter)))
    moved = _traced(subject, spot)
    sites = list(base)
    before = sites[: sites.index(spot.site)] if spot.site in base else []
    if spot.site in moved and not is_wrong(moved[spot.site], base[spot.site]):
        return ()  # a mask, say: no token is in it
    left = list(spot.moved)
    for site in before:
        if _crossed(site, base, moved, shorter):
            passed = {s.module for s in before[: before.index(site) + 1] if s.side == "out"}
            left = [name for name in left if name not in passed]
    return tuple(left)


def _by_token(module: str, base: Trace, shorter: Trace) -> bool:
    """Whether a module answers (B,T,...): behind a split into heads, say, it does not, and what is
    moved there would be a head."""
    answers = [site for site in base if site.module == module and site.side == "out"]
    shapes = [(shorter[site].shape, base[site].shape) for site in answers if site in shorter]
    return any(len(a) > 2 and (a[1], b[1]) == (N - 1, N) for a, b in shapes)


def first_attention(subject: TargetSubject) -> Spot | None:
    """The first value of a pass by which a token sees another; None if no hook reaches one."""
    base, moved, shorter = _traced(subject), _traced(subject, Spot()), _traced(subject, n=N - 1)
    for site, value in base.items():
        if value.is_floating_point() and _crossed(site, base, moved, shorter):
            return Spot(site, token_axis(shorter[site].shape, value.shape, N - 1, N))
    return None


def _traced(subject: TargetSubject, spot: Spot | None = None, n: int = N) -> Trace:
    """The trace of a pass over n tokens; with a spot, what it moves of the first is moved."""
    ids, tracer = ScenarioRun(subject).next_ids(1, N)[:, :n], Tracer()
    modules = owned_modules(subject.decoder)
    probe = Probe(Spot(None, 1, spot.moved if spot else ()), Token(0, 0))
    if spot is not None and not spot.moved:
        ids = ids.clone()
        ids[:, 0] = (ids[:, 0] + 1) % subject.vocab_size
    with probe.watch(modules, [(0, 0)] if spot else [], n), tracer.on(modules):
        subject.call_full(ids)
    return tracer.trace


def _crossed(site: Site, base: Trace, moved: Trace, shorter: Trace) -> bool:
    """Whether moving the first token moved others here."""
    if site not in moved or site not in shorter or base[site].dim() < 3:
        return False
    if moved[site].shape != base[site].shape or base[site].shape == shorter[site].shape:
        return False
    axis = token_axis(shorter[site].shape, base[site].shape, N - 1, N)
    return is_wrong(_rest(moved[site], axis), _rest(base[site], axis))


def _rest(value: Tensor, axis: int) -> Tensor:
    """The tokens behind the first."""
    return value.movedim(axis, 0)[1:]
