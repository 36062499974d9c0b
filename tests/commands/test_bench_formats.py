"""kvtool bench's CSV and Markdown: a row for every cell, and what it was measured with."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

import bench_cases
from cli_probe import Ran

decoder, small_array, bench = bench_cases.decoder, bench_cases.small_array, bench_cases.bench


def test_the_reports_have_a_row_for_every_cell(bench: Callable[..., Ran], tmp_path: Path) -> None:
    for name in ("rows.csv", "rows.md"):
        ran = bench("-q", "--output", str(tmp_path / name))
        assert (ran.code, ran.err) == (0, "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert [row["cache"] for row in rows] == ["none", "dynamic", "static"]
    assert [row["samples"] for row in rows] == ["2"] * 3
    written = (tmp_path / "rows.md").read_text()
    assert written.count("\n| ") == 2 + 3 and "samples_s" not in written
    assert written.splitlines()[-1].startswith("dynamic ") or "pay" in written.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "length", "said"),
    [("", "4", "prompt length 4"), ("--depth 5 --prompt-length 9", "", "depth 5")],
)
def test_every_format_names_the_load(
    bench: Callable[..., Ran], tmp_path: Path, words: str, length: str, said: str
) -> None:
    given = ["--batch-size", "2", "--kernels", "exact", "--seed", "7", "--repeats", "1"]
    given += [*words.split(), "--caches", "none", "paged:page=4", "int8"]
    for name in ("rows.csv", "rows.md"):
        assert bench("-q", *given, "--output", str(tmp_path / name)).code == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    for row in rows:
        assert (row["batch_size"], row["kernels"], row["seed"]) == ("2", "exact", "7")
        assert (row["prompt_length"], row["depth"]) == (length, "" if length else "5")
    own = [row["cache_settings"] for row in rows]
    assert own == ["", "paged: page 4", "int8: group 32, residual 32"]
    written = (tmp_path / "rows.md").read_text()
    assert f"; batch size 2, {said}, kernels exact, seed 7\n" in written
    assert f"({rows[0]['sha256']})" in written and len(rows[0]["sha256"]) == 64


def test_a_table_of_kinds_without_settings_has_the_same_columns(
    bench: Callable[..., Ran], tmp_path: Path
) -> None:
    heads = []
    for kinds in (["none"], ["none", "paged"]):
        bench("-q", "--caches", *kinds, "--repeats", "1", "--output", str(tmp_path / "rows.csv"))
        heads.append((tmp_path / "rows.csv").read_text().splitlines()[0])
    assert heads[0] == heads[1] and heads[0].endswith(",cache_settings")
