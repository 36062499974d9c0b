"""Crashes: whatever is killed, at whatever moment, ends with the bytes of a run that was not.

`make crash` adds as many kills at random moments as --kills says, and kills the command itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import training_cases
from kvtool.core import runs
from kvtool.files import PACKAGE, sha256
from training_cases import EVAL_EVERY, STEPS, outcome, unreadable

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
KILLED = -signal.SIGKILL


class Trial(NamedTuple):
    """A run that dies at its `n`-th step, write or rename, or after a part of its seconds."""

    death: str
    n: float
    trainer: str = "Trainer"
    number: int = 0  # of the kill, among those at random

    def __str__(self) -> str:
        kill = f"kill {self.number}, " if self.number else ""
        return f"{kill}{self.death} {self.n:.3g}"


N_WRITES = 22  # run.json; then at each of 3 evaluations 3 files of best/, 3 of last/, and the state
TRIALS = [
    *(Trial("step", step) for step in range(1, STEPS + 1, 2)),
    *(Trial("torn write", n) for n in range(1, N_WRITES + 1)),
    *(Trial("rename", n) for n in range(1, N_WRITES + 1, 4)),
    *(Trial("full disk", n) for n in range(1, N_WRITES + 1, 4)),
    Trial("torn writes", 9),  # the one after a state
    *(Trial("seconds", part) for part in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)),
]
UNSAFE = [Trial("plain write", n) for n in range(1, N_WRITES + 1, 3)]
FORGETFUL = [
    Trial("step", step, trainer)
    for trainer in ("Forgetful", "Unseeded")
    for step in range(EVAL_EVERY + 1, STEPS + 1, 2)
]


def whole(trainer: str = "Trainer") -> Trial:
    """A run that is over before it would die."""
    return Trial("torn write", N_WRITES + 1, trainer)


def at_random(kills: int) -> list[Trial]:
    """Half of them by the clock, the others in the middle of a write or at a rename."""
    draw = random.Random(kills)
    trials = []
    for number in range(1, kills + 1):
        death = draw.choice(("seconds", "seconds", "torn write", "rename"))
        n = draw.random() if death == "seconds" else draw.randint(1, N_WRITES)
        trials.append(Trial(death, n, number=number))
    return trials


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:
        trials = TRIALS + at_random(metafunc.config.getoption("--kills"))
        metafunc.parametrize("trial", trials, ids=str)


@pytest.fixture(scope="module")
def lab(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[Trial, dict[str, Any]]:
    """All trials, played by one process that imports torch once, and what each has left."""
    folder = tmp_path_factory.mktemp("lab")
    wholes = [whole(trainer) for trainer in training_cases.TRAINERS]
    trials = [*wholes, *TRIALS, *UNSAFE, *FORGETFUL, *at_random(request.config.option.kills)]
    plan = [
        {"out": str(folder / str(i)), "death": trial.death, "n": trial.n, "trainer": trial.trainer}
        for i, trial in enumerate(trials)
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    ran = subprocess.run(
        [sys.executable, training_cases.__file__, str(folder / "plan.json")],
        capture_output=True,
        text=True,
        timeout=300 + 10 * request.config.option.kills,
        env=ENVIRONMENT,
    )
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)
    for result, trial in zip(results, plan, strict=True):
        out = Path(str(trial["out"]))
        result["outcome"] = outcome(out) if result["ended"] == 0 else None
        result["left"] = [path.name for path in out.rglob(".*.tmp")]
    return dict(zip(trials, results, strict=True))


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
    codes = lab[trial]["codes"]
    if trial.death == "torn writes":
        assert codes == [KILLED] * 2 + [0]
    else:
        assert codes == [1 if trial.death == "full disk" else KILLED]
    assert survives(trial, lab), lab[trial]


def test_the_trials_reach_the_last_write_of_a_run(lab: dict[Trial, dict[str, Any]]) -> None:
    assert lab[whole()]["codes"] == [0] and survives(whole(), lab)


def test_files_that_are_written_in_place_are_caught_by_that_check(
    lab: dict[Trial, dict[str, Any]],
) -> None:
    assert all(lab[trial]["codes"] == [KILLED] for trial in UNSAFE)
    assert sum(not survives(trial, lab) for trial in UNSAFE) > len(UNSAFE) // 2


def test_a_state_that_is_not_restored_is_caught_by_that_check(
    lab: dict[Trial, dict[str, Any]],
) -> None:
    assert all(lab[trial]["codes"] == [KILLED] and not survives(trial, lab) for trial in FORGETFUL)
    assert all(lab[whole(trainer)]["codes"] == [0] for trainer in training_cases.TRAINERS)


# The command itself

N_KILLS = 10
WORDS = [f"{a}{b}{c}" for a in "abcdefg" for b in "aeiou" for c in "klmnrst"]


def start(folder: Path, out: str, *args: str) -> subprocess.Popen[bytes]:
    """`kvtool train-seq2seq` on a small file, in a process of its own."""
    options = (
        f"train-seq2seq --data words.tsv --out {out} --steps 400 --eval-every 10 --beams 1 "
        "--d-model 16 --heads 2 --context 32 --batch-tokens 256 --device cpu --threads 1"
    )
    command = [sys.executable, "-m", "kvtool", *options.split(), *args]
    with open(folder / "stderr", "ab") as log:
        return subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=log, env=ENVIRONMENT
        )


def wait_until_it_trains(process: subprocess.Popen[bytes], log: Path) -> None:
    """A run that begins writes its log anew; importing takes longer than all of its steps."""
    began = time.time()
    while not (log.exists() and log.stat().st_mtime > began):
        assert process.poll() is None
        time.sleep(0.001)


def test_a_command_that_is_killed_ten_times_ends_with_the_same_checkpoints(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if not request.config.option.kills:
        pytest.skip("takes a minute: make crash")
    (tmp_path / "words.tsv").write_text("".join(f"{w}\t{' '.join(w.upper())}\n" for w in WORDS))
    assert start(tmp_path, "whole").wait() == 0, (tmp_path / "stderr").read_text()
    files = [tmp_path / "whole" / name for name in (runs.RUN, runs.LOG)]
    began, ended = (path.stat().st_mtime for path in files)
    draw = random.Random(N_KILLS)
    out = tmp_path / "killed"
    for _ in range(N_KILLS):
        resume = ["--resume"] if (out / runs.RUN).exists() else []
        process = start(tmp_path, "killed", *resume)
        wait_until_it_trains(process, out / runs.LOG)
        time.sleep(draw.uniform(0.0, (ended - began) / N_KILLS))
        process.kill()
        assert process.wait() == KILLED
        assert unreadable(out) == []
    assert start(tmp_path, "killed", "--resume").wait() == 0
    assert (tmp_path / "stderr").read_text().count("resumed at step") > N_KILLS // 2
    for path in [*(tmp_path / "whole").glob("best/*"), *(tmp_path / "whole").glob("last/*")]:
        assert sha256(path) == sha256(out / path.parent.name / path.name), path
