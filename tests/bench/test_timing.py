"""Honest latencies: who is measured when, what the budget allows, and what a sample holds."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvtool.config.setups import AS_IT_IS, Setup
from kvtool.core.bench import timing
from kvtool.core.bench.timing import (
    Cell,
    Contender,
    Measurement,
    TimedRun,
    Workload,
)
from kvtool.core.cache import make_cache
from kvtool.ending import until_ended
from kvtool.registry import CACHES
from made_up_samples import Fake, taking
from small_models import random_model


def measure(
    work: timing.Work,
    lengths: list[int],
    kinds: list[str],
    repeats: int,
    budget: float,
    before: int = 0,
    **named: Any,
) -> list[Cell]:
    measurement = Measurement([Contender(kind, work) for kind in kinds], lengths, before)
    measurement.run(repeats, budget, **named)
    return measurement.cells


def counts(cells: list[Cell]) -> list[int]:
    return [len(cell.samples) for cell in cells]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def make(cost: Callable[[str, int], float] = lambda kind, length: length) -> Fake:
        one = Fake(cost)
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=one.perf_counter))
        return one

    return make


# Who is measured when


def test_kinds_take_turns_shortest_first_and_no_cache_last(fake: Callable[..., Fake]) -> None:
    work = fake()
    found = measure(work, [3, 20], ["none", "static", "paged"], repeats=2, budget=1e9)
    kinds = ["static", "paged", "none"]
    turn = [(kind, n) for n in (3, 20) for kind in kinds]
    assert work.runs[9:] == turn + turn
    order = [(c.length, c.cache) for c in found]
    assert order == [(n, kind) for n in (3, 20) for kind in ("none", "static", "paged")]


def test_each_kind_runs_for_a_few_tokens_first_and_that_is_no_sample(
    fake: Callable[..., Fake],
) -> None:
    work = fake()
    found = measure(work, [500], ["none", "static"], repeats=1, budget=1e9)
    few = [[(kind, 2), (kind, 2), (kind, 10)] for kind in ("none", "static")]
    assert work.runs[:6] == few[0] + few[1]
    assert [cell.samples for cell in found] == [[500], [500]]
    measure(work, [1, 4], ["none"], repeats=1, budget=1e9)
    assert work.runs[8:11] == [("none", 2), ("none", 2), ("none", 4)]  # never longer than asked for


def test_two_tokens_tell_where_more_of_every_kind_would_take_longer_than_the_budget(
    fake: Callable[..., Fake],
) -> None:
    work = fake()
    measure(work, [500], ["none", "static"], repeats=1, budget=3)
    assert work.runs == [("none", 2)] * 2 + [("static", 2)] * 2


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


def growing(kind: str, length: int) -> float:
    """Seconds: with the square of the length without a cache, a tenth a token with one."""
    return length**2 / 100 if kind == "none" else length / 10


@pytest.mark.parametrize("budget", [0.5, 1.0, 1.5, 3.0, 13.0, 30.0, 100.0, 300.0])
def test_the_budget_is_kept_and_spent_on_the_cheap_ones_first(
    fake: Callable[..., Fake], budget: float
) -> None:
    work = fake(growing)
    found = measure(work, [10, 20, 40, 80], ["none", "static"], 7, budget)
    warm_up = 2 * (1 + 1)
    assert work.now - 100.0 <= budget + warm_up + 1e-9
    cost = {(c.cache, c.length): growing(c.cache, c.length) for c in found}
    left_out = [cost[c.cache, c.length] for c in found if not c.runs]
    firsts = [cost[c.cache, c.length] for c in found if c.runs]
    assert max(firsts, default=0) <= min(left_out, default=1e9)
    assert not left_out or sum(firsts) + min(left_out) > budget  # not one more would have fitted


def test_no_cache_leaves_the_time_of_the_caches_to_them(fake: Callable[..., Fake]) -> None:
    """The uncached run would fit, but then nothing else: three kinds of 10 s in 60 s."""
    work = fake(lambda kind, length: 50.0 * (length / 100) ** 2 if kind == "none" else length / 10)
    found = measure(work, [100], ["none", "dynamic", "int8", "paged"], repeats=1, budget=60.0)
    assert counts(found) == [0, 1, 1, 1]


def test_a_costly_kind_at_a_short_length_waits_for_cheap_ones_at_longer_lengths(
    fake: Callable[..., Fake],
) -> None:
    work = fake(lambda kind, length: 3.0 * length if kind == "none" else length / 10)
    found = measure(work, [10, 100], ["none", "static"], repeats=1, budget=35.0)
    assert [(c.cache, c.length) for c in found if c.runs] == [("static", 10), ("static", 100)]


def test_kinds_of_equal_cost_are_measured_as_far_as_it_goes(fake: Callable[..., Fake]) -> None:
    work = fake(lambda kind, length: length / 10)
    found = measure(work, [10], ["dynamic", "static"], 1, budget=1.5)
    assert counts(found) == [1, 0]


def test_the_short_runs_are_no_part_of_the_budget(fake: Callable[..., Fake]) -> None:
    slow_start = iter([60.0, 1.0])
    work = fake(lambda kind, length: next(slow_start, 1.0))
    assert counts(measure(work, [10], ["static"], repeats=3, budget=3.5)) == [3]


def test_nothing_is_measured_if_nothing_fits_and_it_is_known_what_it_would_take(
    fake: Callable[..., Fake],
) -> None:
    work = fake()
    measurement = Measurement([Contender("none", work), Contender("static", work)], [10])
    measurement.run(3, budget=1.0)
    assert counts(measurement.cells) == [0, 0]
    assert [measurement.expected(cell) for cell in measurement.cells] == [
        50,
        14,
    ]  # seconds, as two tokens tell


def test_what_stands_before_counts_in_what_a_longer_run_may_take(
    fake: Callable[..., Fake],
) -> None:
    """10 tokens behind 90 are 950 passes of a token, and 100 are 14,000: 15 times, not 100."""
    work = fake(lambda kind, length: length * (90 + length / 2) / 950)
    found = measure(work, [10, 100], ["none"], repeats=1, budget=20.0, before=90)
    assert counts(found) == [1, 1]


def test_a_signal_keeps_what_was_measured(fake: Callable[..., Fake]) -> None:
    def cost(kind: str, length: int) -> float:
        if length == 20 and kind == "none":
            raise KeyboardInterrupt
        return length

    work = fake(cost)
    measurement = Measurement([Contender(kind, work) for kind in ("none", "static")], [3, 20, 30])
    with until_ended() as outcome:
        measurement.run(2, 1e9)
    assert outcome.how is not None
    assert [cell.samples for cell in measurement.cells] == [[3], [3], [], [20], [], []]


# What a run will take


def measurement_of(*known: Cell, short: float = 1.0) -> Measurement:
    """A measurement with some cells, of contenders whose run of 10 tokens took `short` seconds."""
    contenders = {
        (cell.cache, cell.impl): Contender(cell.cache, Fake(lambda *_: 0), cell.impl)
        for cell in known
    }
    lengths = sorted({cell.length for cell in known})
    made = Measurement(list(contenders.values()), lengths)
    for cell in made._short.values():
        cell.runs, cell.took, cell.length = [taking(short)], [short], 10
    for cell in made.cells:
        for one in known:
            if (one.cache, one.impl, one.length) == (cell.cache, cell.impl, cell.length):
                cell.runs, cell.took = one.runs, [run.seconds for run in one.runs]
    return made


def test_the_next_run_is_expected_to_take_the_slowest_so_far() -> None:
    made = measurement_of(Cell("none", 10, [taking(s) for s in (3.0, 5.0, 4.0)]))
    assert made.expected(made.cells[0]) == 5.0


def test_without_a_cache_a_longer_run_takes_the_square_of_the_longest_shorter_one() -> None:
    known = [Cell("none", 10, [taking(1.0)]), Cell("none", 20, [taking(3.0), taking(2.0)])]
    made = measurement_of(*known, Cell("none", 80), Cell("none", 80, impl="transformers"))
    assert made.expected(made.cells[-2]) == 2.0 * 16
    assert made.expected(made.cells[-1]) == 1.0 * 64  # of its own short run


def test_with_a_cache_each_further_token_takes_as_long_as_the_last_ones() -> None:
    last = TimedRun(20.0, 2.0, 18.0, 0.5, 9, 9)  # 100 tokens
    made = measurement_of(Cell("static", 100, [last]), Cell("static", 300))
    assert made.expected(made.cells[1]) == 20.0 + 200 * 0.5
    made = measurement_of(Cell("static", 300))
    assert made.expected(made.cells[0]) == pytest.approx(1.0 + 290 * 0.75 / 9)


def test_what_is_not_timed_of_a_run_counts_in_what_it_takes() -> None:
    """A GPU's steps are recorded by a run before it."""
    made = measurement_of(Cell("static", 300))
    made._short["static", "kvtool", AS_IT_IS].took = [2.0]  # twice what was timed
    assert made.expected(made.cells[0]) == pytest.approx(2 * (1.0 + 290 * 0.75 / 9))


def test_before_its_first_run_nothing_is_known_of_a_kind(fake: Callable[..., Fake]) -> None:
    measurement = Measurement([Contender("none", fake())], [10])
    assert measurement.expected(measurement.cells[0]) is None


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


# Setups


def test_each_sample_has_the_threads_of_its_setup_and_one_number_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has = [7]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: has.append(n))
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    seen: list[int] = []

    class Seeing(Fake):
        def run(self, kind: str, length: int) -> TimedRun:
            seen.append(has[-1])
            has.append(5)  # as native code does
            return taking(1.0)

    work = Seeing(lambda *_: 0.0)
    setups = [Setup("float32", 1, n) for n in (1, 2)]
    two = Measurement([Contender("static", work, setup=each) for each in setups], [3])
    two.run(2, 1e9)
    assert seen == [1, 1, 1, 2, 2, 2] + [1, 2] * 2
    assert [cell.setup.threads for cell in two.cells] == [1, 2]
    seen.clear()
    del has[1:]
    Measurement([Contender("static", work, setup=setups[0])], [3]).run(1, 1e9)
    assert seen[0] == 7 and set(has) == {7, 5}
