"""verify-cache that is ended: every verdict is told and kept, no half of one, and it goes on."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import verify_ending_cases
from cli_probe import Ran
from kvtool.core.verify import judge as judging
from kvtool.core.verify.diagnosis import locate
from kvtool.core.verify.mutants.contents import ReadsLayerZero
from kvtool.core.verify.scenario_run import TrackedSession
from kvtool.core.verify.scenarios import SCENARIOS
from verify_ending_cases import FEW, Hook, send, verdicts

decoder, modes, verify, at_call = (
    verify_ending_cases.decoder,
    verify_ending_cases.modes,
    verify_ending_cases.verify,
    verify_ending_cases.at_call,
)


pytestmark = pytest.mark.usefixtures("signals_as_in_the_app")
BOTH = pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)


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
    modes: dict[str, list[str]],
    tmp_path: Path,
    warm_python: Callable[..., str],
    number: int,
    code: int,
    word: str,
) -> None:
    written, kept = tmp_path / "rows.csv", tmp_path / "kept.jsonl"
    words = [*modes["target"], "--scenarios", *SCENARIOS, "--threads", "1"]
    words += ["--output", str(written), "--resume", str(kept)]
    command = [warm_python(), "-c", PROCESS, str(int(number)), "verify-cache", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert f"{word} after 4 of {len(SCENARIOS)} checks" in done.stdout
    assert f"--resume {kept}: the same command goes on from here\n" in done.stderr
    assert len(written.read_text().splitlines()) == 1 + 4
    assert len(kept.read_text().splitlines()) == 1 + 4
