"""bench against an earlier run: what is kept, what is comparable, and what is a regression."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_probe import Ran, refused
from kvtool.commands.bench.compare import FOLDER, Limit, compare, differences
from kvtool.core.bench import timing, traffic
from kvtool.errors import UsageError
from kvtool.ui import documents
from small_models import answer, save_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), n_layers=1)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that a run takes, by kind; nothing is run."""
    seconds = {"none": 2.0, "static": 1.0}

    def run(self: timing.Workload, kind: str, length: int) -> timing.TimedRun:
        return timing.TimedRun(seconds[kind], 0.0, seconds[kind], seconds[kind] / length, 8, 8)

    monkeypatch.setattr(timing.Workload, "run", run)
    return seconds


@pytest.fixture
def bench(
    kv: Callable[..., Ran], decoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Ran]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(traffic, "ARRAY_BYTES", 2**20)

    def call(*args: str) -> Ran:
        given = ["--model", str(decoder), "--threads", "1", "--device", "cpu", "--repeats", "3"]
        given += [] if "--lengths" in args else ["--lengths", "3"]
        given += [] if "--caches" in args else ["--caches", "none", "static"]
        return kv(*given, *args, command="bench")

    return call


def test_a_run_is_kept_as_its_document_and_found_by_name_and_by_path(
    bench: Callable[..., Ran], pace: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = itertools.count(1)
    monkeypatch.setattr(documents, "peak_memory", lambda: next(peaks))  # as it might be later
    ran = bench("--save", "quiet-day", "--json")
    path = FOLDER / "quiet-day.json"
    assert f"saved: {path}" in ran.err
    assert json.loads(path.read_text()) == answer(ran)
    pace["static"] = 1.5
    for name in ("quiet-day", str(path)):
        found = answer(bench("--compare", name, "--json"))
        assert [(c["cache"], c["before_s"], c["now_s"]) for c in found["changes"]] == [
            ("none", 2.0, 2.0),
            ("static", 1.0, 1.5),
        ]
    table = [line.split() for line in bench("--compare", "quiet-day").out.splitlines()]
    assert ["3", "static", "1,000.0", "1,500.0", "+50.0%"] in table


@pytest.mark.parametrize(
    ("limits", "slower", "code"),
    [
        (["median:10%"], 1.05, 0),
        (["median:10%"], 1.2, 1),
        (["min:0.1"], 1.05, 0),
        (["min:0.1"], 1.2, 1),
        (["median:50%", "max:10%"], 1.2, 1),
        (["mean:10%"], 0.5, 0),  # faster is no regression
        ([], 9.0, 0),
    ],
)
def test_a_row_that_is_slower_by_more_than_the_limit_is_exit_1(
    bench: Callable[..., Ran], pace: dict[str, float], limits: list[str], slower: float, code: int
) -> None:
    bench("--save", "before")
    pace["static"] *= slower
    given = [word for limit in limits for word in ("--fail-if", limit)]
    ran = bench("--compare", "before", *given)
    assert ran.code == code
    assert ("static at 3 tokens:" in ran.out) == bool(code)
    assert "none at 3 tokens" not in ran.out


def test_other_conditions_are_said_and_give_no_verdict_without_force(
    bench: Callable[..., Ran], pace: dict[str, float]
) -> None:
    bench("--save", "before")
    path = FOLDER / "before.json"
    content = json.loads(path.read_text())
    content["environment"]["cpu"], content["settings"]["run"]["dtype"] = "Abacus", "float16"
    path.write_text(json.dumps(content))
    said = "processor was Abacus and is "
    ran = bench("--compare", "before")
    assert ran.code == 0 and said in ran.err and "number format was float16" in ran.err
    assert said in refused(bench("--compare", "before", "--fail-if", "min:1%"))
    pace["static"] = 9.0
    assert bench("--compare", "before", "--fail-if", "min:1%", "--force").code == 1


def test_a_limit_that_no_row_could_be_held_against_is_exit_1(
    bench: Callable[..., Ran], pace: dict[str, float]
) -> None:
    bench("--save", "before")
    path = FOLDER / "before.json"
    path.write_text(path.read_text().replace('"length": 3', '"length": 4'))
    ran = bench("--compare", "before", "--fail-if", "min:1%")
    assert ran.code == 1 and "no row was measured both times" in ran.out


def row(**fields: Any) -> str:
    """A row of measurements as JSON."""
    return json.dumps({"length": 3, "cache": "none", "samples_s": [2.0], **fields})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("3", "they are no list of up to 100,000 rows"),
        (f"[{', '.join(['1'] * 100_001)}]", "they are no list of up to 100,000 rows"),
        ("[3]", "row 1 is no object"),
        ("[{}]", "'length' is missing"),
        ('[{"length": 3, "cache": "none"}]', "'samples_s' is missing"),
        (f"[{row()}, {row(length=4)}, {row()}]", "row 3, 'none' at 3, is there twice"),
        (f"[{row()}, {row(impl='kvtool')}]", "row 2, 'none' at 3, is there twice"),
        (f"[{row(length=3.0)}]", "(3.0, 'kvtool', 'none') is no length, implementation and kind"),
        (f"[{row(length=True)}]", "(True, 'kvtool', 'none') is no length"),
        (f"[{row(length=0)}]", "(0, 'kvtool', 'none') is no length"),
        (f"[{row(cache=None)}]", "(3, 'kvtool', None) is no length"),
        (f"[{row(impl=[1])}]", "(3, [1], 'none') is no length"),
        (f"[{row(samples_s=2.0)}]", "the samples of row 1, 'none' at 3 are no list of up to"),
        (f"[{row(samples_s=[2.0, 0])}]", "row 1, 'none' at 3, has a sample of 0 s"),
        (f"[{row(samples_s=[-1.5])}]", "row 1, 'none' at 3, has a sample of -1.5 s"),
        (f"[{row(samples_s=[True])}]", "row 1, 'none' at 3, has a sample of True s"),
        (f"[{row(samples_s=['2.0'])}]", "row 1, 'none' at 3, has a sample of '2.0' s"),
        (f"[{row(samples_s=[1e300])}]", "row 1, 'none' at 3, has a sample of 1e+300 s"),
        (f"[{row(samples_s=[float('nan')])}]", "is not valid JSON (NaN is no JSON number)"),
        (f"[{row(samples_s=[float('inf')])}]", "is not valid JSON (Infinity is no JSON number)"),
        (f"[{row().replace('2.0', '1e999')}]", "is not valid JSON (1e999 is beyond every"),
        (f"[{row().replace('{', '{' + chr(34) + 'length' + chr(34) + ': 9, ')}]", "length occurs"),
        ("[" * 100_000, "is not valid JSON (it is nested too deeply)"),
        (f"[{row().replace('2.0', '9' * 5000)}]", "is a number of 5,000 digits"),
    ],
)
@pytest.mark.parametrize("limit", [[], ["--fail-if", "min:10%"]], ids=["shown", "judged"])
def test_a_baseline_that_bench_cannot_have_written_is_refused(
    bench: Callable[..., Ran], pace: dict[str, float], rows: str, message: str, limit: list[str]
) -> None:
    path = Path("other.json")
    path.write_text(f'{{"schema": "kvtool.bench/1", "measurements": {rows}}}')
    found = refused(bench("--compare", str(path), *limit))
    assert found.startswith("other.json: ") and message in found


def test_what_a_baseline_says_of_its_conditions_is_cut_where_it_would_flood(
    bench: Callable[..., Ran], pace: dict[str, float]
) -> None:
    bench("--save", "before")
    path = FOLDER / "before.json"
    content = json.loads(path.read_text())
    content["environment"]["cpu"] = "x" * 10**5
    path.write_text(json.dumps(content))
    ran = bench("--compare", "before")
    assert ran.code == 0 and f"processor was {'x' * 80}... and is" in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--compare zzz", "--compare zzz: not found. Save a run with --save."),
        ("--compare damaged", ".benchmarks/kvtool/damaged.json: is not valid JSON"),
        ("--compare other", ".benchmarks/kvtool/other.json: is not a run of bench (schema 'x/1'"),
        ("--compare rows", ".benchmarks/kvtool/rows.json: its measurements are damaged"),
        ("--save a/b", "--save: 'a/b' is not a name"),
        ("--fail-if min:1%", "--fail-if: needs a run to compare with"),
        ("--force", "--force: needs a run to compare with"),
        ("--compare rows --fail-if fast", "--fail-if: 'fast' is not a limit"),
        ("--compare rows --fail-if min:-1", "--fail-if: 'min:-1' is not a limit"),
        ("--compare rows --fail-if width:1%", "--fail-if: 'width:1%' is not a limit"),
    ],
)
def test_a_baseline_or_limit_that_means_nothing_is_exit_2(
    bench: Callable[..., Ran], pace: dict[str, float], words: str, message: str
) -> None:
    FOLDER.mkdir(parents=True)
    (FOLDER / "damaged.json").write_text('{"schema": ')
    (FOLDER / "other.json").write_text('{"schema": "x/1"}')
    (FOLDER / "rows.json").write_text('{"schema": "kvtool.bench/1", "measurements": [3]}')
    assert refused(bench(*words.split())).startswith(message)


def test_a_folder_that_cannot_be_made_is_exit_2_before_anything_runs(
    bench: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.Workload, "run", None)  # calling it would fail
    FOLDER.parent.touch()
    assert refused(bench("--save", "a")).startswith(".benchmarks: cannot be made (")


def test_limits_are_read_as_pytest_benchmark_writes_them() -> None:
    assert Limit.parse("median:10%") == Limit("median", 10.0, True)
    assert Limit.parse("min:0.25") == Limit("min", 0.25, False)
    with pytest.raises(UsageError):
        Limit.parse("median")


def test_what_is_missing_from_a_baseline_differs() -> None:
    facts: dict[str, Any] = {"environment": {"cpu": "A", "threads": 2}, "depth": None}
    assert differences(facts, facts) == []
    assert differences({"environment": {"cpu": "A"}}, facts) == ["threads was None and is 2"]


def test_rows_that_one_run_did_not_measure_are_left_out() -> None:
    before = {"measurements": [{"length": 1, "cache": "none", "samples_s": []}]}
    now = [{"length": 1, "cache": "none", "samples_s": [1.0]}]
    found = compare(before, {"measurements": now}, ())
    assert (found.changes, found.not_in_baseline) == ([], ["none at 1 token: not in the baseline"])
    found = compare({"measurements": now}, before, ())
    assert found.changes == found.regressions == []
    assert found.not_measured_now == ["none at 1 token: in the baseline, not measured now"]


def test_a_row_of_the_baseline_that_is_not_measured_now_is_no_pass(
    bench: Callable[..., Ran], pace: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench("--save", "before")
    monkeypatch.setattr(
        timing.Measurement,
        "run",
        lambda self, *_: [self._time(c) for c in self.cells if c.cache == "static"],
    )
    said = "none at 3 tokens: in the baseline, not measured now"
    ran = bench("--compare", "before")
    assert ran.code == 0 and f"! {said}\n" in ran.out
    ran = bench("--compare", "before", "--fail-if", "median:900%")
    assert ran.code == 1 and ran.out.count(said) == 1 and f"✗ {said}\n" in ran.out
    found = bench("--compare", "before", "--fail-if", "median:900%", "--caches", "static")
    assert found.code == 0  # another kind was not asked for


def test_a_row_that_the_baseline_has_not_is_named(
    bench: Callable[..., Ran], pace: dict[str, float]
) -> None:
    bench("--save", "before")
    ran = bench("--compare", "before", "--lengths", "3", "5", "--fail-if", "median:10%")
    assert ran.code == 0 and "! static at 5 tokens: not in the baseline\n" in ran.out


def test_a_pass_is_said_with_its_limits_in_every_format(
    bench: Callable[..., Ran], pace: dict[str, float], tmp_path: Path
) -> None:
    bench("--save", "before")
    limits = ["--fail-if", "median:10%", "--fail-if", "min:0.5"]
    ran = bench("--compare", "before", *limits, "--output", str(tmp_path / "pass.md"))
    said = "✓ no row is slower than before by more than 10 % (median) or 0.5 s (min)"
    assert ran.out.splitlines()[-1] == said
    assert (tmp_path / "pass.md").read_text().endswith(f" {said}.\n")
    pace["static"] = 1.2
    ran = bench("--compare", "before", *limits, "--output", str(tmp_path / "fail.md"))
    written = (tmp_path / "fail.md").read_text()
    why = "static at 3 tokens: median 1,000.0 -> 1,200.0 ms (+20%), beyond the limit of 10 %"
    assert ran.code == 1 and written.endswith(f" ✗ {why} (median).\n")
    assert "\n## Medians against before\n" in written
    assert "\n| 3 | kvtool | static | 1 | 1.2 | +20.0% |\n" in written


def test_a_run_that_is_slower_than_allowed_is_drawn_all_the_same(
    bench: Callable[..., Ran], pace: dict[str, float], tmp_path: Path
) -> None:
    bench("--save", "before")
    pace["static"] = 9.0
    words = ["--fail-if", "median:1%", "--plot", "slow.svg"]
    assert bench("--compare", "before", *words).code == 1
    assert (tmp_path / "slow.svg").exists()


@pytest.mark.parametrize("link", [".benchmarks", ".benchmarks/kvtool", ".benchmarks/kvtool/x.json"])
def test_a_kept_run_is_not_reached_through_a_link(
    bench: Callable[..., Ran], tmp_path: Path, link: str
) -> None:
    """One may stand in a folder that somebody handed over."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.json").write_text("mine")
    target = other if link != ".benchmarks/kvtool/x.json" else other / "x.json"
    Path(link).parent.mkdir(parents=True, exist_ok=True)
    Path(link).symlink_to(target)
    for flag in ("--save", "--compare"):
        if link == ".benchmarks" and flag == "--compare":
            (other / "kvtool").mkdir()
            (other / "kvtool" / "x.json").write_text("{}")
        assert refused(bench(flag, "x")).startswith(f"{link}: is a link (expected a f")
    assert (other / "x.json").read_text() == "mine"


def test_a_fifo_is_no_kept_run(bench: Callable[..., Ran]) -> None:
    FOLDER.mkdir(parents=True)
    os.mkfifo(FOLDER / "x.json")
    for flag in ("--save", "--compare"):
        assert "neither a file nor a folder" in refused(bench(flag, "x"))
