"""Several processes that train one model: what they learn, write, say and do when they are stopped.

Started by torchrun's own module, as users start them, from processes that have loaded torch; one
alone is played within the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_probe import HANGS, Ran
from kvtool.core.training import runs
from kvtool.core.training.team import ALONE, Share
from kvtool.reading import sha256
from training_cases import COMPILER, check_that_shares_drop_as_the_whole

WORDS = [f"{a}{b}{c}" for a in "abcdef" for b in "xyz" for c in "aeiou"]
SIZES = ["--d-model", "16", "--heads", "2", "--context", "32", "--dropout", "0.3"]
SETTINGS = [
    *SIZES,
    "--no-amp",
    "--device",
    "cpu",
    "--batch-tokens",
    "200",
    "--lr",
    "0.01",
    "--warmup",
    "5",
]
STEPS = 30
LAUNCHER = "torch.distributed.run"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{word}\t{' '.join(reversed(word.upper()))}\n" for word in WORDS))
    return path


def settings(tsv: Path, out: Path) -> list[str]:
    return ["--data", str(tsv), "--out", str(out), *SETTINGS, "--eval-every", "10"]


@pytest.fixture(scope="module")
def start(tsv: Path, warm_python: Callable[..., str]) -> Start:
    python = warm_python(LAUNCHER, *COMPILER)

    def call(
        out: Path, *args: str, program: Sequence[str] = ("-m", "kvtool")
    ) -> subprocess.Popen[str]:
        launch = ["-m", LAUNCHER, "--standalone", "--nproc-per-node=2"]
        given = [*settings(tsv, out), *args]
        return subprocess.Popen(
            [python, *launch, *program, "train-seq2seq", *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python},
        )

    return call


def log(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / runs.LOG).read_text().splitlines()]
    return [line for line in lines if kind in line]


def state_names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if runs.STATE.fullmatch(path.name))


@pytest.fixture(scope="module")
def two(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of two processes: its folder, and what the user read."""
    out = tmp_path_factory.mktemp("runs") / "two"
    process = start(out, "--steps", str(STEPS))
    stdout, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0, stderr
    return out, stdout, stderr


def test_two_processes_learn_what_one_does(
    kv: Callable[..., Ran],
    tsv: Path,
    two: tuple[Path, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)  # as torchrun tells a process that is alone
    ran = kv(*settings(tsv, tmp_path / "one"), "--steps", str(STEPS), command="train-seq2seq")
    assert ran.code == 0, ran.err
    found, expected = (log(out, "loss") for out in (two[0], tmp_path / "one"))
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    for name in ("loss", "grad_norm", "lr"):
        values = [line[name] for line in expected]
        assert [line[name] for line in found] == pytest.approx(values, rel=1e-4)
    assert len(found) == 4 and found[-1]["loss"] < 0.8 * found[0]["loss"]


def test_one_process_talks_and_writes_for_all(two: tuple[Path, str, str]) -> None:
    out, stdout, stderr = two
    assert stdout.count("best checkpoint") == stdout.count("30 steps") == 1
    assert stderr.count("step 30:") == stderr.count("tokens: char") == 1
    assert [line["step"] for line in log(out, "valid")] == [10, 20, 30]
    assert len(state_names(out)) == runs.KEPT


def test_a_stopped_team_saves_the_step_and_goes_on_to_the_same_bytes(
    start: Start, two: tuple[Path, str, str], tmp_path: Path
) -> None:
    out, waits, step = tmp_path / "run", tmp_path / "waits", 12
    held = [str(Path(__file__).parents[1] / "support" / "held_training.py"), str(step), str(waits)]
    process = start(out, "--steps", str(STEPS), program=held)
    while not waits.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to both
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode != 0 and stderr.count("go on with --resume") == 1
    assert stderr.count("kvtool: terminated") == 1
    assert int(max(state_names(out)).split("-")[1]) == step
    process = start(out, "--steps", str(STEPS), "--resume")
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode == 0 and stderr.count(f"resumed at step {step}") == 1
    name = Path("last") / "model.safetensors"
    assert sha256(out / name) == sha256(two[0] / name)


def test_an_error_of_the_leader_is_one_line_and_ends_all(start: Start, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    process = start(tmp_path, "--steps", "5")
    _, stderr = process.communicate(timeout=HANGS)
    assert process.returncode != 0
    assert stderr.count("kvtool: error:") == stderr.count("is not empty (found holiday.jpg)") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]
    assert "SIGKILL" not in stderr  # nobody had to be killed after half a minute of waiting


@pytest.mark.parametrize("of", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 6, 20])
def test_shares_are_the_batch_row_by_row(n: int, of: int) -> None:
    rows = [row for i in range(of) for row in range(n)[Share(i, of).rows(n)]]
    assert rows == list(range(n))


def test_dropout_of_a_share_is_that_of_its_rows_in_the_whole() -> None:
    check_that_shares_drop_as_the_whole(torch.randn(7, 5, 3))


def test_alone_nothing_is_exchanged() -> None:
    assert ALONE.leads and ALONE.alone and ALONE.gather(1.0, 2.0) == [(1.0, 2.0)]
    assert ALONE.lead(lambda: "done") == "done"
