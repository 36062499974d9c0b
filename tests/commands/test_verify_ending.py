"""verify-cache that is ended: every verdict is told and kept, no half of one, and it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_probe import Ran, refused
from kvtool.commands.verify import rows as verify_rows
from kvtool.commands.verify.report import Row
from kvtool.core.verify import judge as judging
from kvtool.core.verify.check import Checked
from kvtool.core.verify.diagnosis import locate
from kvtool.core.verify.mutants import MUTANTS, selftest
from kvtool.core.verify.mutants.contents import ReadsLayerZero
from kvtool.core.verify.scenario_run import TrackedSession
from kvtool.core.verify.scenarios import SCENARIOS
from kvtool.errors import FileError
from small_models import save_decoder

pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")
BOTH = pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
FEW = ["decode", "chunks", "crop"]
TARGET = """
from torch import nn, zeros
class Right:
    vocab_size, context = 5, 128
    def __init__(self): self.scale = zeros(3)
    def full(self, ids): return nn.functional.one_hot(ids.cumsum(1) % 5, 5).float()
    def step(self, ids, state):
        total = ids.cumsum(1) + (0 if state is None else state)
        return nn.functional.one_hot(total % 5, 5).float(), total[:, -1:]
    def crop(self, state, length): raise NotImplementedError("it cannot go back")
right = Right()
"""  # it holds numbers, so that there is something to convert to float64


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_decoder(tmp_path_factory.mktemp("decoder")))


@pytest.fixture
def modes(decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What is given to each way of checking that reaches several verdicts."""
    monkeypatch.setattr(selftest, "MUTANTS", selftest.MUTANTS[:5])
    monkeypatch.setattr(selftest, "LOOKALIKES", selftest.LOOKALIKES[:1])
    file = tmp_path / "decoder_of_a_user.py"
    file.write_text(TARGET)
    few = ["--tokens", "4", "--scenarios", *FEW]
    return {
        "kvtool": ["--model", decoder, "--caches", "static", "sliding", "--prompt", "ab", *few],
        "transformers": ["--impl", "transformers", "--model", "gpt2", *few],
        "target": ["--target", f"{file}:right", *few],
        "self-test": ["--self-test"],
    }


@pytest.fixture
def verify(kv: Callable[..., Ran]) -> Callable[..., Ran]:
    def call(*args: str) -> Ran:
        return kv(*args, "--device", "cpu", "--threads", "1", command="verify-cache")

    return call


Hook = Callable[..., Callable[[], int]]


@pytest.fixture
def at_call(monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Do something at the n-th call of a function of a class or module -> how often it was called,
    which begins anew with each hook."""

    def hook(owner: Any, name: str, n: int, act: Callable[[], None]) -> Callable[[], int]:
        right = getattr(owner, name)
        count = [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == n:
                act()
            return right(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return lambda: count[0]

    return hook


def send(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def verdicts(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What was found, in order, without how long it took."""
    if "planted" in report:
        return [tuple(map(str, o.values())) for o in (*report["planted"], *report["lookalikes"])]
    return [tuple(map(str, row.values())) for row in report["checks"]]


# What is done is told


@BOTH
@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
def test_a_signal_prints_and_writes_every_verdict_that_was_reached(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    at_call: Hook,
    tmp_path: Path,
    mode: str,
    number: int,
    code: int,
    word: str,
) -> None:
    written = tmp_path / "report.json"
    at_call(judging.Judge, "judge", 3, send(number))
    ran = verify(*modes[mode], "--output", str(written))
    report = json.loads(written.read_text())
    done = verdicts(report)
    assert (ran.code, report["exit_code"], report["ended"]) == (code, code, word)
    assert len(done) == 2  # the third was being reached
    total = 2 + len(report["not_run"])
    assert f"warning: {word} after 2 of {total} checks\n" in ran.err
    assert f"{word} after 2 of {total} checks" in " ".join(ran.out.split())
    assert ran.out.splitlines()[-1].startswith("! ") or "\n! " in ran.out
    if mode != "self-test":
        assert report["control"] is None and "the planted bug was not tried" in ran.out
        assert report["not_run"][0]["scenario"] == FEW[2]


@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
def test_the_conclusion_claims_nothing_of_what_was_not_run(
    verify: Callable[..., Ran], modes: dict[str, list[str]], at_call: Hook, mode: str
) -> None:
    at_call(judging.Judge, "judge", 3, send())
    said = json.loads(verify(*modes[mode], "--json").out)["conclusion"]
    expected = {
        "kvtool": "; interrupted after 2 of 12 checks; not run: static default (crop) and exact, "
        "sliding; the planted bug was not tried",
        "target": "own kernels: 12 of 12 steps identical, bit for bit; interrupted after 2 of 3 "
        "checks; not run: decoder_of_a_user.py:right (crop); the planted bug was not tried",
        "transformers": "interrupted after 2 of 12 checks; not run: dynamic (crop), static, "
        "quantized, own; the planted bug was not tried",
        "self-test": "interrupted after 2 of 6 checks; not run: position counts steps, a chunk "
        "stands at one position, position one too high, rotary positions shifted",
    }
    assert said.endswith(expected[mode])
    # How many steps round is the processor's affair.
    assert said.startswith({"kvtool": "default", "self-test": "2 of 2"}.get(mode, "own"))


def test_before_the_first_verdict_there_is_nothing_to_tell(
    verify: Callable[..., Ran], modes: dict[str, list[str]], at_call: Hook, tmp_path: Path
) -> None:
    for mode, given in modes.items():
        kept = tmp_path / f"{mode}.jsonl"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judging.Judge, "judge", lambda *args, **more: send()())
            ran = verify(*given, "--resume", str(kept))
        assert (ran.code, ran.out) == (130, ""), mode
        assert ran.err.endswith("kvtool: interrupted\n") and not kept.exists()


def test_when_only_the_planted_bug_is_left_it_is_said(
    verify: Callable[..., Ran], modes: dict[str, list[str]], at_call: Hook
) -> None:
    at_call(judging.Judge, "judge", 4, send())
    report = json.loads(verify(*modes["target"], "--json").out)
    assert (report["exit_code"], report["not_run"], len(report["checks"])) == (130, [], 3)
    assert report["conclusion"].endswith("3 of 3 checks; the planted bug was not tried")


def test_a_bug_that_was_found_is_told_and_the_code_is_that_of_the_signal(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    at_call: Hook,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvtool import registry

    place = f"{ReadsLayerZero.__module__}:{ReadsLayerZero.__name__}"
    monkeypatch.setitem(registry.CACHES, "static", place)
    at_call(judging.Judge, "judge", 2, send())
    ran = verify(*modes["kvtool"])
    assert ran.code == 130
    assert "! static: bug, step 1 in decode; interrupted after 1 of" in " ".join(ran.out.split())


# Nothing half-judged is a verdict


def test_a_scenario_that_is_cut_at_any_step_has_no_row(
    verify: Callable[..., Ran], modes: dict[str, list[str]]
) -> None:
    whole = verdicts(json.loads(verify(*modes["target"], "--json").out))
    right = TrackedSession.feed
    reached = []
    for last in range(1, 200, 5):
        count = [0]

        def feed(*args: Any, last: int = last, count: list[int] = count) -> None:
            count[0] += 1
            if count[0] == last:
                send()()
            right(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrackedSession, "feed", feed)
            ran = verify(*modes["target"], "--json")
        if ran.code == 0:
            break
        assert ran.code == 130
        found = verdicts(json.loads(ran.out)) if ran.out else []
        assert found == whole[: len(found)]
        reached.append(len(found))
    assert ran.code == 0 and reached == sorted(reached) and {0, 1, 2, 3} == set(reached)


@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
@pytest.mark.parametrize("n", [1, 7, 30])
def test_a_signal_that_a_decoder_swallows_is_no_error_of_its(
    verify: Callable[..., Ran], modes: dict[str, list[str]], at_call: Hook, mode: str, n: int
) -> None:
    def swallowed() -> None:
        try:
            send()()
        except KeyboardInterrupt:
            raise RuntimeError("a callback failed") from None

    at_call(TrackedSession, "feed", n, swallowed)
    ran = verify(*modes[mode], "--json")
    assert ran.code == 130
    assert "callback failed" not in ran.out and '"error"' not in ran.out
    assert mode == "self-test" or not ran.out or json.loads(ran.out)["control"] is None


def test_a_bug_that_was_being_located_is_found_again(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    at_call: Hook,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvtool import registry
    from kvtool.core.verify.diagnosis import doctor

    place = f"{ReadsLayerZero.__module__}:{ReadsLayerZero.__name__}"
    monkeypatch.setitem(registry.CACHES, "static", place)
    given = [*modes["kvtool"], "--kernels", "default", "--resume", str(tmp_path / "kept.jsonl")]
    with pytest.MonkeyPatch.context() as patch:
        right, count = locate.locate, [0]

        def second(*args: Any) -> Any:
            count[0] += 1
            if count[0] == 2:
                send()()
            return right(*args)

        patch.setattr(doctor, "locate", second)
        ran = verify(*given, "--json")
    assert ran.code == 130 and len(json.loads(ran.out)["checks"]) == 1
    rows = json.loads(verify(*given, "--json").out)["checks"]
    assert [row["layer"] for row in rows if row["verdict"] == "bug"] == [1, 1, 1]


# It goes on


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
    verify: Callable[..., Ran], modes: dict[str, list[str]], at_call: Hook, tmp_path: Path
) -> None:
    for mode, expected in (("kvtool", 1), ("transformers", 1), ("target", 1), ("self-test", 0)):
        given = [*modes[mode], "--resume", str(tmp_path / f"{mode}.jsonl")]
        first = verify(*given)
        calls = at_call(judging.Judge, "judge", 0, send())
        assert verify(*given).out.partition(" (")[0] == first.out.partition(" (")[0]
        assert calls() == expected, mode


@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
def test_results_of_other_settings_are_refused_with_the_difference(
    verify: Callable[..., Ran],
    modes: dict[str, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    path = tmp_path / "kept.jsonl"
    given = [*modes[mode], "--resume", str(path)]
    verify(*given)
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
    real = verify_rows.environment()
    monkeypatch.setattr(verify_rows, "environment", lambda: {**real, "torch": "1.0"})
    assert "torch was " in refused(verify(*given)) and path.read_bytes() == before


def test_results_of_another_model_are_refused(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "kept.jsonl"
    given = [*modes["kvtool"], "--resume", str(path)]
    verify(*given)
    other = str(save_decoder(tmp_path / Path(modes["kvtool"][1]).name, seed=1))  # same name
    assert "sha256 was " in refused(verify(*given, "--model", other))
    path.unlink()
    verify(*modes["target"], "--resume", str(path))
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
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "kept.jsonl"
    given = [*modes["target"], "--resume", str(path)]
    verify(*given)
    header, first, *_ = path.read_text().splitlines()
    rows = CONTRADICTIONS[kind](json.loads(first))
    path.write_text("".join(f"{line}\n" for line in (header, *map(json.dumps, rows))))
    before = path.read_bytes()
    message = refused(verify(*given))
    assert message.startswith(f"--resume {path}: line {len(rows) + 1} is no result of this command")
    assert path.read_bytes() == before
    path.unlink()  # and nobody holds it any more
    assert verify(*given).code == 0


def test_a_planted_bug_that_there_is_not_or_that_is_there_twice_is_refused(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "kept.jsonl"
    given = [*modes["self-test"], "--resume", str(path)]
    verify(*given)
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
            assert verify_rows.is_coherent(row), row
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


@pytest.mark.parametrize("mode", ["kvtool", "transformers", "target", "self-test"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_file_that_another_process_goes_on_from_is_refused_until_that_ends(
    verify: Callable[..., Ran], modes: dict[str, list[str]], tmp_path: Path, mode: str, begun: bool
) -> None:
    path = tmp_path / "kept.jsonl"
    given = [*modes[mode], "--resume", str(path)]
    if begun:
        verify(*given)
    before = path.read_bytes() if begun else b""
    held = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = refused(verify(*given))
        assert message.startswith(f"--resume {path}: in use by pid {other.pid}. Wait for it")
        assert path.read_bytes() == before
        other.kill()  # whoever dies lets go
    assert verify(*given).code == 0


# A process of its own

PROCESS = """
import os, signal, sys
from kvtool import app
from kvtool.core.verify.judge import Judge
right, left = Judge.judge, [5]
def judge(*args, **more):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), int(sys.argv[1]))
    return right(*args, **more)
Judge.judge = judge
app.main(sys.argv[2:])
"""


@BOTH
def test_a_process_that_gets_a_signal_leaves_its_table_its_document_and_its_results(
    modes: dict[str, list[str]], tmp_path: Path, number: int, code: int, word: str
) -> None:
    written, kept = tmp_path / "rows.csv", tmp_path / "kept.jsonl"
    words = [*modes["target"], "--scenarios", *SCENARIOS, "--threads", "1"]
    words += ["--output", str(written), "--resume", str(kept)]
    command = [sys.executable, "-c", PROCESS, str(int(number)), "verify-cache", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert f"{word} after 4 of {len(SCENARIOS)} checks" in done.stdout
    assert f"--resume {kept}: the same command goes on from here\n" in done.stderr
    assert len(written.read_text().splitlines()) == 1 + 4
    assert len(kept.read_text().splitlines()) == 1 + 4
