"""verify-cache --impl transformers --sweep: every model type, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from cli_probe import HANGS, Ran, refused
from kvtool.core.verify.check import Checked
from kvtool.core.verify.compare import Gap
from kvtool.core.verify.hf import sweep
from kvtool.core.verify.hf.sweep import judge_type
from kvtool.core.verify.hf.sweep_worker import judge, summary
from kvtool.core.verify.hf.task import Swept, Task
from kvtool.core.verify.judge import Finding
from kvtool.core.verify.resume_log import ResumeLog
from kvtool.errors import FileError

RIGHT = Swept("gpt2", "rounding", True, gap=2e-7, gap_float64=5e-16, seconds=1.5)
BUGGY = Swept("mamba", "bug", False, "dynamic in chunks: the gap stays", 3e-2, 3e-2, 3e-2)
ABSENT = Swept("gemma3n", "not built", False, "could not build (ImportError: timm)")
BART = Swept("bart", "rounding", True)
BOTH = Swept("bart", "precision", True, kind="seq2seq")
UNDECIDED = Swept("rwkv", "undecided", False, "cannot run in float64")
KNOWN = {(s.type, s.kind): s for s in (RIGHT, BUGGY, ABSENT, BART, BOTH, UNDECIDED)}
DIFFERS = Gap(8, 1, 1, 1e-7, 4.0)


def finding(verdict: str, scenario: str = "decode", cache: str = "dynamic") -> Checked:
    gap = None if verdict == "unsupported" else DIFFERS
    return Checked(cache, "own", True, Finding(scenario, verdict, f"why {verdict}", gap))


CONTROL = replace(finding("bug", cache="planted bug"), planted=True)


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
        (("rounding", "undecided", "precision"), "undecided"),
        (("undecided", "bug"), "bug"),
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
    missed = replace(CONTROL, finding=finding("rounding").finding)
    found = summary("some", [finding("rounding"), missed])
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


def kept(path: Path, *results: Swept, **facts: Any) -> ResumeLog[Swept]:
    """A file of results of a sweep, with these in it."""
    for result in results:
        ResumeLog(path, Swept, facts).append(result)
    return ResumeLog(path, Swept, facts)


def test_what_a_file_of_results_has_is_not_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.jsonl"
    asked = []

    def judged(given: Task, seconds: float) -> Swept:
        asked.append(given.type)
        return BUGGY

    monkeypatch.setattr(sweep, "judge_type", judged)
    tasks = [task("gpt2"), task("mamba")]
    assert list(sweep.sweep(tasks, 60.0, kept(path, RIGHT))) == [RIGHT, BUGGY]
    assert asked == ["mamba"]
    assert kept(path).results == [RIGHT, BUGGY]


@pytest.mark.parametrize(
    "line",
    [
        '{"type": "gpt2", "verdict": "rounding", "right": 1}',
        '{"type": "gpt2", "verdict": "bug", "right": true, "verdict": "rounding"}',
        '{"type": ["gpt2"], "verdict": "rounding", "right": true}',
        '{"type": "gpt2", "verdict": "rounding", "right": true, "gap": "small"}',
        '{"type": "gpt2", "verdict": "rounding", "right": true, "by_cache": {"static": 1}}',
        '{"type": "gpt2", "verdict": "rounding", "right": true, "seconds": %s}' % ("9" * 5000),
        "[" * 10**5,
        "",
    ],
)
def test_results_that_no_sweep_can_have_kept_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "sweep.jsonl"
    kept(path, RIGHT)
    whole = path.read_text()
    path.write_text(f"{whole}{line}\n")
    with pytest.raises(FileError, match="line 3 is no result of this command"):
        ResumeLog(path, Swept, {})
    path.write_text(f"{whole}{line}")  # cut off while it was written
    assert ResumeLog(path, Swept, {}).results == [RIGHT]


def test_a_gap_that_is_infinite_is_kept(tmp_path: Path) -> None:
    endless = replace(BUGGY, gap=float("inf"), gap_float64=1)
    assert kept(tmp_path / "sweep.jsonl", endless).results == [endless]


def test_a_type_that_is_both_kinds_of_model_has_a_result_of_each(tmp_path: Path) -> None:
    decoder = Swept("bart", "rounding", True)
    whole = Swept("bart", "bug", False, kind="seq2seq")
    tasks = [task("bart", kind=kind) for kind in ("seq2seq", "causal")]
    known = kept(tmp_path / "sweep.jsonl", decoder, whole)
    assert list(sweep.sweep(tasks, 60.0, known)) == [whole, decoder]


# The command; all results are known, so that no process starts


@pytest.fixture
def swept(
    kv: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Run a sweep whose results are all in its file."""
    monkeypatch.setattr(sweep, "judge_type", lambda given, limit: KNOWN[given.type, given.kind])

    def call(*args: str) -> Ran:
        given = ["--impl", "transformers", "--sweep", "--resume", str(tmp_path / "sweep.jsonl")]
        return kv(*given, *args, command="verify-cache")

    return call


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "lama"},
        {"kind": "seq2seq"},
        {"verdict": "perfect"},
        {"verdict": "bug"},
        {"right": False},
        {"gap": float("nan")},
        {"seconds": -1.0},
        {},
    ],
)
def test_a_result_that_contradicts_itself_or_is_there_twice_is_refused(
    swept: Callable[..., Ran], tmp_path: Path, changes: dict[str, Any]
) -> None:
    swept("--types", "gpt2")
    path = tmp_path / "sweep.jsonl"
    header, row = path.read_text().splitlines()
    other = {**json.loads(row), "type": "llama", **(changes or {"type": "gpt2"})}
    path.write_text(f"{header}\n{row}\n{json.dumps(other)}\n")
    message = refused(swept("--types", "gpt2"))
    assert message.startswith(f"--resume {path}: line 3 is no result of this command")


def test_a_sweep_lists_its_types_and_counts_its_verdicts(swept: Callable[..., Ran]) -> None:
    ran = swept("--types", "gpt2", "mamba", "gemma3n")
    assert ran.code == 1  # there is a bug
    said = " ".join(ran.out.split())
    assert "3 causal language models, 2 judged: 1 rounding, 1 bug, 1 not built" in said


def test_encoder_decoders_have_a_table_and_counts_of_their_own(
    swept: Callable[..., Ran],
) -> None:
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
    assert swept("--types", "gpt2", "rwkv").code == 1  # what nothing can decide is no pass
    assert swept("--types", "gemma3n").code == 1


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_sweep_that_is_ended_tells_what_it_has_and_goes_on(
    swept: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    signals_as_in_the_app: None,
    number: int,
    code: int,
    word: str,
) -> None:
    asked = []

    def judged(given: Task, limit: float) -> Swept:
        asked.append(given.type)
        if asked.count("mamba") == 1 and given.type == "mamba":
            try:
                os.kill(os.getpid(), number)
            except KeyboardInterrupt:  # as where the signal ends the process of the type, too
                return Swept("mamba", "error", False, "its process ended without an answer")
        return KNOWN[given.type, given.kind]

    monkeypatch.setattr(sweep, "judge_type", judged)
    types = ("--types", "gpt2", "mamba", "gemma3n")
    ran = swept(*types)
    assert ran.code == code and f"warning: {word} after 1 of 3 types\n" in ran.err
    assert "without an answer" not in ran.out
    said = f"1 rounding; {word} after 1 of 3 types; not run: mamba, gemma3n"
    assert said in " ".join(ran.out.split())
    report = json.loads(swept(*types, "--json").out)
    assert asked == ["gpt2", "mamba", "mamba", "gemma3n"]
    assert (report["exit_code"], report["ended"], report["not_run"]) == (1, None, [])


def test_a_sweep_refuses_results_of_other_settings(
    swept: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvtool.core.verify.hf import library

    assert swept("--types", "gpt2").code == 0
    for options, words in (
        (("--tokens", "8"), "tokens was 32 and is now 8"),
        (("--caches", "static"), "caches was ["),
        (("--time-limit", "7"), "time_limit was 60.0 and is now 7.0"),
    ):
        assert words in refused(swept("--types", "gpt2", *options))
    monkeypatch.setattr(library, "need_transformers", lambda: "1.0")
    assert "and is now '1.0'" in refused(swept("--types", "gpt2"))


def test_a_sweep_says_what_of_a_kind_was_not_judged(
    swept: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    for verdict, said in (("rounding", True), ("unsupported", False)):
        found = replace(RIGHT, type="llama", by_cache={"dynamic": "rounding", "quantized": verdict})
        monkeypatch.setattr(sweep, "judge_type", lambda given, limit, found=found: found)
        report = json.loads(swept("--types", "llama", "--json").out)
        assert ("quantized: its codes were not judged" in report["conclusion"]) == said
        assert report["not_judged"] == ({"quantized": "codes"} if said else {})
        Path(report["settings"]["resume"]).unlink()


@pytest.mark.parametrize(
    ("given", "used"), [((), 1), (("--threads", "1"), 1), (("--threads", "2"), 2)]
)
def test_a_sweep_records_the_threads_that_judged_its_types(
    swept: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], used: int
) -> None:
    asked = []

    def judged(given: Task, limit: float) -> Swept:
        asked.append(given.threads)
        return KNOWN[given.type, given.kind]

    monkeypatch.setattr(sweep, "judge_type", judged)
    torch.set_num_threads(2)
    report = json.loads(swept("--types", "gpt2", "--json", *given).out)
    assert asked == [used]
    assert report["environment"]["threads"] == report["measured_on"]["threads"] == used


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
