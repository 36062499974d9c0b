"""Honest latencies: who is measured when, what the budget allows, and what the samples say."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtool.core import timing
from kvtool.core.cache import make_cache
from kvtool.core.timing import Cell, Lane, Run, Workload, crossover, expected, speedups
from kvtool.registry import CACHES
from small_models import random_model


def taking(seconds: float, nbytes: int = 0) -> Run:
    """A run of that many seconds, a quarter of them before the first token."""
    return Run(seconds, seconds / 4, seconds * 3 / 4, None, nbytes, 0)


class Fake:
    """A clock, and a workload that takes `cost(kind, length)` seconds of it."""

    def __init__(self, cost: Callable[[str, int], float]) -> None:
        self.now = 100.0
        self.cost = cost
        self.runs: list[tuple[str, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def run(self, kind: str, length: int) -> Run:
        seconds = self.cost(kind, length)
        self.now += seconds
        self.runs.append((kind, length))
        return taking(seconds, nbytes=1000 + length)

    def predicted(self, kind: str, length: int) -> int:
        return 1000 + length


def measure(
    work: timing.Work, lengths: list[int], kinds: list[str], *rest: float, **named: Any
) -> list[Cell]:
    return timing.measure([Lane(kind, work) for kind in kinds], lengths, *rest, **named)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def make(cost: Callable[[str, int], float] = lambda kind, length: length) -> Fake:
        one = Fake(cost)
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=one.perf_counter))
        return one

    return make


def cells(**medians: list[float | None]) -> list[Cell]:
    """Cells of kinds at lengths 10, 20, 40, 80 ... with one sample each, or none."""
    return [
        Cell(kind, 10 * 2**i, [] if seconds is None else [taking(seconds)])
        for i in range(max(map(len, medians.values())))
        for kind, row in medians.items()
        for seconds in row[i : i + 1]
    ]


# Who is measured when


def test_kinds_take_turns_and_the_shortest_come_first(fake: Callable[..., Fake]) -> None:
    work = fake()
    measure(work, [3, 20], ["none", "static"], repeats=2, budget=1e9)
    warm_up = [("none", 3), ("none", 3), ("static", 3), ("static", 3)]
    turn = [("none", 3), ("static", 3), ("none", 20), ("static", 20)]
    assert work.runs == warm_up + turn + turn


def test_warming_up_is_short_and_no_sample(fake: Callable[..., Fake]) -> None:
    work = fake()
    found = measure(work, [500], ["none"], repeats=1, budget=1e9)
    assert work.runs == [("none", 10), ("none", 10), ("none", 500)]
    assert found[0].samples == [500]


def test_every_sample_is_kept_with_the_bytes(fake: Callable[..., Fake]) -> None:
    found = measure(fake(), [3, 20], ["none", "static"], repeats=5, budget=1e9)
    assert [(cell.cache, cell.length, cell.samples) for cell in found] == [
        ("none", 3, [3] * 5),
        ("static", 3, [3] * 5),
        ("none", 20, [20] * 5),
        ("static", 20, [20] * 5),
    ]
    assert all(c.bytes_measured == c.bytes_predicted == 1000 + c.length for c in found)


def test_progress_counts_what_is_passed_over_too(fake: Callable[..., Fake]) -> None:
    seen: list[Cell] = []
    measure(fake(), [3, 20], ["none", "static"], 3, budget=13.0, progress=seen.append)
    assert len(seen) == 2 * 2 * 3


# The budget


@pytest.mark.parametrize("budget", [0.5, 13.0, 30.0, 100.0, 300.0])
def test_the_budget_is_never_exceeded_by_more_than_the_warm_up(
    fake: Callable[..., Fake], budget: float
) -> None:
    work = fake(lambda kind, length: length**2 / 100 if kind == "none" else length / 10)
    found = measure(work, [10, 20, 40, 80], ["none", "static"], 7, budget)
    warm_up = 2 * (1 + 1)
    assert work.now - 100.0 <= max(budget, warm_up)
    assert all(len(cell.samples) <= 7 for cell in found)


def test_a_length_that_would_not_fit_any_more_is_not_measured_and_the_shorter_are(
    fake: Callable[..., Fake],
) -> None:
    work = fake(lambda kind, length: length**2 / 100)
    found = measure(work, [10, 100], ["none"], repeats=3, budget=50.0)
    assert [len(cell.samples) for cell in found] == [3, 0]
    assert found[1].median is None and found[1].iqr is None


def test_what_stands_before_counts_in_what_a_longer_run_may_take(
    fake: Callable[..., Fake],
) -> None:
    """10 tokens behind 90 are 950 passes of a token, and 100 are 14,000: 15 times, not 100."""
    work = fake(lambda kind, length: length * (90 + length / 2) / 950)
    found = measure(work, [10, 100], ["none"], repeats=1, budget=20.0, before=90)
    assert [len(cell.samples) for cell in found] == [1, 1]


def test_ctrl_c_keeps_what_was_measured(fake: Callable[..., Fake]) -> None:
    def cost(kind: str, length: int) -> float:
        if length == 20 and kind == "static":
            raise KeyboardInterrupt
        return length

    with pytest.raises(timing.Stopped) as stopped:
        measure(fake(cost), [3, 20], ["none", "static"], repeats=2, budget=1e9)
    assert [cell.samples for cell in stopped.value.cells] == [[3], [3], [20], []]


def test_ctrl_c_before_anything_was_measured_is_just_that(fake: Callable[..., Fake]) -> None:
    def cost(kind: str, length: int) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        measure(fake(cost), [3], ["none"], repeats=1, budget=1e9)
    assert type(stopped.value) is KeyboardInterrupt


def test_a_budget_spent_by_the_warm_up_measures_nothing(fake: Callable[..., Fake]) -> None:
    found = measure(fake(), [10], ["none", "static"], repeats=3, budget=1.0)
    assert [cell.samples for cell in found] == [[], []]


def test_the_next_run_is_expected_to_take_the_slowest_so_far() -> None:
    cell = Cell(
        "none",
        10,
        [
            taking(s)
            for s in (
                3.0,
                5.0,
                4.0,
            )
        ],
    )
    assert expected(cell, [cell]) == 5.0


def test_a_longer_run_is_expected_to_take_the_square_of_the_nearest_shorter() -> None:
    known = [
        Cell("none", 10, [taking(s) for s in (1.0,)]),
        Cell(
            "none",
            20,
            [
                taking(s)
                for s in (
                    3.0,
                    2.0,
                )
            ],
        ),
        Cell("static", 40, [taking(s) for s in (0.1,)]),
    ]
    unknown = Cell("none", 80)
    assert expected(unknown, [*known, unknown]) == 2.0 * 16
    assert expected(Cell("dynamic", 80), known) == 0.0  # nothing is known: try
    assert expected(Cell("static", 80, impl="transformers"), known) == 0.0


# What the samples say


def test_median_and_quartiles_are_those_of_the_samples() -> None:
    cell = Cell(
        "none",
        10,
        [
            taking(s)
            for s in (
                1.0,
                9.0,
                2.0,
                3.0,
                4.0,
            )
        ],
    )
    assert (cell.median, cell.iqr) == (3.0, 2.0)
    assert (
        Cell(
            "none",
            10,
            [
                taking(s)
                for s in (
                    1.0,
                    2.0,
                )
            ],
        ).iqr
        is None
    )
    assert Cell("none", 10).median is None


def test_a_speed_up_is_the_time_without_a_cache_over_the_time_with_it() -> None:
    found = cells(none=[2.0, 8.0, None], static=[4.0, 2.0, 1.0])
    assert [speedup for _, speedup in speedups(found)] == [1.0, 0.5, 1.0, 4.0, None, None]
    assert [speedup for _, speedup in speedups(cells(static=[1.0, 2.0]))] == [None, None]


@pytest.mark.parametrize(
    ("none", "static", "length"),
    [
        ([1.0, 4.0], [2.0, 2.0], 10 * 2 ** (1 / 2)),  # 1 is midway between speed-ups 0.5 and 2
        ([1.0, 16.0], [2.0, 4.0], 10 * 2 ** (1 / 3)),  # and a third of the way from 0.5 to 4
        ([1.0, 4.0], [1.0, 2.0], 10.0),
        ([2.0, 2.0, 8.0], [1.0, 4.0, 4.0], 20 * 2 ** (1 / 2)),  # slower again in between
        ([2.0, 4.0], [1.0, 1.0], 10.0),
        ([1.0, 1.0], [2.0, 1.0], None),  # as fast is not faster
        ([4.0, 1.0], [2.0, 2.0], None),
        ([1.0, 4.0, None], [2.0, 2.0, 2.0], 10 * 2 ** (1 / 2)),
        ([None, None], [2.0, 2.0], None),
    ],
)
def test_a_cache_pays_from_where_it_is_faster_at_every_longer_length(
    none: list[float | None], static: list[float | None], length: float | None
) -> None:
    assert crossover(cells(none=none, static=static), "static") == pytest.approx(length)


# The real workload


@pytest.mark.parametrize("n_encoder_layers", [0, 1])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(("prompt", "length"), [(1, 1), (7, 20), (3, 90), (70, 1), (70, 60)])
def test_the_predicted_bytes_are_those_that_were_allocated(
    kind: str, n_encoder_layers: int, prompt: int, length: int
) -> None:
    model = random_model(
        n_layers=1,
        n_encoder_layers=n_encoder_layers,
        source_vocab_size=23 * n_encoder_layers,
        n_kv_heads=2,
        context=160,
    )
    work = Workload(model, torch.ones(2, prompt, dtype=torch.long))
    run = work.run(kind, length)
    assert run.seconds == run.prefill_s + run.decode_s > 0
    assert run.nbytes == work.predicted(kind, length)
    assert (run.nbytes > 0) == (run.read > 0) == (kind != "none")
    assert (run.token_s is None) == (length == 1)


def test_prompt_and_allocation_are_part_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = types.SimpleNamespace(now=0.0)
    model = random_model()
    forward = model.forward

    def slow_forward(tokens, *rest, **named):  # type: ignore[no-untyped-def]
        clock.now += tokens.shape[1]
        return forward(tokens, *rest, **named)

    def slow_cache(*args):  # type: ignore[no-untyped-def]
        clock.now += 1000
        return make_cache(*args)

    monkeypatch.setattr(model, "forward", slow_forward)
    monkeypatch.setattr(timing, "make_cache", slow_cache)
    fake = types.SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(timing, "time", fake)
    work = Workload(model, torch.ones(1, 5, dtype=torch.long))
    static, none = work.run("static", 4), work.run("none", 4)
    assert (static.seconds, static.prefill_s, static.token_s) == (1000 + 5 + 3, 1000 + 5, 1)
    assert (none.seconds, none.prefill_s, none.token_s) == (1000 + 5 + 6 + 7 + 8, 1000 + 5, 8)
    at_depth = Workload(model, torch.ones(1, 5, dtype=torch.long), decode_only=True)
    assert at_depth.run("static", 4).seconds == 4  # behind the first, which reading gave
    assert at_depth.run("none", 2).seconds == 6 + 7
