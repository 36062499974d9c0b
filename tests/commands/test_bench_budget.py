"""kvtool bench where time decides: the budget, and what is concluded from medians."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bench_cases
from bench_cases import cells
from cli_probe import Ran
from kvtool.commands.bench.compare import place
from kvtool.core.bench import quality
from kvtool.ui import plots
from small_models import answer

decoder, small_array, bench, slow = (
    bench_cases.decoder,
    bench_cases.small_array,
    bench_cases.bench,
    bench_cases.slow,
)


# The budget


def test_rows_that_the_budget_left_out_are_null_and_said(
    bench: Callable[..., Ran], slow: Callable[..., None]
) -> None:
    slow(lambda kind, length: length * length / 100 if kind == "none" else 0.1)
    words = ["--lengths", "5", "50", "--caches", "none", "static", "--budget", "5"]
    ran = bench(*words, "--json")
    found = answer(ran)
    unmeasured = found["measurements"][2]
    assert cells(found)[2] == (50, "none")
    assert unmeasured["samples_s"] == []
    names = ("median_s", "iqr_s", "tokens_per_s", "speedup", "bytes_measured")
    assert [unmeasured[name] for name in names] == [None] * 5
    assert unmeasured["bytes_predicted"] == 0
    left_out = "none at 50 tokens (about 11 s)"
    assert f"so not measured: {left_out}; give a larger --budget" in ran.err
    assert f" Left out by --budget 5 s: {left_out}. For this load" in found["conclusion"]
    said = bench(*words).out.splitlines()
    row = next(line for line in said if line.startswith("    50  none"))
    assert row.split() == ["50", "none", "~11", "s", "-", "0", "-", "-", "-", "0"]
    assert said[-2] == f"Left out by --budget 5 s: {left_out}."


def test_a_row_that_was_left_out_needs_no_table_of_its_own(
    bench: Callable[..., Ran], slow: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    slow(lambda kind, length: length * length / 100 if kind == "none" else 0.1)
    kinds = ["none", "sliding:window=16:sinks=4"]
    said = bench("--lengths", "5", "50", "--budget", "5", "--caches", *kinds).out
    times = said.partition("One more token")[0]
    assert times.count("─\n") == 1 and "~11 s" in times and "would take" not in times
    assert not [line for line in said.splitlines() if line != line.rstrip()]


def test_fewer_samples_than_asked_for_are_said(
    bench: Callable[..., Ran], slow: Callable[..., None]
) -> None:
    slow(lambda kind, length: 1.0)
    ran = bench("--caches", "none", "static", "--repeats", "9", "--budget", "8", "--json")
    counts = [len(row["samples_s"]) for row in answer(ran)["measurements"]]
    assert counts == [4, 4]
    assert ran.err == "2 of 2 rows have fewer than 9 samples (--budget 8 s)\n"


def test_nothing_measured_at_all_is_exit_1_and_draws_nothing(
    bench: Callable[..., Ran], slow: Callable[..., None], tmp_path: Path
) -> None:
    slow(lambda kind, length: 1.0)
    ran = bench("--budget", "0.001", "--plot", str(tmp_path / "a.png"))
    assert ran.code == 1
    said = "Nothing was measured within --budget 0.001 s: none at 3 tokens would take about 1.6 s."
    assert ran.out.splitlines()[-1] == said
    assert "does not pay" not in ran.out
    assert f"--plot {tmp_path / 'a.png'}: nothing was measured, so nothing is drawn\n" in ran.err
    assert not (tmp_path / "a.png").exists()


def test_quiet_does_not_silence_the_warning(
    bench: Callable[..., Ran], slow: Callable[..., None]
) -> None:
    slow(lambda kind, length: 1.0)
    assert bench("-q", "--budget", "0.001").err.startswith(
        "warning: --budget 0.001 s leaves no room"
    )


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_shows_and_writes_what_was_measured(
    bench: Callable[..., Ran],
    slow: Callable[..., None],
    signals_as_in_the_app: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
    code: int,
    word: str,
) -> None:
    runs: list[str] = []

    def cost(kind: str, length: int) -> float:
        runs.append(kind)
        if len(runs) > 2 * 9:  # twice for a run: 6 to warm up, then 3 of the first round
            os.kill(os.getpid(), number)
        return 1.0

    slow(cost)
    written = tmp_path / "a.json"
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "bench_plot", lambda *args: drawn.append(args))
    words = ["--caches", "none", "static", "--lengths", "3", "5", "--output", str(written)]
    ran = bench(*words, "--save", "stopped", "--plot", str(tmp_path / "a.png"))
    assert f"plot: {tmp_path / 'a.png'}\n" in ran.err
    (((_, times, _, _, caption, _)),) = drawn
    assert {kind: len(points) for kind, points in times.items()} == {"static": 2, "none": 1}
    assert caption.endswith(f"{word.capitalize()} after 3 of 8 runs.")
    assert ran.code == code
    assert f"warning: {word} after 3 of 8 runs\n" in ran.err
    assert "--save stopped: nothing is kept" in ran.err and not place("stopped").exists()
    row = next(line for line in ran.out.splitlines() if line.startswith("     5  static"))
    assert row.split()[4] == "1"
    assert ran.out.splitlines()[-1] == f"{word.capitalize()} after 3 of 8 runs."
    found = json.loads(written.read_text())
    assert found["ended"] == word and len(found["measurements"]) == 4


def test_a_signal_behind_the_last_run_keeps_all_samples(
    bench: Callable[..., Ran],
    signals_as_in_the_app: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(quality, "own_text", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    ran = bench("--caches", "none", "sliding", "--plot", str(tmp_path / "a.png"))
    assert ran.code == 143
    row = next(line for line in ran.out.splitlines() if line.startswith("     3  sliding"))
    assert row.split()[4] == "2"
    assert ran.out.endswith("\nTerminated behind the last of 4 runs.\n")
    assert (tmp_path / "a.png").exists()


def test_a_signal_that_comes_while_it_draws_finds_all_else_told_and_written(
    bench: Callable[..., Ran],
    signals_as_in_the_app: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(plots, "bench_plot", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    written = tmp_path / "a.json"
    ran = bench("--save", "drawn", "--output", str(written), "--plot", str(tmp_path / "a.png"))
    assert ran.code == 143 and ran.err.endswith("kvtool: terminated\n")
    assert "is fastest" in ran.out.splitlines()[-2]
    assert json.loads(written.read_text()) == json.loads(place("drawn").read_text())
    assert not (tmp_path / "a.png").exists()


def test_a_signal_before_the_first_sample_leaves_one_line(
    bench: Callable[..., Ran],
    slow: Callable[..., None],
    signals_as_in_the_app: None,
    tmp_path: Path,
) -> None:
    slow(lambda kind, length: os.kill(os.getpid(), signal.SIGTERM) or 1.0)
    written = tmp_path / "a.json"
    ran = bench("--output", str(written))
    assert (ran.code, ran.out, ran.err) == (143, "", "kvtool: terminated\n")
    assert not written.exists()
    ran = bench("--plot", str(tmp_path / "a.png"))
    said = f"--plot {tmp_path / 'a.png'}: nothing was measured, so nothing is drawn\n"
    assert (ran.code, ran.err) == (143, f"{said}kvtool: terminated\n")


# What is concluded


@pytest.mark.parametrize(
    ("cost", "sentence"),
    [
        (lambda kind, n: n * n / 100 if kind == "none" else n / 10, "pays from about 10 tokens on"),
        (lambda kind, n: 2 if kind == "none" else 1, "pays from 5 tokens on, the fewest measured"),
        (
            lambda kind, n: 1 if kind == "none" else 2,
            "does not pay at 50 tokens, the most measured",
        ),
    ],
)
def test_the_end_says_where_a_cache_starts_to_pay(
    bench: Callable[..., Ran],
    slow: Callable[..., None],
    cost: Callable[[str, int], float],
    sentence: str,
) -> None:
    slow(cost)
    ran = bench("--lengths", "5", "12", "50", "--caches", "none", "static", "--budget", "1000")
    assert ran.out.splitlines()[-2] == f"static {sentence}."


def test_without_none_nothing_is_said_about_paying(bench: Callable[..., Ran]) -> None:
    ran = bench("--caches", "static", "--repeats", "1")
    assert ran.out.splitlines()[-1] == "Add none to --caches to see what a cache buys."


def test_without_a_kind_that_caches_one_is_asked_for(bench: Callable[..., Ran]) -> None:
    said = bench("--caches", "none", "--repeats", "1").out.splitlines()[-1]
    assert said == "Add a kind that caches, such as dynamic, to --caches to see what a cache buys."


@pytest.mark.parametrize(
    ("static", "sentence"),
    [
        ({1: 0.5, 2: 0.5}, "static pays from 1 token on, the fewest measured."),
        ({1: 1.1, 2: 0.5}, "static pays from about 2 tokens on."),  # it is slower at 1
        ({1: 1.1, 2: 3.0}, "static does not pay at 2 tokens, the most measured."),
    ],
)
def test_a_length_from_which_on_a_kind_pays_is_one_at_which_it_does(
    bench: Callable[..., Ran],
    slow: Callable[..., None],
    static: dict[int, float],
    sentence: str,
) -> None:
    slow(lambda kind, n: 1.0 if kind == "none" else static[min(n, 2)])
    ran = bench("--lengths", "1", "2", "--caches", "none", "static")
    assert ran.out.splitlines()[-2] == sentence
