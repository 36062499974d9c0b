"""verify-cache --impl transformers --sweep: every model type, each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from cli_probe import HANGS, Ran, refused
from kvtool.core.verify import sweep
from kvtool.core.verify.check import Checked
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.judge import Finding
from kvtool.core.verify.sweep import Swept, Task, append_result, judge_type, read_results
from kvtool.core.verify.sweep_worker import judge, summary
from kvtool.errors import FileError

RIGHT = Swept("gpt2", "rounding", True, gap=2e-7, gap_float64=5e-16, seconds=1.5)
BUGGY = Swept("mamba", "bug", False, "dynamic in chunks: the gap stays", 3e-2, 3e-2, 3e-2)
ABSENT = Swept("gemma3n", "not built", False, "could not build (ImportError: timm)")
DIFFERS = Gap(8, 1, 1, 1e-7, 4.0)


def finding(verdict: str, scenario: str = "decode", cache: str = "dynamic") -> Checked:
    gap = None if verdict == "unsupported" else DIFFERS
    return Checked(cache, "own", True, Finding(scenario, verdict, f"why {verdict}", gap))


CONTROL = finding("bug", cache="planted bug")


def task(name: str, **changes: Any) -> Task:
    return Task(name, ("dynamic",), ("decode", "chunks"), 8, 0, **changes)


# What the findings of a type come to


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (("identical", "rounding"), "rounding"),
        (("rounding", "precision"), "precision"),
        (("rounding", "unsupported"), "rounding"),
        (("rounding", "bug"), "bug"),
        (("error", "bug"), "bug"),
        (("bug", "not-causal"), "not-causal"),
        (("rounding", "vacuous"), "rounding"),
    ],
)
def test_a_type_comes_to_its_worst_verdict(verdicts: tuple[str, ...], expected: str) -> None:
    found = summary("some", [*(finding(v, f"s{i}") for i, v in enumerate(verdicts)), CONTROL])
    assert found.verdict == expected
    assert found.right == (expected in ("rounding", "precision"))


def test_a_bug_is_told_with_the_caches_and_scenarios_that_have_it() -> None:
    cases = [finding("rounding"), finding("bug", "chunks"), finding("bug", "growth", "static")]
    found = summary("some", [*cases, CONTROL], note="built with is_decoder=True")
    assert found.reason == (
        "built with is_decoder=True; dynamic, static in chunks, growth: why bug"
    )
    assert found.by_cache == {"dynamic": "bug", "static": "bug"}


def test_a_type_without_a_cache_is_unsupported_with_the_reason() -> None:
    found = summary("some", [finding("unsupported", "all")])
    assert (found.verdict, found.right, found.reason) == ("unsupported", False, "why unsupported")


def test_a_check_that_misses_the_planted_bug_proves_nothing() -> None:
    found = summary("some", [finding("rounding"), finding("rounding", cache="planted bug")])
    assert (found.verdict, found.right) == ("error", False)
    assert "planted" in found.reason


def test_a_type_is_judged_with_every_cache_asked_for() -> None:
    found = judge(Task("gpt2", ("dynamic", "quantized", "own"), ("decode",), 8, 0))
    assert (found.verdict, found.right) == ("rounding", True)
    assert found.by_cache == {"dynamic": "rounding", "quantized": "rounding", "own": "unsupported"}
    assert found.gap_float64 is not None and found.gap_float64 < 1e-14 < (found.gap or 0.0)


def test_a_bug_of_a_model_is_located(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cache_utils import DynamicLayer

    monkeypatch.setattr(DynamicLayer, "reorder_cache", lambda self, rows: None)
    found = judge(Task("llama", ("dynamic",), ("decode", "permuted"), 8, 0))
    assert found.verdict == "bug" and "dynamic in permuted" in found.reason
    assert "layer 0" in found.reason


# Processes


def test_a_type_is_judged_in_a_process_that_may_run_out_of_memory_and_of_time() -> None:
    found = judge_type(task("gpt2"), HANGS)
    assert (found.type, found.verdict, found.right) == ("gpt2", "rounding", True)
    starved = judge_type(task("gpt2", memory=1 << 20), HANGS)
    assert (starved.right, starved.judged) == (False, False)
    both = judge_type(task("marian", kind="seq2seq"), HANGS)
    assert (both.type, both.kind, both.verdict) == ("marian", "seq2seq", "rounding")
    late = judge_type(task("gpt2"), 0.0)
    assert (late.verdict, late.reason) == ("error", "took longer than 0 s")


# Results that are kept


def test_what_a_file_of_results_has_is_not_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.jsonl"
    append_result(path, RIGHT)
    asked = []

    def judged(given: Task, seconds: float) -> Swept:
        asked.append(given.type)
        return BUGGY

    monkeypatch.setattr(sweep, "judge_type", judged)
    tasks = [task("gpt2"), task("mamba")]
    assert list(sweep.sweep(tasks, 60.0, path)) == [RIGHT, BUGGY]
    assert asked == ["mamba"]
    assert list(read_results(path).values()) == [RIGHT, BUGGY]


def test_a_type_that_is_both_kinds_of_model_has_a_result_of_each(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    decoder = Swept("bart", "rounding", True)
    whole = Swept("bart", "bug", False, kind="seq2seq")
    append_result(path, decoder)
    append_result(path, whole)
    tasks = [task("bart", kind=kind) for kind in ("seq2seq", "causal")]
    assert list(sweep.sweep(tasks, 60.0, path)) == [whole, decoder]


def test_a_result_that_says_no_kind_is_of_a_causal_model(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    path.write_text('{"type": "gpt2", "verdict": "rounding", "right": true}\n')
    assert list(read_results(path)) == [("gpt2", "causal")]


def test_a_line_that_was_cut_off_is_judged_again_and_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    append_result(path, RIGHT)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert list(read_results(path)) == [("gpt2", "causal")]
    append_result(path, BUGGY)
    assert list(read_results(path).values()) == [RIGHT, BUGGY]
    append_result(path, ABSENT)
    assert len(read_results(path)) == 3


def test_a_file_that_no_sweep_wrote_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for data in (b"something else\nand more\n", b"something else", b"\xff\xfe\n"):
        path.write_bytes(data)
        with pytest.raises(FileError, match=r"--resume .*: line 1 is no result of a sweep"):
            list(sweep.sweep([task("gpt2")], 60.0, path))
        assert path.read_bytes() == data
    with pytest.raises(FileError, match=rf"^--resume {tmp_path}: is a folder"):
        list(sweep.sweep([task("gpt2")], 60.0, tmp_path))


# The command; all results are known, so that no process starts


@pytest.fixture
def swept(kv: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    path = tmp_path / "sweep.jsonl"
    for known in (RIGHT, BUGGY, ABSENT):
        append_result(path, known)

    def call(*args: str) -> Ran:
        given = ["--impl", "transformers", "--sweep", "--resume", str(path)]
        return kv(*given, *args, command="verify-cache")

    return call


def test_a_sweep_lists_its_types_and_counts_its_verdicts(swept: Callable[..., Ran]) -> None:
    ran = swept("--types", "gpt2", "mamba", "gemma3n")
    assert ran.code == 1  # there is a bug
    said = " ".join(ran.out.split())
    assert "3 causal language models, 2 judged: 1 rounding, 1 bug, 1 not built" in said


def test_encoder_decoders_have_a_table_and_counts_of_their_own(
    swept: Callable[..., Ran], tmp_path: Path
) -> None:
    for known in (
        Swept("bart", "rounding", True),
        Swept("bart", "precision", True, kind="seq2seq"),
    ):
        append_result(tmp_path / "sweep.jsonl", known)
    ran = swept("--types", "gpt2", "bart")
    said = " ".join(ran.out.split())
    assert "2 causal language models, 2 judged: 2 rounding; 1 encoder-decoders, 1 judged" in said
    tables = ran.out.split("tiny random encoder-decoders")
    assert "gpt2" in tables[0] and "gpt2" not in tables[1].split("transformers ")[0]
    report = json.loads(swept("--types", "gpt2", "bart", "--json").out)
    assert report["counts"] == {"rounding": 2, "precision": 1}
    by_kind = {"causal": {"rounding": 2}, "seq2seq": {"precision": 1}}
    assert report["counts_by_kind"] == by_kind
    kinds = [(swept["type"], swept["kind"]) for swept in report["types"]]
    assert kinds == [("gpt2", "causal"), ("bart", "causal"), ("bart", "seq2seq")]


def test_a_sweep_without_a_bug_exits_0_and_one_that_judged_nothing_1(
    swept: Callable[..., Ran],
) -> None:
    assert swept("--types", "gpt2", "gemma3n").code == 0
    assert swept("--types", "gemma3n").code == 1


def test_a_sweep_as_json_has_every_figure(swept: Callable[..., Ran]) -> None:
    report = json.loads(swept("--types", "gpt2", "mamba", "--json").out)
    assert report["schema"] == "kvtool.verify-cache.sweep/1"
    assert report["counts"] == {"rounding": 1, "bug": 1}
    first = report["types"][0]
    assert (first["type"], first["gap_float64"], first["seconds"]) == ("gpt2", 5e-16, 1.5)
    assert report["settings"]["time_limit"] == 60.0 and report["resolved"]["caches"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--types", "lama"), "--types: 'lama' is not known"),
        (("--model", "gpt2"), "--model: contradicts --impl transformers --sweep"),
        (("--time-limit", "0"), "--time-limit: 0"),
        (("--caches", "paged"), "'paged' is not known"),
    ],
)
def test_what_means_nothing_is_refused(
    args: tuple[str, ...], words: str, swept: Callable[..., Ran]
) -> None:
    assert words in refused(swept(*args))


def test_a_sweep_is_one_of_transformers(kv: Callable[..., Ran]) -> None:
    assert "Add --impl transformers" in refused(kv("--sweep", command="verify-cache"))
