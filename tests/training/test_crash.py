"""Crashes: whatever is killed, at whatever moment, ends with the bytes of a run that was not.

`make crash` adds as many random moments as --kills says, and kills the command itself. Moments are
counts of steps, writes, calls ... (deaths.py), so that each comes where it is aimed anywhere.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import crash_lab
import deaths
import training_cases
from crash_lab import newest_state, resumed
from deaths import KILLED, Aim
from kvtool.files import PACKAGE
from kvtool.reading import sha256
from training_cases import COMPILER, EVAL_EVERY, STEPS, outcome, unreadable

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


class Trial(NamedTuple):
    """A run that dies at the `n`-th event behind `after` states, or after that part of all calls;
    `again`: and so does each that resumes it."""

    death: str
    n: float
    after: int = 0
    again: bool = False
    trainer: str = "Trainer"
    number: int = 0  # of the kill, among those at random

    def __str__(self) -> str:
        kill = f"kill {self.number}, " if self.number else ""
        behind = f" after {self.after} saved" if self.after else ""
        return f"{kill}{self.death} {self.n:.3g}{behind}{', and again' if self.again else ''}"


N_SAVED = 7  # files of an evaluation: 3 of best/, 3 of last/, and the state
N_WRITES = 1 + STEPS // EVAL_EVERY * N_SAVED  # run.json comes first
TRIALS = [
    *(Trial("step", step) for step in range(1, STEPS + 1, 2)),
    *(Trial("evaluation", n) for n in range(1, STEPS // EVAL_EVERY + 1)),
    # Each of two evaluations; of the third, which is as the second, the first, one and the last.
    *(Trial("write", n) for n in range(1, 2 * N_SAVED + 2)),
    *(Trial("write", n) for n in (2 * N_SAVED + 2, 2 * N_SAVED + 5, N_WRITES)),
    *(Trial("rename", n) for n in range(1, N_WRITES + 1, 5)),
    *(Trial("full disk", n) for n in range(1, N_WRITES + 1, 5)),
    *(Trial("call", part) for part in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)),
    Trial("write", N_SAVED + 2, again=True),  # the first one behind a state
]
UNSAFE = [Trial("plain write", n) for n in range(1, N_WRITES + 1, 4)]
FORGETFUL = [
    Trial("step", step, trainer=trainer)
    for trainer in ("Forgetful", "Unseeded")
    for step in (EVAL_EVERY + 1, STEPS - 1)
]


def whole(trainer: str = "Trainer") -> Trial:
    """A run that is over before it would die."""
    return Trial("write", N_WRITES + 1, trainer=trainer)


def at_random(kills: int) -> list[Trial]:
    """All behind the first state, so that each run is resumed from one."""
    draw, trials = random.Random(kills), []
    most = {"step": STEPS - EVAL_EVERY, "write": N_WRITES - 1 - N_SAVED}
    most |= {"rename": most["write"], "evaluation": STEPS // EVAL_EVERY - 1}
    for number in range(1, kills + 1):
        death = draw.choice(("call", "call", *most))
        n = draw.uniform(0.01, 0.99) if death == "call" else draw.randint(1, most[death])
        trials.append(Trial(death, n, after=1, number=number))
    return trials


def states_left(trial: Trial) -> list[int] | None:
    """The step of the newest state after each death, 0 for none; None where calls were counted."""
    if trial.again:
        return [EVAL_EVERY * n for n in range(1, STEPS // EVAL_EVERY + 1)]
    before = int(trial.n) - 1
    if trial.death == "step":
        evaluations = before // EVAL_EVERY
    elif trial.death == "evaluation":
        evaluations = before
    elif trial.death != "call":
        evaluations = max(before - (not trial.after), 0) // N_SAVED
    else:
        return None
    return [EVAL_EVERY * (trial.after + evaluations)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:
        trials = TRIALS + at_random(metafunc.config.getoption("--kills"))
        metafunc.parametrize("trial", trials, ids=str)


@pytest.fixture(scope="module")
def lab(
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    warm_python: Callable[..., str],
) -> dict[Trial, dict[str, Any]]:
    """All trials, played by one process that imports torch once, and what each has left."""
    folder = tmp_path_factory.mktemp("lab")
    wholes = [whole(trainer) for trainer in training_cases.TRAINERS]
    trials = [*wholes, *TRIALS, *UNSAFE, *FORGETFUL, *at_random(request.config.option.kills)]
    plan = [{"out": str(folder / str(i)), **trial._asdict()} for i, trial in enumerate(trials)]
    (folder / "plan.json").write_text(json.dumps(plan))
    ran = subprocess.run(
        [warm_python(*COMPILER), crash_lab.__file__, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)
    for result, trial in zip(results, plan, strict=True):
        out = Path(str(trial["out"]))
        result["outcome"] = outcome(out) if result["ended"] == 0 else None
        result["left"] = [path.name for path in out.rglob(".*.tmp")]
    return dict(zip(trials, results, strict=True))


def died_as_aimed(trial: Trial, found: dict[str, Any]) -> bool:
    """Whether each death was the one that was aimed at, and came when it should."""
    codes = [1 if trial.death == "full disk" else KILLED]
    if trial.again:  # the last run has too little left to do for it
        codes = [KILLED] * (STEPS // EVAL_EVERY - 1) + [0]
    marks = [mark.partition(",")[0] for mark in found["died"]]
    return (
        found["codes"] == codes
        and marks == [found["aim"]] * (len(codes) - codes.count(0))
        and states_left(trial) in (None, found["states"])
    )


def was_resumed(found: dict[str, Any]) -> bool:
    """Whether each run went on from the newest state that the one before had left."""
    ended = [step for step in found["states"] if step]
    return found["resumed"] == ended


def survives(trial: Trial, lab: dict[Trial, dict[str, Any]]) -> bool:
    """The crash check: no checkpoint was ever broken, and nothing tells that there was a crash."""
    found = lab[trial]
    return (
        found["unreadable"] == []
        and found["left"] == []
        and found["outcome"] == lab[whole(trial.trainer)]["outcome"] is not None
    )


def test_a_run_that_dies_at_any_moment_ends_with_the_same_bytes(
    lab: dict[Trial, dict[str, Any]], trial: Trial
) -> None:
    found = lab[trial]
    assert died_as_aimed(trial, found) and was_resumed(found), found
    assert found["resumed"] or not trial.after, found
    assert survives(trial, lab), found


def test_the_trials_reach_the_last_write_of_a_run(lab: dict[Trial, dict[str, Any]]) -> None:
    found = lab[whole()]
    assert (found["codes"], found["died"], found["states"]) == ([0], [], [STEPS])
    assert survives(whole(), lab)


def test_files_that_are_written_in_place_are_caught_by_that_check(
    lab: dict[Trial, dict[str, Any]],
) -> None:
    assert all(lab[trial]["died"] == [lab[trial]["aim"]] for trial in UNSAFE)
    assert sum(not survives(trial, lab) for trial in UNSAFE) > len(UNSAFE) // 2


def test_a_state_that_is_not_restored_is_caught_by_that_check(
    lab: dict[Trial, dict[str, Any]],
) -> None:
    for trial in FORGETFUL:
        assert died_as_aimed(trial, lab[trial]) and not survives(trial, lab), lab[trial]
    assert all(lab[whole(trainer)]["codes"] == [0] for trainer in training_cases.TRAINERS)


# The command itself

N_KILLS = 10
COMMAND_EVERY = 10  # steps between evaluations
WORDS = [f"{a}{b}{c}" for a in "abcdefg" for b in "aeiou" for c in "klmnrst"]


def command_aims() -> list[Aim]:
    """Each behind a state that its own process has saved, and soon enough to leave work for all."""
    draw = random.Random(N_KILLS)
    most = {"step": 2 * COMMAND_EVERY - 1, "evaluation": 2, "write": 4, "rename": 4, "call": 5000}
    names = [*most] * (N_KILLS // len(most))
    draw.shuffle(names)
    return [Aim(death, draw.randint(1, most[death]), after=1) for death in names]


def run_command(folder: Path, out: str, *args: str, aim: Aim | None = None) -> int:
    """`kvtool train-seq2seq` on a small file in a process of its own, which may die."""
    options = (
        f"train-seq2seq --data words.tsv --out {out} --steps 400 --eval-every {COMMAND_EVERY} "
        "--beams 1 --d-model 16 --heads 2 --context 32 --batch-tokens 256 --device cpu --threads 1"
    )
    program = ["-m", "kvtool"]
    if aim is not None:
        given = aim.death, str(aim.n), str(aim.after), str(folder / "died")
        program = [deaths.__file__, *given]
    with open(folder / "stderr", "ab") as log:
        return subprocess.run(
            [sys.executable, *program, *options.split(), *args],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=ENVIRONMENT,
        ).returncode


def test_a_command_that_is_killed_ten_times_ends_with_the_same_checkpoints(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if not request.config.option.kills:
        pytest.skip("takes a minute: make crash")
    (tmp_path / "words.tsv").write_text("".join(f"{w}\t{' '.join(w.upper())}\n" for w in WORDS))
    assert run_command(tmp_path, "whole") == 0, (tmp_path / "stderr").read_text()
    out, left, aims = tmp_path / "killed", [0], command_aims()
    for i, aim in enumerate(aims):
        code = run_command(tmp_path, "killed", *(["--resume"] if i else []), aim=aim)
        assert code == KILLED, (aim, (tmp_path / "stderr").read_text())
        assert unreadable(out) == []
        assert newest_state(out) > left[-1], aim
        left.append(newest_state(out))
    assert [mark.partition(",")[0] for mark in deaths.marked(tmp_path / "died")] == [
        str(aim) for aim in aims
    ]
    assert run_command(tmp_path, "killed", "--resume") == 0
    assert resumed((tmp_path / "stderr").read_text()) == left[1:]
    for path in [*(tmp_path / "whole").glob("best/*"), *(tmp_path / "whole").glob("last/*")]:
        assert sha256(path) == sha256(out / path.parent.name / path.name), path
