"""The saved baselines: complete, found on every machine, free of private things, and plausible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.logger import Logger
from pytest_benchmark.stats import Stats
from pytest_benchmark.storage.file import FileStorage

from kvtool import registry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "baselines"
PATHS = sorted(FOLDER.glob("*.json"))  # not what --benchmark-save adds in a machine's own folder
ADVICE = "run `make baseline`"


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def baseline(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def suite() -> set[str]:
    """The ids of all benchmarks there are now, but those for a GPU, which a baseline's machine has
    not."""
    command = [sys.executable, "-m", "pytest", "tests/benchmarks", "--collect-only", "-q"]
    env = {**os.environ, "PYTEST_ADDOPTS": ""}
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return {x for x in ran.stdout.splitlines() if "::" in x and "test_bench_cuda" not in x}


def of_caches(baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """The benchmarks of models with caches; those of single layers have no kind and no length."""
    return [b for b in baseline["benchmarks"] if "test_bench_native" not in b["fullname"]]


def speedups(baseline: dict[str, Any]) -> dict[str, list[float]]:
    """For each benchmark and kind, the time of no cache over its own, by increasing length.

    Of the fastest rounds, which other work on the machine disturbed least.
    """
    fastest: dict[tuple[str, int, str], float] = {}
    for bench in of_caches(baseline):
        name, info = bench["fullname"].partition("[")[0], bench["extra_info"]
        fastest[name, info["length"], info["kind"]] = bench["stats"]["min"]
    found = defaultdict(list)
    for name, length, kind in sorted(fastest):
        if kind != "none" and (name, length, "none") in fastest:
            ratio = fastest[name, length, "none"] / fastest[name, length, kind]
            found[f"{kind}: {name}"].append(ratio)
    return found


def texts(value: Any) -> Iterator[str]:
    """Every text within a document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def test_another_machine_finds_the_baseline_to_compare_with() -> None:
    storage = FileStorage(FOLDER, Logger(), default_machine_id="Plan9-PyPy-4.2-128bit")
    assert [str(path) for path, _ in storage.load()] == [path.name for path in PATHS]
    assert "0001_baseline.json" in {path.name for path in PATHS}, ADVICE


def test_a_baseline_is_what_pytest_benchmark_writes(baseline: dict[str, Any]) -> None:
    top = {"machine_info", "commit_info", "benchmarks", "datetime", "version"}
    keys = {"group", "name", "fullname", "params", "param", "extra_info", "options", "stats"}
    assert baseline.keys() == top
    for bench in baseline["benchmarks"]:
        stats = bench["stats"]
        assert bench.keys() == keys
        assert stats.keys() == {*Stats.fields, "iterations"}
        assert 0 < stats["min"] <= stats["q1"] <= stats["median"] <= stats["q3"] <= stats["max"]
        assert stats["rounds"] > 0


def test_a_baseline_says_what_each_benchmark_measured(baseline: dict[str, Any]) -> None:
    for bench in of_caches(baseline):
        info = bench["extra_info"]
        assert {"kind", "length", "tokens"} <= info.keys()
        assert info["length"] >= info["tokens"] >= 1
        assert info["kind"] in bench["param"]


def test_every_benchmark_is_in_a_baseline(baseline: dict[str, Any], suite: set[str]) -> None:
    missing = suite - {bench["fullname"] for bench in baseline["benchmarks"]}
    assert len(suite) > 20
    assert not missing, f"no timings of {', '.join(sorted(missing))}: {ADVICE}"


def test_every_kind_of_cache_is_in_a_baseline(baseline: dict[str, Any]) -> None:
    found = {bench["extra_info"]["kind"] for bench in of_caches(baseline)}
    assert not registry.CACHES.keys() - found, ADVICE


def test_a_baseline_tells_nothing_private(path: Path, baseline: dict[str, Any]) -> None:
    machine = {"machine", "system", "python_implementation", "python_version", "cpu", "torch"}
    assert baseline["machine_info"].keys() == machine
    assert baseline["machine_info"]["cpu"].keys() == {"brand_raw", "arch", "count"}
    assert baseline["commit_info"].keys() <= {"id", "time", "dirty"}
    assert [text for text in texts(baseline) if text.startswith(("/", "~")) or "\\" in text] == []
    assert path.stat().st_size < 300_000


def test_a_cache_buys_more_the_longer_the_text(baseline: dict[str, Any]) -> None:
    """Ratios of times taken in one run, in a file that does not change."""
    found = speedups(baseline)
    kinds = len(registry.CACHES) - 1
    assert len(found) == 2 * kinds, ADVICE  # a step, and a generation, of each
    for name, ratios in found.items():
        told = f"{name}: {ratios}; on a quiet machine, {ADVICE}"
        assert len(ratios) >= 4, told
        assert all(b > 0.8 * a for a, b in pairwise(ratios)), told
        assert ratios[-1] > max(2, 1.5 * ratios[0]), told
