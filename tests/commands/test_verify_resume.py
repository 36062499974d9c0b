"""verify-cache that goes on from what it kept, and from nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import verify_ending_cases
from cli_probe import Ran, refused
from kvtool.commands.verify import resume
from kvtool.commands.verify.report import Row
from kvtool.core.verify import judge as judging
from kvtool.core.verify.check import Checked
from kvtool.core.verify.mutants import MUTANTS
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.errors import FileError
from small_models import save_decoder
from verify_ending_cases import TARGET, Hook, send, verdicts

pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")

decoder, modes, verify, at_call = (
    verify_ending_cases.decoder,
    verify_ending_cases.modes,
    verify_ending_cases.verify,
    verify_ending_cases.at_call,
)


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[str, bytes]]:
    """What a finished run says and keeps, by mode: most tests go on from one."""
    return {}


@pytest.fixture
def finished(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    runs: dict[str, tuple[str, bytes]],
    tmp_path: Path,
) -> Callable[[str], tuple[str, Path]]:
    """What a finished run of a mode says, and a file with what it has kept."""

    def call(mode: str) -> tuple[str, Path]:
        path = tmp_path / f"{mode}.jsonl"
        if mode not in runs:
            said = verify(*modes[mode], "--resume", str(path)).out
            runs[mode] = said, path.read_bytes()
        path.write_bytes(runs[mode][1])
        return runs[mode][0], path

    return call


@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
def test_a_run_that_was_ended_again_and_again_comes_to_the_same_report(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path, mode: str
) -> None:
    whole = json.loads(verify(*modes[mode], "--json").out)
    given = [*modes[mode], "--resume", str(tmp_path / "kept.jsonl"), "--json"]
    known = 0
    for _ in range(30):
        right, count = judging.Judge.judge, [0]

        def third(*args: Any, **more: Any) -> Any:
            count[0] += 1  # noqa: B023
            if count[0] == 3:  # noqa: B023
                send()()
            return right(*args, **more)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judging.Judge, "judge", third)
            ran = verify(*given)
        report = json.loads(ran.out)
        found = verdicts(report)
        if ran.code != 130:
            break
        assert f"{known} results are there already" in ran.err or not known
        # A look-alike is one result of many scenarios: two of them are not enough for it.
        if len(found) == known:
            report = json.loads(verify(*given).out)
            break
        assert known < len(found) <= known + 2 or mode == "transformers"
        known = len(found)
    assert verdicts(report) == verdicts(whole)
    assert report["conclusion"].partition(" (")[0] == whole["conclusion"].partition(" (")[0]
    assert (report["ended"], report["not_run"], report["exit_code"]) == (None, [], 0)


def test_of_a_finished_run_only_the_planted_bug_is_tried_again(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    at_call: Hook,
    finished: Callable[[str], tuple[str, Path]],
) -> None:
    for mode, expected in (("kvtool", 1), ("transformers", 1), ("target", 1), ("self-test", 0)):
        first, path = finished(mode)
        calls = at_call(judging.Judge, "judge", 0, send())
        again = verify(*modes[mode], "--resume", str(path))
        assert again.out.partition(" (")[0] == first.partition(" (")[0]
        assert calls() == expected, mode


@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
def test_results_of_other_settings_are_refused_with_the_difference(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    finished: Callable[[str], tuple[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    _, path = finished(mode)
    given = [*modes[mode], "--resume", str(path)]
    before = path.read_bytes()
    other = {
        "tokens was 4 and is now 5": ["--tokens", "5"],
        "seed was 0 and is now 3": ["--seed", "3"],
        "dtype was 'float32' and is now 'float64'": ["--dtype", "float64"],
        "scenarios was ['decode', 'chunks', 'crop'] and is now [": ["--scenarios", "growth"],
    }
    for words, options in other.items():
        if mode == "self-test" and options[0] != "--seed":
            continue
        message = refused(verify(*given, *options))
        assert message.startswith(f"--resume {path}: has results of another check: "), message
        assert words in message and path.read_bytes() == before
    real = resume.environment()
    monkeypatch.setattr(resume, "environment", lambda: {**real, "torch": "1.0"})
    assert "torch was " in refused(verify(*given)) and path.read_bytes() == before


def test_results_of_another_model_are_refused(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    finished: Callable[[str], tuple[str, Path]],
    tmp_path: Path,
) -> None:
    _, path = finished("kvtool")
    given = [*modes["kvtool"], "--resume", str(path)]
    other = str(save_decoder(tmp_path / Path(modes["kvtool"][1]).name, seed=1))  # same name
    assert "sha256 was " in refused(verify(*given, "--model", other))
    _, path = finished("target")
    file = Path(modes["target"][1].partition(":")[0])
    file.write_text(TARGET.replace("zeros(3)", "zeros(3) + 1"))
    message = refused(verify(*modes["target"], "--resume", str(path)))
    said = message.partition("another check: ")[2]
    assert said.startswith("sha256 was ") and ", weights was " in said
    message = refused(verify(*modes["self-test"], "--resume", str(path)))
    said = message.partition("another check: ")[2]
    assert said.startswith("check was 'target' and is now 'self-test', model was 'decoder_of_a")
    assert "is now None. Give the settings" in said, "of another check nearly all differs"


def test_a_line_names_a_few_of_many_differences_the_weights_first(tmp_path: Path) -> None:
    from kvtool.core.verify.resume_log import ResumeLog

    def make(**fields: Any) -> Any:
        raise AssertionError

    facts = {"check": "kvtool", "model": "a", **dict.fromkeys("bcdefghi", 1), "sha256": "1"}
    with ResumeLog[Any](tmp_path / "kept", make, facts) as kept:
        kept.path.write_bytes(kept.header + b"\n")
    for changed, said in (
        ({**dict.fromkeys("bcdefghi", 2), "sha256": "2"}, "sha256, b, c, d, e and 4 more"),
        (dict.fromkeys("bcdef", 2), "b, c, d, e, f"),
        ({"b": 2, "sha256": "2", "model": "z"}, "model"),
    ):
        with pytest.raises(FileError) as caught:
            ResumeLog[Any](tmp_path / "kept", make, {**facts, **changed})
        words = caught.value.message.partition("another check: ")[2]
        assert re.sub(r" was \S+ and is now [^, ]+", "", words) == said


@pytest.mark.parametrize("data", [b"something else\nand more\n", b"no end", b"{}\n", b"[]\n"])
def test_a_file_that_something_else_wrote_is_refused_and_left_alone(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path, data: bytes
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(data)
    message = refused(verify(*modes["kvtool"], "--resume", str(path)))
    assert message.startswith(f"--resume {path}: line 1 is not where its results begin")
    assert path.read_bytes() == data


def test_a_line_that_is_no_result_is_refused_and_one_that_was_cut_off_is_found_again(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "kept.jsonl"
    given = [*modes["target"], "--resume", str(path)]
    verify(*given)
    whole = path.read_bytes()
    for end in (1, 30, len(whole.splitlines()[0]), len(whole) - 1, len(whole) - 40):
        path.write_bytes(whole[:end])
        assert verify(*given).code == 0
        assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"cache": "static"}\n')
    assert "line 5 is no result of this command" in refused(verify(*given))


BUG = {"verdict": "bug", "right": False, "first_wrong_step": 0}
CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "a bug that is right": lambda row: [{**row, **BUG, "right": True}],
    "a bug without a step": lambda row: [{**row, **BUG, "first_wrong_step": None}],
    "identical, and wrong": lambda row: [{**row, "right": False}],
    "identical, with a gap": lambda row: [
        {**row, "gap": 1.0, "gap_by_step": {**row["gap_by_step"], "working": [1.0] * row["steps"]}}
    ],
    "right, and far off in float64": lambda row: [
        {**row, "gap_float64": 1.0, "gap_by_step": {**row["gap_by_step"], "float64": [1.0]}}
    ],
    "a verdict that there is not": lambda row: [{**row, "verdict": "perfect"}],
    "steps below zero": lambda row: [{**row, "steps": -5, "identical_steps": -5}],
    "more identical steps than steps": lambda row: [{**row, "identical_steps": 10**30}],
    "a layer below zero": lambda row: [{**row, "layer": -7}],
    "a head below zero": lambda row: [{**row, "heads": [-1]}],
    "units that are no number": lambda row: [{**row, "max_ulp": float("nan")}],
    "a gap that is no number": lambda row: [
        {
            **row,
            "gap": float("nan"),
            "gap_by_step": {**row["gap_by_step"], "working": [float("nan")] * row["steps"]},
        }
    ],
    "gaps of a precision that there is not": lambda row: [
        {**row, "gap_by_step": {**row["gap_by_step"], "$\\frac{": [1.0]}}
    ],
    "another kind": lambda row: [{**row, "cache": "static2"}],
    "other kernels": lambda row: [{**row, "kernels": "exact"}],
    "another scenario": lambda row: [{**row, "scenario": "beam"}],
    "all scenarios": lambda row: [{**row, "scenario": "all"}],
    "beyond it in all scenarios": lambda row: [
        {
            **row,
            "scenario": "all",
            "verdict": "unsupported",
            "right": False,
            "steps": 0,
            "identical_steps": 0,
            "gap": None,
            "gap_float64": None,
            "gap_promoted": None,
            "gap_by_step": {},
        }
    ],
    "twice": lambda row: [row, row],
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_result_that_contradicts_itself_or_the_command_is_refused(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    finished: Callable[[str], tuple[str, Path]],
    kind: str,
) -> None:
    _, path = finished("target")
    given = [*modes["target"], "--resume", str(path)]
    header, first, *_ = path.read_text().splitlines()
    rows = CONTRADICTIONS[kind](json.loads(first))
    path.write_text("".join(f"{line}\n" for line in (header, *map(json.dumps, rows))))
    before = path.read_bytes()
    message = refused(verify(*given))
    assert message.startswith(f"--resume {path}: line {len(rows) + 1} is no result of this command")
    assert path.read_bytes() == before
    finished("target")  # and nobody holds it any more
    assert verify(*given).code == 0


def test_a_planted_bug_that_there_is_not_or_that_is_there_twice_is_refused(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    finished: Callable[[str], tuple[str, Path]],
) -> None:
    _, path = finished("self-test")
    given = [*modes["self-test"], "--resume", str(path)]
    header, first, *_ = path.read_text().splitlines()
    for other in (first, json.dumps({**json.loads(first), "name": "none of them"})):
        path.write_text(f"{header}\n{first}\n{other}\n")
        assert "line 3 is no result of this command" in refused(verify(*given))


def test_all_that_planted_bugs_and_right_caches_come_to_is_coherent() -> None:
    verdicts = set()
    for mutant in MUTANTS[::9]:
        for finding in (
            judging.Judge(mutant.subject()).judge(
                judging.Case(SCENARIOS[mutant.scenario]), thorough
            )
            for thorough in (False, True)
        ):
            row = Row.of(Checked("static", "own", True, finding))
            assert resume.is_coherent(row), row
            verdicts.add(row.verdict)
    assert "bug" in verdicts


def test_where_nothing_can_be_kept_is_refused_before_any_work(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path
) -> None:
    for given in modes.values():
        assert "is a folder" in refused(verify(*given, "--resume", str(tmp_path)))
        absent = tmp_path / "absent" / "kept.jsonl"
        assert "does not exist" in refused(verify(*given, "--resume", str(absent)))


@pytest.mark.parametrize("flag", ["--output", "--plot"])
@pytest.mark.parametrize("alias", ["same", "dots", "link", "hard link", "link to nothing yet"])
def test_a_file_to_go_on_from_is_never_written_over(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path, flag: str, alias: str
) -> None:
    kept = tmp_path / f"kept{'.json' if flag == '--output' else '.png'}"
    other = {"same": kept, "dots": f"{tmp_path}/../{tmp_path.name}/{kept.name}"}.get(
        alias, kept.with_stem("other")
    )
    if alias != "link to nothing yet":
        kept.write_bytes(b"hours of work")
    if alias.startswith("link"):
        other.symlink_to(kept)
    if alias == "hard link":
        os.link(kept, other)
    message = refused(verify(*modes["kvtool"], "--resume", str(kept), flag, str(other)))
    assert message.startswith(f"{flag} {other}: is the file of --resume too")
    assert alias == "link to nothing yet" or kept.read_bytes() == b"hours of work"


HOLDER = """
import sys
from pathlib import Path
from kvtool.files import take_lock
lock = take_lock(Path(sys.argv[1]), "", "file")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(  # begun or not: it is looked at before anything is checked
    ("mode", "begun"),
    [("kvtool", True), ("transformers", False), ("target", True), ("self-test", False)],
)
def test_a_file_that_another_process_goes_on_from_is_refused_until_that_ends(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    finished: Callable[[str], tuple[str, Path]],
    tmp_path: Path,
    mode: str,
    begun: bool,
) -> None:
    path = finished(mode)[1] if begun else tmp_path / "kept.jsonl"
    given = [*modes[mode], "--resume", str(path)]
    before = path.read_bytes() if begun else b""
    held = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = refused(verify(*given))
        assert message.startswith(f"--resume {path}: in use by pid {other.pid}. Wait for it")
        assert path.read_bytes() == before
        other.kill()  # whoever dies lets go
    assert verify(*given).code == 0
