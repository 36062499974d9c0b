"""kvtool bench, as a user meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_cases
from bench_cases import cells
from cli_probe import Ran, refused
from kvtool import files
from kvtool.commands.bench.formatting import number
from kvtool.commands.bench.memory import memory_text
from kvtool.commands.bench.report import BenchReport
from kvtool.commands.bench.row import Row
from kvtool.commands.bench.show import draw
from kvtool.core.bench import timing, traffic
from kvtool.core.bench.traffic import Bandwidth
from kvtool.core.kernels.default import DefaultKernels
from kvtool.ui import plots
from small_models import (
    answer,
    change_weights,
    explains_every_option,
    save_decoder,
    save_seq2seq,
    with_nan,
)

decoder, small_array, bench, slow = (
    bench_cases.decoder,
    bench_cases.small_array,
    bench_cases.bench,
    bench_cases.slow,
)


# The lengths


@pytest.mark.parametrize(
    "words",
    [
        "--lengths 10 20 30",
        "--lengths 10,20,30",
        "--lengths 10 --lengths 20 --lengths 30",
        "--lengths 10, 20 30",
    ],
)
def test_lengths_may_be_written_in_every_habit(bench: Callable[..., Ran], words: str) -> None:
    found = answer(bench(*words.split(), "--json", "--repeats", "1"))
    assert cells(found) == [
        (length, cache) for length in (10, 20, 30) for cache in ("none", "dynamic", "static")
    ]
    assert found["settings"]["lengths"] == [10, 20, 30]


def test_the_exact_line_of_the_task_is_understood(
    kv: Callable[..., Ran], decoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / files.DEFAULT_MODEL).symlink_to(decoder)
    monkeypatch.setattr(files, "weights_folder", lambda: tmp_path)
    ran = kv("--lengths", "10", "20", "30", command="bench")
    assert (ran.code, ran.err) == (0, "")
    table = [line.split() for line in ran.out.splitlines() if line[:6].strip().isdigit()]
    assert [row[0] for row in table] == ["10"] * 3 + ["20"] * 3 + ["30"] * 3


def test_lengths_out_of_order_are_sorted_each_once_with_a_note(bench: Callable[..., Ran]) -> None:
    ran = bench("--lengths", "9", "3", "9", "5", "--json", "--caches", "static")
    assert cells(answer(ran)) == [(3, "static"), (5, "static"), (9, "static")]
    assert ran.err == "lengths sorted, each once: 3 5 9\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lengths 0", "--lengths: 0 is not a length: must be 1 or more"),
        ("--lengths 5 -5", "--lengths: -5 is not a length: must be 1 or more"),
        ("--lengths ten", "--lengths: 'ten' is not a whole number"),
        ("--lengths 10 2.5", "--lengths: '2.5' is not a whole number"),
        ("--lengths", "--lengths: needs at least one value"),
        ("--lengths 10 61", "--lengths 61: with a prompt of 4 tokens is beyond the context"),
        ("--lengths 1000000000000", "--lengths"),
        ("--prompt-length 64", "--prompt-length 64: is too long (the model holds 64 tokens)"),
        ("--prompt-length 0", "--prompt-length: 0 is too small"),
        ("--batch-size 0", "--batch-size: 0 is too small"),
        ("--batch-size 2000000000", "the caches: needs "),
        ("--repeats 0", "--repeats: 0 is too small"),
        ("--budget 0", "--budget: 0.0 is out of range"),
        ("--budget nan", "--budget: nan is out of range"),
        ("--caches turbo", "--caches: 'turbo' is not known"),
        ("--kernels fast", "--kernels: 'fast' is not known (expected one of default, exact)"),
        ("--plot a.jpg", "--plot a.jpg: .jpg is not a plot format"),
        ("--plot none/a.png", "--plot none/a.png: the folder none does not exist"),
        ("--output a.pdf", "--output a.pdf: unknown format"),
        ("--output a.xml", "--output a.xml: needs --fail-if"),
        ("--device cuda", "--device cuda: there is no CUDA device here"),
    ],
)
def test_what_cannot_be_measured_is_exit_2_before_anything_runs(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something ran")

    monkeypatch.setattr(timing.Workload, "run", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(bench(*words.split())).startswith(message)


def test_the_longest_that_fits_runs(bench: Callable[..., Ran]) -> None:
    assert bench("--lengths", "60", "--repeats", "1").code == 0
    message = refused(bench("--lengths", "61"))
    assert message.endswith("The longest that fits is 60.")


def test_a_plot_or_document_onto_a_folder_is_refused_before_anything_runs(
    bench: Callable[..., Ran], slow: Callable[..., None], tmp_path: Path
) -> None:
    slow(lambda kind, length: 1 / 0)
    (tmp_path / "a.png").mkdir()
    message = refused(bench("--plot", str(tmp_path / "a.png")))
    assert message.endswith("a.png: is a folder (expected a file)")


# What is measured


def test_every_sample_is_in_the_document_with_what_follows_from_them(
    bench: Callable[..., Ran],
) -> None:
    found = answer(bench("--json", "--repeats", "5", "--batch-size", "2"))
    assert found["schema"] == "kvtool.bench/1"
    assert found["settings"]["repeats"] == 5 and found["settings"]["run"]["threads"] == 1
    assert found["environment"]["torch"] == torch.__version__
    for row in found["measurements"]:
        samples = sorted(row["samples_s"])
        assert len(samples) == 5 and samples[0] > 0
        assert row["median_s"] == samples[2]
        assert row["iqr_s"] == samples[3] - samples[1]
        assert row["tokens_per_s"] == 2 * 3 / samples[2]
        assert row["bytes_measured"] == row["bytes_predicted"]
    none, *others = found["measurements"]
    assert none["speedup"] == 1.0
    assert [r["speedup"] for r in others] == [none["median_s"] / r["median_s"] for r in others]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_bytes_follow_the_dtype(bench: Callable[..., Ran], dtype: str) -> None:
    found = answer(bench("--json", "--dtype", dtype, "--caches", "static", "--repeats", "1"))
    (row,) = found["measurements"]
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    assert row["bytes_measured"] == row["bytes_predicted"] == 2 * (4 + 3) * 16 * width


def test_an_encoder_decoder_is_measured_with_a_source(
    bench: Callable[..., Ran], tmp_path: Path
) -> None:
    model = save_seq2seq(tmp_path)
    found = answer(bench("--json", "--lengths", "3", "63", "--repeats", "1", model=model))
    assert all(r["bytes_measured"] == r["bytes_predicted"] for r in found["measurements"])
    message = refused(bench("--prompt-length", "65", model=model))
    assert message.startswith("--prompt-length 65: is too long (the model holds 64 tokens)")
    assert "with a prompt of 1 tokens" in refused(bench("--lengths", "64", model=model))


@pytest.mark.parametrize("save", [save_decoder, save_seq2seq])
def test_exact_kernels_are_measured_with_and_without_a_cache(
    bench: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path], Path],
) -> None:
    monkeypatch.delattr(DefaultKernels, "per_token")  # not asked for anything
    monkeypatch.delattr(DefaultKernels, "attention")
    given = ["--kernels", "exact", "--caches", "none", "static"]
    found = answer(bench("--json", *given, model=save(tmp_path)))
    assert found["settings"]["kernels"] == found["kernels"] == "exact"
    assert [len(row["samples_s"]) for row in found["measurements"]] == [2, 2]
    assert "batch of 1, exact kernels" in bench(*given, model=tmp_path).out


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_plot_is_written_and_said(
    bench: Callable[..., Ran], tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"latency{suffix}"
    ran = bench("--lengths", "3", "9", "--plot", str(path))
    assert ran.code == 0 and f"plot: {path}" in ran.err
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_fits_the_terminal(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    tables = bench("--caches", "none", "sliding").out.partition("Memory was read")[0]
    assert "perplexity" in " ".join(tables.split())
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= columns


def test_nan_weights_are_exit_2(bench: Callable[..., Ran], decoder: Path, tmp_path: Path) -> None:
    broken = change_weights(decoder, tmp_path / "nan", with_nan)
    assert "holds 1 NaN" in refused(bench(model=broken))


def test_the_help_explains_every_option(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(kv("-h", command="bench"), "bench")


# Depth, heads, and what is lost


def test_at_a_depth_only_decoding_is_timed(bench: Callable[..., Ran]) -> None:
    found = answer(bench("--depth", "20", "--json"))
    assert (found["depth"], found["settings"]["depth"]) == (20, 20)
    for row in found["measurements"]:
        assert row["prefill_s"] > 0 and row["token_s"] > 0
    stored = 2 * 16 * 4 * (20 + 1 + 3)  # the first is what reading the 20 gave
    assert found["measurements"][2]["bytes_measured"] == stored
    assert "Time to decode behind 20 tokens, batch of 1" in bench("--depth", "20").out
    message = refused(bench("--depth", "62"))
    assert message.startswith("--lengths 3: with a prompt of 63 tokens is beyond the context")
    assert refused(bench("--depth", "0")).startswith("--depth: 0 is too small")
    assert refused(bench("--depth", "64")).startswith("--depth 64: is too long")


def test_fewer_key_value_heads_need_fewer_bytes_and_random_weights(
    bench: Callable[..., Ran],
) -> None:
    ran = bench("--n-kv-heads", "1", "--json", "--caches", "static")
    whole = answer(bench("--json", "--caches", "static"))["measurements"][0]
    assert answer(ran)["measurements"][0]["bytes_measured"] * 4 == whole["bytes_measured"]
    assert "random weights: those of decoder" in ran.err and "4 key-value heads, not 1" in ran.err
    assert "random weights" not in bench("--n-kv-heads", "4").err
    assert "3 key-value heads do not divide" in refused(bench("--n-kv-heads", "3"))


def test_a_token_reads_the_weights_and_what_the_cache_holds(bench: Callable[..., Ran]) -> None:
    none, static = answer(bench("--json", "--caches", "none", "static"))["measurements"]
    assert none["token_bytes"] is None
    assert static["token_bytes"] > static["bytes_measured"] > 0


def test_a_lossy_kind_is_measured_on_a_text_or_on_the_models_own(
    bench: Callable[..., Ran], tmp_path: Path
) -> None:
    kinds = ["--caches", "dynamic", "sliding", "--json"]
    (quality,) = answer(bench(*kinds))["quality"].items()
    assert quality[0] == "sliding" and quality[1]["n_tokens"] == 63
    text = tmp_path / "verse.txt"
    text.write_text("ab" * 500)
    found = answer(bench(*kinds, "--text", str(text)))["quality"]["sliding"]
    assert found["text"] == f"{text}, last 10 %" and found["n_tokens"] == 98
    assert "Quality on 98 tokens" in bench(*kinds[:-1], "--text", str(text)).out
    ran = bench("--caches", "dynamic", "--text", str(text))
    assert ran.code == 0 and "warning: --text: is of no use here" in ran.err
    text.write_text("ab")
    assert "its last tenth is 1 tokens (expected 2 or more)" in refused(
        bench(*kinds, "--text", str(text))
    )
    assert "not found" in refused(bench(*kinds, "--text", str(tmp_path / "none")))


def test_a_dash_stands_for_what_is_not_known() -> None:
    assert number(None, 1000, ",.1f") == "-"
    assert number(0.5, 1, ".2f", "x") == "0.50x"


def test_the_document_names_what_was_left_open(bench: Callable[..., Ran], decoder: Path) -> None:
    resolved = answer(bench("--json", "--lengths", "3", "2"))["resolved"]
    assert (resolved["model"], resolved["device"]) == (str(decoder), "cpu")
    assert resolved["lengths"] == [2, 3] and len(resolved["sha256"]) == 64


def test_the_plot_marks_the_lengths_from_which_on_kinds_pay_and_says_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "bench_plot", lambda *args: drawn.append(args[3:]))
    runs = {("none", 10): 1.0, ("none", 90): 9.0, ("static", 10): 2.0, ("static", 90): 3.0}
    runs |= {("paged", 10): 0.5, ("paged", 90): 1.0}
    made = [
        timing.Cell(kind, n, [timing.TimedRun(s, 0.0, s, None, 9, None)])
        for (kind, n), s in runs.items()
    ]
    rows = [Row.of(cell, speedup, 0) for cell, speedup in timing.speedups(made)]
    pays = {"static": 31.6, "paged": 10.0}
    report = BenchReport(rows, pays, 1, 8, None, "default", Bandwidth((1e9,)), {}, 1.0, {})
    draw(report, Path("a.png"), "a model")
    said = "static pays from about 32 tokens on; paged pays from 10 tokens on, the fewest measured."
    title = "Time to generate, prompt of 8, batch of 1\na model"
    assert drawn == [({"static": 31.6}, said, title)]


# The speed of memory


def reading(
    *rates: float, own_caches: int | None, token_bytes: int = 4 * 2**30, token_s: float = 0.1
) -> str:
    """What is said of memory where a token of static reads so much in such a time."""
    run = timing.TimedRun(1.0, 0.5, 0.5, token_s, 9, token_bytes)
    row = Row.of(timing.Cell("static", 10, [run]), None, 0)
    return memory_text(
        BenchReport([row], {}, 1, 8, None, "default", Bandwidth(rates, own_caches), {}, 1.0)
    )


def test_the_processors_own_caches_explain_what_fits_into_them_and_nothing_else() -> None:
    steady, own = [9e9, 9.5e9, 10e9], 32 * 2**20
    fits = reading(*steady, own_caches=own, token_bytes=2**24, token_s=0.001)
    assert "What static reads faster than that has stayed in the processor's own caches (32" in fits
    large = reading(*steady, own_caches=own)
    assert "has stayed" not in large
    assert "own caches do not explain: they hold too little for that" in large
    unknown = reading(*steady, own_caches=None, token_bytes=2**24, token_s=0.001)
    assert "has stayed" not in unknown and "nobody says what they hold" in unknown


def test_a_part_that_stays_explains_no_more_than_a_part() -> None:
    """Of 48 MiB at twice the speed of memory 32 may have stayed, of 96 MiB not."""
    token_s = 2**20 / 20e9
    for size, explained in ((48, True), (96, False)):
        said = reading(
            10e9, own_caches=32 * 2**20, token_bytes=size * 2**20, token_s=size * token_s
        )
        assert ("has stayed" in said) is explained


def test_what_is_read_no_faster_than_memory_is_not_explained() -> None:
    assert reading(10e9, own_caches=1, token_s=1.0) == "Memory was read at 10.0 GB/s in this run."


def test_a_disturbed_reading_is_said() -> None:
    said = reading(10e9, 4e9, 5e9, own_caches=1, token_s=1.0)
    assert said.endswith("The reading was disturbed (4.0 to 10.0 GB/s), and may be too low.")
    assert "disturbed" not in reading(10e9, 9.9e9, 4e9, own_caches=1, token_s=1.0)


def test_caches_that_processors_share_count_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for processor in (0, 1, 2):
        for i, (kind, level, size, shared) in enumerate(
            [
                ("Data", "1", "32K", f"{processor}"),
                ("Instruction", "1", "32K", f"{processor}"),
                ("Unified", "2", "1024K", f"{processor}"),
                ("Unified", "3", "32768K", "0-2"),
            ]
        ):
            folder = tmp_path / f"cpu{processor}" / "cache" / f"index{i}"
            folder.mkdir(parents=True)
            facts = {"type": kind, "level": level, "size": size, "shared_cpu_list": shared}
            for name, value in facts.items():
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(traffic, "CACHES", tmp_path)
    monkeypatch.setattr(traffic.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    cpu = torch.device("cpu")
    assert traffic.own_caches(cpu) == (2 * (32 + 1024) + 32768) * 1024
    monkeypatch.setattr(traffic, "CACHES", tmp_path / "none")
    assert traffic.own_caches(cpu) is None
