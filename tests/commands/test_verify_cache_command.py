"""kvtool verify-cache, as a user meets it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import verify_cache_cases
from cli_probe import Ran, refused
from kvtool.commands.verify.report import CacheReport, Row
from kvtool.commands.verify.show import table
from kvtool.core.verify.check import Checked
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.judge import Finding
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.registry import CACHES, KERNELS
from kvtool.ui.tables import build_table
from small_models import (
    answer,
    explains_every_option,
    save_decoder,
)

decoder, seq2seq, check = (
    verify_cache_cases.decoder,
    verify_cache_cases.seq2seq,
    verify_cache_cases.check,
)


# What it says


def test_right_caches_get_exit_0_and_a_sentence(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ran = check("--scenarios", "decode")
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines() if " of 8 " in line or " of 9 " in line]
    assert [row[:2] for row in rows] == [
        *([kind, kernels] for kind in CACHES for kernels in KERNELS),
        ["planted", "bug"],
    ]
    assert "; the planted bug was found" in ran.out.splitlines()[-1]


def test_exact_kernels_are_identical_in_every_scenario(check: Callable[..., Ran]) -> None:
    ran = check("--caches", "dynamic", "static", "--kernels", "exact")
    assert ran.code == 0
    steps = re.search(r"✓ exact kernels: (\d+) of (\d+) steps identical, bit for bit", ran.out)
    assert steps is not None and steps[1] == steps[2]
    found = answer(check("--json", "--caches", "dynamic", "static", "--kernels", "exact"))
    verdicts = {row["verdict"] for row in found["checks"]}
    assert verdicts == {"identical", "unsupported"}
    assert {row["max_ulp"] for row in found["checks"]} == {0.0}


def test_rows_that_came_out_alike_are_one_line_unless_v_is_given(check: Callable[..., Ran]) -> None:
    options = ("--caches", "static", "--kernels", "default")
    short, long = check(*options), check(*options, "-v")
    assert short.code == long.code == 0
    assert "more" in short.out and "permuted" not in short.out
    assert all(name in long.out for name in SCENARIOS)


def test_scenarios_are_listed_and_misspelt_ones_are_corrected(check: Callable[..., Ran]) -> None:
    ran = check("--scenarios", "help")
    assert ran.code == 0
    assert all(name in ran.out for name in SCENARIOS)
    message = refused(check("--scenarios", "cropp"))
    assert message.startswith("--scenarios: 'cropp' is not known")
    assert message.endswith("Did you mean crop?")


def test_a_scenario_beyond_the_context_is_unsupported_and_not_an_error(
    kv: Callable[..., Ran], tmp_path: Path
) -> None:
    model = str(save_decoder(tmp_path / "short", context=20))
    given = ("--model", model, "--prompt", "ab", "--tokens", "4", "--caches", "static", "--json")
    ran = kv(*given, command="verify-cache")
    rows = {row["scenario"]: row for row in answer(ran)["checks"] if row["cache"] == "static"}
    assert rows["decode"]["right"]
    assert rows["chunks"]["verdict"] == "unsupported"
    assert rows["chunks"]["evidence"].endswith("tokens of context (the model holds 20)")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_is_judged(check: Callable[..., Ran], dtype: str) -> None:
    found = answer(check("--dtype", dtype, "--json", "--scenarios", "decode", "crop"))
    assert found["dtype"] == found["settings"]["run"]["dtype"] == dtype
    verdicts = {(row["cache"], row["verdict"]) for row in found["checks"]}
    assert {verdict for cache, verdict in verdicts if cache == "none"} == {"no cache"}
    assert {verdict for cache, verdict in verdicts if cache != "none"} <= {"identical", "rounding"}
    assert found["control"]["verdict"] == "bug"


def test_an_encoder_decoder_is_judged_from_a_source(
    check: Callable[..., Ran], seq2seq: str
) -> None:
    words = ["--prompt", "jail", "--scenarios", "decode", "permuted", "two-sources"]
    found = answer(check("--json", *words, model=seq2seq))
    assert found["prompt_tokens"] == 4
    assert all(row["right"] for row in found["checks"] if row["verdict"] in ("bug", "error"))
    sources = [row for row in found["checks"] if row["scenario"] == "two-sources"]
    exact = [row for row in sources if row["kernels"] == "exact"]
    assert {row["cache"] for row in exact if row["verdict"] == "identical"} == set(CACHES) - {
        "none"
    }
    assert found["control"]["first_wrong_step"] == 1


def test_without_a_prompt_there_is_one_that_suits_the_model(
    kv: Callable[..., Ran], decoder: str, seq2seq: str
) -> None:
    for model in (decoder, seq2seq):
        given = ("--model", model, "--tokens", "4", "--caches", "static", "--scenarios", "decode")
        assert answer(kv(*given, "--json", command="verify-cache"))["prompt_tokens"] > 1


def test_the_document_and_the_table_hold_the_same_rows(
    check: Callable[..., Ran], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    found = answer(check("--json", "--output", str(path), "--scenarios", "decode", "fork"))
    assert found["schema"] == "kvtool.verify-cache/1"
    assert found["exit_code"] == 0
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert len(rows) == len(CACHES) * len(KERNELS) * 2  # the planted bug is no result
    assert [int(row["identical_steps"]) for row in rows] == [
        row["identical_steps"] for row in found["checks"]
    ]
    assert found["control"]["verdict"] == "bug"


def test_markdown_has_a_line_for_every_cache(check: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "rows.md"
    assert check("-q", "--output", str(path), "--scenarios", "decode").err == ""
    lines = path.read_text().splitlines()
    assert lines[0] == "# kvtool verify-cache"
    assert sum(line.startswith("| ") for line in lines) == 2 + len(CACHES) * len(KERNELS)
    assert "planted bug" not in "".join(lines[:-1])
    assert lines[-1].endswith("the planted bug was found")


@pytest.mark.parametrize("columns", [80, 60])
def test_the_table_fits_the_terminal(
    check: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = check("--scenarios", "decode", "crop", "chunks").out.splitlines()
    assert max(len(line.rstrip()) for line in lines[:-1]) <= columns
    assert any("bug, step 1" in line for line in lines)
    left_out = {80: "(no room for max ULP)", 60: "(no room for identical steps, max ULP)"}
    assert left_out[columns] in lines
    assert sum("kernels" in line and "verdict" in line for line in lines) == 1


def test_a_long_table_has_its_heading_again(check: Callable[..., Ran]) -> None:
    long = check("-v", "--caches", "static", "sliding").out.splitlines()
    assert sum(line.startswith("cache ") for line in long) > 1


GAPS = ("gap", "gap_float64", "gap_promoted")


def judged(verdict: str, scenario: str, cache: str, kernels: str, step: int | None = None) -> Row:
    """A row with evidence of every precision, and a figure of its own in each."""
    gaps = [Gap(25, 1, 1, float(f"{n}.4e-0{n}"), 4e5) for n in (1, 2, 3)]
    finding = Finding(scenario, verdict, "why", *gaps, first_wrong=step, lossy=step is not None)
    return Row.of(Checked(cache, kernels, True, finding))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("columns", [96, 80, 60])
@pytest.mark.parametrize("kinds", [["my_decoder.py:build"], ["dynamic", "sliding:window=5"]])
def test_what_decides_a_verdict_is_shown_at_every_width(
    kinds: list[str], columns: int, verbose: bool, dtype: str
) -> None:
    kernels = ["own"] if len(kinds) == 1 else ["default", "exact"]
    rows = [
        judged(verdict, scenario, kind, name, step)
        for kind in kinds
        for name in kernels
        for verdict, scenario, step in (
            ("precision", "one-then-chunks", 12),
            ("bug", "token-by-token", 3),
            ("rounding", "crop", None),
        )
    ]  # fmt: skip
    control = judged("bug", "decode", "planted bug", kernels[0], 1)
    report = CacheReport(rows, control, 11, dtype, verbose=verbose)
    console = Console(width=columns, file=io.StringIO(), highlight=False)
    for part in build_table(*table(report), columns):
        console.print(part)
    shown = console.file.getvalue()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= columns
    for digit, name in zip("123", GAPS, strict=True):
        figures = re.findall(rf"\b{digit}(?:\.4e-0|e-){digit}\b", shown)
        assert len(figures) == len(rows) + 1, f"{name} of {len(rows) + 1} rows:\n{shown}"
    assert "planted" in shown and "precision, step" in shown
    for note in re.findall(r"\(no room for (.*)\)", shown):
        assert set(note.split(", ")) <= {"identical steps", "max ULP"}


def test_seven_columns_of_a_target_fit_into_80(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Path(__file__).parents[2] / "docs" / "my_decoder.py"
    widest = sorted(SCENARIOS, key=len)[-2:]
    given = ("--target", f"{target}:build", "--tokens", "8", "--scenarios", "decode", *widest)
    for columns, head in (
        (80, ["identical gap", "scenario verdict steps max ULP float32 float64 promoted"]),
        (60, ["identical gap", "scenario verdict steps f32 f64 prom."]),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = [
            " ".join(line.split()) for line in kv(*given, command="verify-cache").out.splitlines()
        ]
        assert lines[0].startswith("Cached against uncached logits, the same tokens fed")
        assert "my_decoder.py:build, own kernels" in " ".join(lines[:2])
        assert [line for line in lines if line in head] == head
        assert sum(line.startswith("planted bug bug, step 1 ") for line in lines) == 1


def test_the_gap_by_step_is_drawn(check: Callable[..., Ran], tmp_path: Path) -> None:
    path = tmp_path / "gap.png"
    ran = check("--plot", str(path), "--scenarios", "decode")
    assert ran.code == 0 and f"plot: {path}" in ran.err
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_help_explains_every_option(
    kv: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert explains_every_option(kv("-h", command="verify-cache"), "verify-cache")


def test_the_conclusion_names_the_worst_and_counts_the_rest() -> None:
    right = row_of("static", "identical", identical=8)
    wrong = row_of("dynamic", "bug", identical=1)
    control = row_of("planted bug", "bug", identical=1)
    report = CacheReport([right, wrong, replace(wrong, scenario="crop")], control, 3, "float32")
    assert report.conclusion == "dynamic: bug, step 1 in decode and 1 more"
    assert report.exit_code == 1
    report = CacheReport([right], control, 3, "float32")
    assert report.conclusion.startswith("default kernels: 8 of 8 steps identical, bit for bit")
    assert report.exit_code == 0


def row_of(cache: str, verdict: str, identical: int) -> Row:
    wrong = 1 if verdict == "bug" else None
    gap = Gap(8, identical, wrong, 0.1 if wrong else 0.0, 9e5 if wrong else 0.0)
    finding = Finding("decode", verdict, working=gap, float64=gap, first_wrong=wrong)
    return Row.of(Checked(cache, "default", True, finding))


def test_a_step_of_lost_precision_fits_the_table() -> None:
    lost = replace(row_of("static", "bug", identical=1), verdict="precision", first_wrong_step=123)
    assert lost.verdict_text() == lost.verdict_text(short=True) == "precision, step 123"


def test_the_document_names_what_was_left_open(check: Callable[..., Ran], decoder: str) -> None:
    resolved = answer(check("--json", "--caches", "static", "--kernels", "default"))["resolved"]
    assert (resolved["model"], resolved["device"]) == (decoder, "cpu")
    assert resolved["scenarios"] == list(SCENARIOS) and len(resolved["sha256"]) == 64
