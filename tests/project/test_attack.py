"""`make attack`: faults are made from numbers; what is no answer and no refusal is an escape."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtool import app
from small_models import save_decoder

sys.path.append(str(Path(__file__).parents[1] / "attack"))
import attacks_around  # noqa: F401
import attacks_files  # noqa: F401
import attacks_runs  # noqa: F401
import attacks_sizes  # noqa: F401
import attacks_tokenizers  # noqa: F401
import attacks_weights  # noqa: F401
from arena import ATTACKS
from judge import Limits, why_not_held
from mutants import mutate
from storm import storm
from subjects import SAYS, Subject

ROOM = Limits(seconds=1.0, memory=2**20)
REFUSED = "kvtool: error: a.json: is empty\n"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = save_decoder(tmp_path_factory.mktemp("sound") / "own")
    names = tuple(sorted(path.name for path in folder.iterdir()))
    return Subject("own", folder, names, ("generate", "--model", "{}", *SAYS), 1)


@pytest.fixture
def parallel_rust_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield


def test_no_two_attacks_have_one_name() -> None:
    names = [(attack.kind, attack.name) for attack in ATTACKS]
    assert len(names) > 200 and len(set(names)) == len(names)


def test_a_number_makes_one_mutant_and_others_make_others(tmp_path: Path, subject: Subject) -> None:
    def mutant(seed: int, place: str) -> tuple[str, dict[str, Any]]:
        folder = subject.copied(tmp_path / place)
        said = mutate(folder, list(subject.names), seed)
        small = [p for p in folder.iterdir() if p.is_file() and p.stat().st_size < 2**24]
        files = {p.name: p.read_bytes() for p in small if not p.is_symlink()}
        return said, files

    of_bytes = [seed for seed in range(40) if "bytes" in mutant(seed, "a")[0]]
    assert len(of_bytes) > 5
    assert all(mutant(seed, "a") == mutant(seed, "b") for seed in of_bytes)
    assert len({str(mutant(seed, "a")) for seed in of_bytes}) == len(of_bytes)


@pytest.mark.parametrize(
    ("code", "out", "err"), [(0, "text", ""), (1, "mismatch", ""), (2, "", REFUSED)]
)
def test_an_answer_and_a_refusal_in_one_line_are_held(code: int, out: str, err: str) -> None:
    assert why_not_held(code, out, err, 0.1, 0, ROOM) == ""


@pytest.mark.parametrize(
    ("code", "err", "why"),
    [
        (139, "", "it ended with 139"),
        ("ValueError came through", "", "it ended with ValueError"),
        (2, "Traceback (most recent call last):\n  x\nKeyError: 1\n", "a traceback: KeyError"),
        (2, "thread '<unnamed>' panicked at x\n" + REFUSED, "a traceback"),
        (2, "", "0 error lines"),
        (2, REFUSED * 2, "2 error lines"),
        (2, "UserWarning: something\n" + REFUSED, "something else was said"),
        (2, REFUSED.replace("a.json", "\x1b[31m"), "the control character"),
        (2, REFUSED.replace("a.json", "a" * 3000), "a line of"),
        (1, "", "the answer was no, without a word"),
        (0, REFUSED, "an error, and exit 0"),
    ],
)
def test_whatever_else_a_command_does_is_an_escape(code: int | str, err: str, why: str) -> None:
    assert why_not_held(code, "", err, 0.1, 0, ROOM).startswith(why)


def test_time_and_memory_are_bounded() -> None:
    assert why_not_held(2, "", REFUSED, 2.0, 0, ROOM).startswith("it took 2 s")
    assert why_not_held(2, "", REFUSED, 0.1, 2**22, ROOM).startswith("it took 4 MiB")


@pytest.mark.usefixtures("parallel_rust_off")
def test_mutants_are_loaded_or_refused_in_one_line(tmp_path: Path, subject: Subject) -> None:
    assert app.run(subject.argv(subject.folder)) == 0  # all is loaded before a process is forked
    found = storm([subject], 60, tmp_path, jobs=1)
    assert found.escapes == []
    counts = found.counts["own"]
    assert sum(counts.values()) == 60 and counts["loaded"] and counts["refused"] > 20


@pytest.mark.usefixtures("parallel_rust_off")
def test_a_command_that_dies_or_lets_an_error_through_is_found(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str]) -> int:
        folder = Path(argv[2])
        if not (folder / "config.json").is_file():
            raise KeyError("config.json")
        if sorted(path.name for path in folder.iterdir()) != sorted(subject.names):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    monkeypatch.setattr(app, "run", run)
    shutil.rmtree(tmp_path / "job0", ignore_errors=True)
    found = storm([subject], 120, tmp_path, jobs=1)
    assert any("KeyError came through" in escape for escape in found.escapes)
    assert any("the process died (-9)" in escape for escape in found.escapes)
    assert sum(found.counts["own"].values()) == 120
