"""The expected seconds of a check of a large model of kvtool: steps and tokens are counted, and a
few are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from kvtool.core.cache import CacheSpec, Step, make_cache
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import advance
from kvtool.core.kernels.default import DEFAULT, Kernels, make_kernels
from kvtool.core.verify.arms import Case
from kvtool.core.verify.by_layer import Fed, Histories
from kvtool.core.verify.check import MAIN, fed_of, parts_of, subjects_of
from kvtool.core.verify.model_subject import Formats, ModelSubject
from kvtool.core.verify.scenarios import SCENARIOS

ROWS = 8, 72  # tokens of the timed passes, for the cost of a pass and of a token
TIMES = 3  # steps of one token that are timed


@dataclass
class Work:
    """The steps, tokens and passes of a check with one kind of kernels, and in float64."""

    steps: int = 0  # of one token
    tokens: int = 0  # in other steps, and in uncached passes
    passes: int = 0  # in float64
    tokens_in_float64: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def work_of(
    formats: Formats,
    caches: Sequence[str],
    kernels: Sequence[str],
    cases: Sequence[Case],
    skip: Container[tuple[str, str, str]] = (),
    thorough: bool = False,
) -> dict[str, Work]:
    """The work of a model in these cases, by the name of the kernels."""
    subjects, _ = subjects_of(formats, caches, thorough)
    found = {name: Work() for name in kernels}
    for name, case in product(kernels, cases):
        histories = Histories()
        for kind in caches:
            if (kind, name, case.scenario.name) not in skip:
                found[name] += _cached(subjects[kind], case, histories)
        found[name].tokens += histories.n_rows
        if name == DEFAULT.name and histories.n_rows:
            found[name] += Work(passes=1, tokens_in_float64=histories.n_rows)
    return found


def planned(
    formats: Formats,
    caches: Sequence[str],
    kernels: Sequence[str],
    cases: Sequence[Case],
    skip: Container[tuple[str, str, str]] = (),
    thorough: bool = False,
) -> tuple[dict[str, Work], float]:
    """The work of `check_model` by the name of the kernels, and its seconds on this machine,
    extrapolated from a few timed steps."""
    total, seconds = {name: Work() for name in kernels}, 0.0
    parts = parts_of(formats, caches, kernels, [case.scenario.name for case in cases], thorough)
    for part in dict.fromkeys(parts.values()):
        others = {turn for turn in parts if parts[turn] is not part or turn in skip}
        work = work_of(part.formats, caches, kernels, cases, others, thorough)
        seconds += seconds_for(part.formats, work)
        total = {name: total[name] + work[name] for name in kernels}
    return total, seconds


def _cached(subject: ModelSubject, case: Case, histories: Histories) -> Work:
    """The work of a kind. Its uncached passes are added to the histories."""
    case = fed_of(subject, case)
    fed = None if case.scenario.lacking(subject) else Fed.of(subject, case, histories)
    if fed is None:
        return Work()
    rows = [histories.all[place.history].segment.start.batch for place in fed.places.values()]
    sizes = [
        batch * (place.n if subject.stores else place.first + place.n)
        for batch, place in zip(rows, fed.places.values(), strict=True)
    ]
    return Work(sizes.count(1), sum(n for n in sizes if n > 1))


@torch.inference_mode()
def seconds_for(formats: Formats, work: dict[str, Work]) -> float:
    """The seconds of this work on this machine, extrapolated from a few timed steps."""
    total = 0.0
    for name, some in work.items():
        kernels = make_kernels(name)
        total += some.steps * _step_seconds(formats, kernels)
        total += some.tokens * _pass_seconds(formats, kernels, ROWS[1]) / ROWS[1]
        if some.passes:
            few, many = (_pass_seconds(formats, kernels, n, torch.float64) for n in ROWS)
            token = max(many - few, 0.0) / (ROWS[1] - ROWS[0])
            total += some.passes * few + some.tokens_in_float64 * token
    return total


def _pass_seconds(
    formats: Formats, kernels: Kernels, n: int, dtype: torch.dtype | None = None
) -> float:
    model = formats.model if dtype is None else formats.to(dtype)
    n = min(n, model.config.context)
    ids = torch.zeros(1, n, dtype=torch.long, device=next(model.parameters()).device)
    step = Step.full(1, n, ids.device, kernels=kernels)
    return _timed(lambda: float(model(ids, step)[0, -1, 0]))


def _step_seconds(formats: Formats, kernels: Kernels) -> float:
    model = formats.model
    weight = next(model.parameters())
    spec = CacheSpec.of(model.config, 1, TIMES + 2, weight.dtype, weight.device, kernels)
    cache, form = make_cache("dynamic", spec), decoding_form(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    advance(form, cache, ids)  # what is compiled, is now
    times = [_timed(lambda: float(advance(form, cache, ids)[0, 0, 0])) for _ in range(TIMES)]
    return sorted(times)[TIMES // 2]


def _timed(work: Callable[[], float]) -> float:
    started = time.perf_counter()
    work()  # whose number is read, so that a GPU has done it
    return time.perf_counter() - started


def cases_of(scenarios: Sequence[str], main: Case, thorough: bool) -> list[Case]:
    """The scenarios that are played."""
    return [main if n == MAIN else Case(SCENARIOS[n], thorough=thorough) for n in scenarios]


def in_words(work: dict[str, Work], seconds: float) -> str:
    """The plan and its time in a line.

    >>> in_words({"default": Work(300, 2000, 20, 1500)}, 260)
    'about 4 minutes: 300 steps of one token, 2,000 tokens in longer ones, 1,500 in float64'
    """
    steps, tokens = (sum(getattr(w, n) for w in work.values()) for n in ("steps", "tokens"))
    wide = sum(w.tokens_in_float64 for w in work.values())
    minutes = max(round(seconds / 60), 1)
    plan = f"{steps:,} steps of one token, {tokens:,} tokens in longer ones, {wide:,} in float64"
    return f"about {minutes:,} minute{'s' * (minutes > 1)}: {plan}"
