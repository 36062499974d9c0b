"""kvtool bench with several number formats, batches and threads; waits; and what it recommends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_cases
from cli_probe import Ran, refused
from kvtool.commands.bench.advice import recommendation
from kvtool.commands.bench.cases import limit_cases
from kvtool.commands.bench.compare import FOLDER, Change, Comparison, Limit
from kvtool.commands.bench.report import BenchReport, best_text, versus_text
from kvtool.commands.bench.row import Row
from kvtool.config.setups import Setup, axes_of, name_of
from kvtool.core.bench import timing
from kvtool.core.bench.traffic import Bandwidth
from kvtool.ui import plots
from kvtool.ui.cases import Status
from small_models import answer

decoder, small_array, bench, slow = (
    bench_cases.decoder,
    bench_cases.small_array,
    bench_cases.bench,
    bench_cases.slow,
)
SETUP = ("dtype", "batch_size", "threads")


def setups(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in SETUP) for row in document["measurements"]]


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes 0.1 s a row, half with two threads, and 0.3 s without a cache."""

    def seconds(work: timing.Workload, kind: str) -> float:
        once = len(work.prompt) * (0.3 if kind == "none" else 0.1)
        return once / torch.get_num_threads()

    def run(self: timing.Workload, kind: str, length: int) -> timing.TimedRun:
        taken = seconds(self, kind)
        return timing.TimedRun(taken, taken / 4, taken, taken, 8, 8, (taken / 8, taken / 2))

    monkeypatch.setattr(timing.Workload, "run", run)


# Several in one run


@pytest.mark.parametrize(
    "words", ["--batch-size 2 1 --threads 1 2", "--batch-size=2,1 --threads 1 --threads 2"]
)
def test_every_combination_is_a_row_and_threads_are_put_back(
    bench: Callable[..., Ran], pace: None, words: str
) -> None:
    before = torch.get_num_threads()
    given = ["--dtype", "float32", "bfloat16", "--caches", "none", "static", "--json"]
    try:
        found = answer(bench(*given, *words.split()))
        assert torch.get_num_threads() == 1  # the first that was asked for
    finally:
        torch.set_num_threads(before)
    each = [(d, b, t) for d in ("float32", "bfloat16") for b in (2, 1) for t in (1, 2)]
    assert setups(found) == each + each
    medians = [row["median_s"] for row in found["measurements"][-8:]]
    assert medians == [0.2, 0.1, 0.1, 0.05] * 2  # each sample with its own threads
    assert [row["speedup"] for row in found["measurements"][-8:]] == [pytest.approx(3)] * 8
    assert len(found["pays_from"]) == 8 and "bfloat16 batch-1 2-thread static" in found["pays_from"]
    assert found["settings"]["run"]["dtype"] == "float32" and found["batch_size"] == 2
    assert (found["measured_on"]["dtype"], found["measured_on"]["threads"]) == (
        ["float32", "bfloat16"],
        [1, 2],
    )
    assert "every static pays from 3 tokens on" in found["conclusion"]


def test_a_single_value_names_nothing_that_is_not_compared(
    bench: Callable[..., Ran], pace: None
) -> None:
    ran = bench("--dtype", "bfloat16", "--caches", "static", "--json")
    assert setups(answer(ran)) == [("bfloat16", 1, 1)]
    assert answer(ran)["measured_on"]["threads"] == 1
    head = bench("--caches", "none", "static").out
    assert "dtype" not in head and "threads" not in head and "batch of 1\n" in head


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_has_a_column_for_what_is_compared(
    bench: Callable[..., Ran], pace: None, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    out = bench("--batch-size", "1", "8", "--caches", "none", "static").out
    assert "prompt of 4, batch of 1 and 8" in out
    rows = [line.split() for line in out.splitlines() if line.split()[:2] == ["3", "static"]]
    assert [row[2] for row in rows[:2]] == ["1", "8"]
    tables = out.partition("Memory was read")[0]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= columns


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtype float32 float8", "--dtype: 'float8' is not known"),
        ("--dtype", "--dtype: needs at least one value, e.g. --dtype float32 bfloat16"),
        ("--batch-size 1 0", "--batch-size: 0 is too small"),
        ("--batch-size 1 x", "--batch-size: 'x' is not a whole number"),
        ("--threads 1 -1", "--threads: -1 is too small"),
        ("--batch-size 1 2000000000", "the caches: needs "),
    ],
)
def test_one_bad_value_of_a_list_is_exit_2(
    bench: Callable[..., Ran], words: str, message: str
) -> None:
    assert refused(bench(*words.split())).startswith(message)


def test_the_budget_is_shared_and_names_what_it_leaves_out(
    bench: Callable[..., Ran], slow: Callable[..., None]
) -> None:
    slow(lambda kind, length: length * length / 100 if kind == "none" else 0.1)
    given = ["--batch-size", "1", "8", "--lengths", "5", "50", "--caches", "none", "static"]
    ran = bench(*given, "--budget", "5", "--json")
    left = "batch-1 none at 50 tokens (about 11 s); batch-8 none at 50 tokens (about 11 s)"
    assert f"not measured: {left}; give a larger" in ran.err
    assert sum(not row["samples_s"] for row in answer(ran)["measurements"]) == 2


def test_a_line_is_drawn_for_each_and_many_names_stand_beside_the_panels(
    bench: Callable[..., Ran], pace: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *_: figures.append(figure))
    given = ["--plot", str(tmp_path / "a.png"), "--caches", "none", "static", "--batch-size"]
    bench(*given, "1", "2")
    names = ["batch-1, no cache", "batch-2, no cache", "batch-1, static cache"]
    axes = figures[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()][:3] == names
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    bench(*given, "1", "2", "3", "4", "5")
    assert figures[1].axes[0].get_legend() is None
    assert len(figures[1].legends[0].get_texts()) == 10


# Against an earlier run


def test_rows_are_compared_that_are_alike_in_what_one_of_the_runs_has_several_of(
    bench: Callable[..., Ran], pace: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    bench("--caches", "static", "--batch-size", "2", "--save", "before")
    given = ["--caches", "static", "--batch-size", "1", "2", "--compare", "before"]
    ran = bench(*given, "--json")
    assert "not the same conditions" not in ran.err
    changes = answer(ran)["changes"]
    assert [(c["setup"], c["before_s"], c["now_s"]) for c in changes] == [("batch-2", 0.2, 0.2)]
    assert "batch-1 static at 3 tokens: not in the baseline" in answer(ran)["not_in_baseline"][0]
    path = FOLDER / "before.json"
    content = json.loads(path.read_text())
    content["measurements"][0]["samples_s"] = [0.1, 0.1]
    for name in SETUP:  # as a run of an earlier version
        del content["measurements"][0][name]
    path.write_text(json.dumps(content))
    ran = bench(*given, "--fail-if", "median:10%")
    assert ran.code == 1 and "batch-2 static at 3 tokens: median 100.0 -> 200.0 ms" in ran.out
    assert "batch was 2 and is 1" in bench(*given[:3], "1", *given[5:]).err


@pytest.mark.parametrize(
    ("limit", "code", "said"),
    [
        ("first_token:10%", 1, "static at 3 tokens: first_token 12.5 -> 25.0 ms (+100%)"),
        ("between_tokens_p90:10%", 1, "between_tokens_p90 was not measured"),
        ("between_tokens:200%", 0, "no row is slower"),
        ("between_tokens_p99:0.001", 1, "between_tokens_p99 was not measured in the baseline"),
    ],
)
def test_a_limit_may_be_on_a_wait(
    bench: Callable[..., Ran],
    pace: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    limit: str,
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    bench("--caches", "static", "--save", "before")
    path = FOLDER / "before.json"
    content = json.loads(path.read_text())
    content["measurements"][0]["first_token_s"] = 0.0125
    del content["measurements"][0]["between_tokens_p99_s"]
    path.write_text(json.dumps(content))
    ran = bench("--caches", "static", "--compare", "before", "--fail-if", limit)
    assert ran.code == code and said in ran.out


# Waits


def test_waits_are_those_for_the_first_token_and_between_all_tokens_of_all_runs() -> None:
    runs = [timing.TimedRun.of(0.0, [s, s + 1.0, s + 4.0]) for s in (1.0, 2.0, 4.0)]
    assert runs[0].between == (1.0, 3.0)
    row = Row.of(timing.Cell("static", 3, runs), None, 0)
    assert (row.first_token_s, row.between_tokens_s) == (2.0, 2.0)
    alone = Row.of(timing.Cell("static", 1, [timing.TimedRun.of(0.0, [1.0])]), None, 0)
    assert (alone.first_token_s, alone.between_tokens_s) == (1.0, None)


def test_a_percentile_is_told_of_so_many_waits_that_one_is_beyond_it() -> None:
    runs = [timing.TimedRun.of(0.0, [float(s), s + 1.0]) for s in range(1, 101)]
    few, some, many = (Row.of(timing.Cell("static", 2, runs[:n]), None, 0) for n in (9, 10, 100))
    assert (few.first_token_s, few.first_token_p90_s) == (5.0, None)
    assert (some.first_token_p90_s, some.first_token_p99_s) == (pytest.approx(9.1), None)
    assert many.first_token_p99_s == pytest.approx(99.01)


def test_the_waits_have_a_table(bench: Callable[..., Ran]) -> None:
    out = bench("--caches", "static").out
    table = out.partition("Time to the first token, and from each to the next")[2]
    assert "first median ms" in table and "p9" not in table  # of too few runs for a percentile
    found = answer(bench("--caches", "static", "--json"))["measurements"][0]
    assert found["first_token_s"] == found["prefill_s"] > 0
    assert found["between_tokens_s"] > 0 and found["between_tokens_p90_s"] is None
    assert found["cores_used"] > 0


# What is recommended


def row(kind: str, seconds: list[float], kib: int, setup: Setup = Setup("float32")) -> Row:  # noqa: B008
    runs = [timing.TimedRun(s, 0.0, s, None, kib * 1024, None) for s in seconds]
    return Row.of(timing.Cell(kind, 9, runs, setup=setup), None, 0)


def advised(*rows: Row, quality: dict[str, Any] | None = None, lossy: tuple[str, ...] = ()) -> str:
    return recommendation(rows, quality or {}, lossy)


STEADY = [1.0, 1.01, 1.02]


def test_the_fastest_beyond_the_noise_is_recommended_with_the_distance() -> None:
    slower = row("paged", [1.5, 1.51, 1.52], 1)
    said = "For this load, at 9 tokens: static is the fastest (paged takes 1.50 times as long)."
    assert advised(row("static", STEADY, 9), slower) == said
    assert advised(row("static", STEADY, 9)) == ""  # there is no choice


def test_less_memory_is_worth_a_tenth_of_the_time() -> None:
    smaller = row("paged", [1.07, 1.08, 1.09], 4)
    assert advised(row("static", STEADY, 9), smaller) == (
        "For this load, at 9 tokens: paged, since it takes the least memory (4 KiB, and static "
        "9 KiB) and only 7 % longer than static, the fastest."
    )


def test_a_difference_below_the_noise_is_said() -> None:
    noisy = row("paged", [0.9, 1.05, 1.3], 9)
    assert advised(row("static", STEADY, 9), noisy) == (
        "For this load, at 9 tokens: static, since paged differs from it by less than the noise."
    )
    few = advised(row("static", [1.0], 9), row("paged", [2.0], 9))
    assert few.endswith("as long), though fewer than 3 samples do not tell the noise.")


@pytest.mark.parametrize("measured", [True, False])
def test_a_lossy_kind_is_never_recommended_without_what_it_loses(measured: bool) -> None:
    found = {"kl": 0.0123, "perplexity": 9.5, "lossless_perplexity": 9.25}
    said = advised(
        row("int4", STEADY, 1),
        row("static", STEADY, 9),
        quality={"int4": found} if measured else {},
        lossy=("int4",),
    )
    loss = "0.012 nats a token from those without a loss (KL), and its perplexity 9.50 instead of"
    assert "int4, since static differs" in said and ", but it is lossy: " in said
    assert (loss if measured else "how much was not measured") in said
    assert said.endswith("; without a loss, static.")


def test_several_setups_are_told_in_short() -> None:
    one, two = Setup("float32", 1, 1), Setup("float32", 1, 2)
    rows = [row("static", STEADY, 9, one), row("paged", [2.0] * 3, 9, one)]
    rows += [row("static", [2.0] * 3, 9, two), row("paged", STEADY, 9, two)]
    said = advised(*rows)
    first = "For this load, at 9 tokens: static in 1-thread; paged in 2-thread (the fastest, or"
    assert said.startswith(first) and said.endswith("of the fastest or within the noise).")


def each_setup(*kinds: str, samples: int = 3) -> list[Row]:
    """For each kind a setup of its own in which it is the fastest of three."""
    return [
        row(kind, [1.0 if kind == fastest else 2.0] * samples, 9, Setup("float32", batch))
        for batch, fastest in enumerate(kinds, start=1)
        for kind in ("static", "paged", "dynamic")
    ]


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["static", "static", "paged"], "static in most setups; paged in batch-3 ("),
        (["static"] * 2 + ["paged"] * 2, "static in batch-1 and batch-2; paged in batch-3 and"),
        (["static"] * 3 + ["paged", "paged", "dynamic"], "static in batch-1, batch-2 and batch-3;"),
        (["static"] * 3, "static in all setups ("),
    ],
)
def test_most_setups_are_more_than_half(kinds: list[str], words: str) -> None:
    assert f"For this load, at 9 tokens: {words}" in advised(*each_setup(*kinds))


def test_what_is_said_of_a_setup_is_not_said_of_those_without_a_choice() -> None:
    alone = row("static", [1.0] * 3, 9, Setup("float32", 8))
    said = advised(*each_setup("static"), alone)
    assert said.startswith("For this load, at 9 tokens: static in batch-1 (")
    said = advised(*each_setup("static", "static"), alone)
    assert "static in most setups (" in said and "all setups" not in said


def test_a_noise_that_was_not_measured_is_said_of_several_setups_too() -> None:
    said = advised(*each_setup("static", "paged", samples=2))
    assert said.endswith("within the noise, which fewer than 3 samples do not tell).")


def report_of(*rows: Row) -> BenchReport:
    bandwidth = Bandwidth((1e10,))
    pays = {name_of(each, axes_of(rows)): 9.0 for each in rows if each.cache != "none"}
    return BenchReport(list(rows), pays, 1, 4, None, "default", bandwidth, {}, 1.0)


def test_the_fastest_cache_is_not_called_the_fastest_where_none_is() -> None:
    caches = [row("static", [2.0] * 3, 9), row("paged", [3.0] * 3, 9)]
    said = best_text(report_of(row("none", STEADY, 0), *caches))
    assert "static is fastest of the caches here" in said
    assert "static is fastest here" in best_text(report_of(row("none", [4.0] * 3, 0), *caches))


def test_of_many_setups_the_factors_are_a_range() -> None:
    rows = []
    for batch, other in enumerate([2.0, 3.0, 4.0, 0.5], start=1):
        rows += [row("static", [1.0], 9, Setup("float32", batch))]
        rows += [replace(row("static", [other], 9, Setup("float32", batch)), impl="theirs")]
    assert versus_text(report_of(*rows)) == (
        "At 9 tokens kvtool is faster than theirs by a factor of 2.00 to 4.00 with static (3 "
        "setups); theirs is faster than kvtool by a factor of 2.00 with static (batch-4)."
    )


def test_a_row_that_a_limit_fails_is_one_case_whatever_sets_it_apart() -> None:
    changes = [
        Change(10, "kvtool", "dynamic", 1.0, 1.0, "float32"),
        Change(10, "kvtool", "dynamic", 1.0, 2.0, "bfloat16"),
    ]
    slower = "bfloat16 dynamic at 10 tokens: median 100 % slower"
    cases = limit_cases(Comparison("old", (Limit("median", 10, True),), changes, [slower]))
    assert [(case.name, case.status) for case in cases] == [
        ("float32 dynamic at 10 tokens", Status.PASSED),
        ("bfloat16 dynamic at 10 tokens", Status.FAILED),
    ]
