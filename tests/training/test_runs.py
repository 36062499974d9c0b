"""The folder of a run: who may work in it, what it agrees to, and that no crash costs anything."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool.core.training import runs
from kvtool.core.training.runs import RunFolder
from kvtool.errors import FileError
from run_cases import opened, refusal, states
from training_cases import STEPS, TEXT, Hook, outcome, task, train

# Who may work in it


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "b") as folder:
        folder.agree({"lr": 0.1})
    assert json.loads((tmp_path / "a" / "b" / "run.json").read_text()) == {"lr": 0.1}


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    assert refusal(opened, tmp_path) == (
        f"--out {tmp_path}: is not empty (found holiday.jpg). "
        "Give --resume to go on with that run, or another folder."
    )
    assert "holds no run to resume" in refusal(opened, tmp_path, resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    train(tmp_path)
    before = outcome(tmp_path)
    assert "is not empty (found best)" in refusal(train, tmp_path)
    assert outcome(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_where_there_is_no_run_there_is_nothing_to_resume(tmp_path: Path, exists: bool) -> None:
    out = tmp_path if exists else tmp_path / "none"
    message = refusal(opened, out, resume=True)
    assert message == f"--out {out}: holds no run to resume. Leave out --resume."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [True, False])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refusal(opened, out, resume=resume)
        assert message.startswith(f"--out {out}: cannot be written (")
        assert message.endswith("). Give a folder, not a file.")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    code = (
        "import fcntl, os, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print(os.getpid(), file=lock, flush=True); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("resume", "started"), [(False, False), (False, True), (True, True)])
def test_a_folder_in_use_is_refused_with_the_process(
    tmp_path: Path, holder: subprocess.Popen[str], resume: bool, started: bool
) -> None:
    if started:
        (tmp_path / "run.json").write_text("{}")
    message = refusal(opened, tmp_path, resume=resume)
    assert message.startswith(f"--out {tmp_path}: in use by pid {holder.pid}. Wait for it")
    holder.kill()  # whoever dies lets go
    holder.wait()
    if started == resume:
        opened(tmp_path, resume).__exit__()


def test_two_runs_of_one_process_are_told_apart_too(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        assert f"in use by pid {os.getpid()}." in refusal(opened, tmp_path)
        folder.agree({})
    with opened(tmp_path, resume=True):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_disk_without_locks_is_named_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    assert "cannot be locked (No locks available)" in refusal(opened, tmp_path)


def test_what_a_killed_write_left_is_cleared_away_and_does_not_count(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "best"):
        folder.mkdir(exist_ok=True)
        (folder / ".model.safetensors.ab_3xy9z.tmp").touch()
        (folder / ".notes.tmp").touch()
    opened(tmp_path / "new").__exit__()
    (tmp_path / "new" / ".run.json.0123abcd.tmp").touch()
    opened(tmp_path / "new").__exit__()
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == [".lock"]
    (tmp_path / "run.json").write_text("{}")
    opened(tmp_path, resume=True).__exit__()
    left = {path.name for path in tmp_path.rglob("*.tmp")}
    assert left == {".notes.tmp"}


@pytest.mark.parametrize("before", [None, [], [".lock"], ["holiday.jpg"], ["run.json", ".lock"]])
@pytest.mark.parametrize("resume", [False, True])
def test_a_probe_refuses_what_opening_would_and_leaves_no_trace(
    tmp_path: Path, before: list[str] | None, resume: bool
) -> None:
    out = tmp_path / "a" / "b"
    if before is not None:
        out.mkdir(parents=True)
        for name in before:
            (out / name).touch()
    there = sorted(tmp_path.rglob("*"))
    try:
        RunFolder.probe(out, resume)
        said = ""
    except FileError as error:
        said = str(error)
    assert sorted(tmp_path.rglob("*")) == there
    assert said == (refusal(opened, out, resume) if said else "")
    if not said:
        opened(out, resume).__exit__()


def test_a_probe_sees_who_uses_the_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert f"in use by pid {holder.pid}." in refusal(RunFolder.probe, tmp_path, False)


# What it agrees to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.02}, "lr was 0.01 and is now 0.02"),
        ({"schedule": "constant"}, "schedule was 'cosine' and is now 'constant'"),
        ({"steps": 13}, "length.steps was 12 and is now 13"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"learn": task("ba" * 200)}, "data_sha256 was '"),
    ],
)
def test_a_resumed_run_with_other_settings_is_refused_by_their_name(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    train(tmp_path)
    before = outcome(tmp_path)
    message = refusal(train, tmp_path, resume=True, **changes)
    assert message.startswith(f"--resume: {said}") and "Resume with the settings" in message
    assert outcome(tmp_path) == before


def test_changed_data_are_told_by_the_start_of_their_hash(tmp_path: Path) -> None:
    train(tmp_path, steps=1)
    message = refusal(train, tmp_path, steps=1, resume=True, learn=task("ba" * 200))
    before, now = (task(text).facts()["data_sha256"][:8] for text in (TEXT, "ba" * 200))
    assert message == (
        f"--resume: data_sha256 was '{before}...' and is now '{now}...'. "
        "Resume with the settings, data and tokenizer that the run was started with."
    )


def test_a_difference_inside_a_setting_is_named_and_one_that_is_gone_too(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.agree({"model": {"d_model": 16, "norm": "rms"}, "tokenizer_sha256": "a"})
        folder.agree({"tokenizer_sha256": "a", "model": {"norm": "rms", "d_model": 16}})
        for facts, said in (
            (
                {"model": {"d_model": 32, "norm": "rms"}},
                "model.d_model was 16 and is now 32, tokenizer_sha256 was 'a' and is now None",
            ),
            (
                {"model": {"d_model": 16}, "tokenizer_sha256": "a"},
                "model.norm was 'rms' and is now None",
            ),
            ({"model": {"d_model": 16, "norm": "rms"}}, "tokenizer_sha256 was 'a' and is now None"),
        ):
            assert refusal(folder.agree, facts).startswith(f"--resume: {said}. ")


def test_a_run_from_before_a_setting_was_there_is_resumed_with_what_it_did(tmp_path: Path) -> None:
    hook = Hook(6, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "old", watcher=hook)
    path = tmp_path / "old" / "run.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in runs.BEFORE}))
    message = refusal(train, tmp_path / "old", resume=True, schedule="constant")
    assert "schedule was 'cosine' and is now 'constant'" in message
    train(tmp_path / "old", resume=True)
    train(tmp_path / "new")
    assert outcome(tmp_path / "old") == outcome(tmp_path / "new")


@pytest.mark.parametrize("text", ["", "[]", '{"lr": 0.01'])
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, text: str) -> None:
    train(tmp_path, steps=1)
    (tmp_path / "run.json").write_text(text)
    assert f"{tmp_path / 'run.json'}: " in refusal(train, tmp_path, steps=1, resume=True)


# States


def test_the_two_newest_states_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        for step in (3, 20, 100):
            folder.save_state(step, {"x": torch.tensor([step])})
        assert [int(path.name[6:15]) for path in states(tmp_path)] == [20, 100]
        state = folder.load_state()
    assert state is not None and state["x"].tolist() == [100]


def test_a_run_without_a_state_begins_at_the_beginning(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        assert folder.load_state() is None


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[:-1],
    "one bit": flip,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_kept_and_the_one_before_leads_to_the_same_bytes(
    tmp_path: Path, kind: str
) -> None:
    train(tmp_path)
    expected = outcome(tmp_path)
    newest = states(tmp_path)[-1]
    newest.write_bytes(bad := DAMAGE[kind](newest.read_bytes()))
    warnings: list[str] = []
    train(tmp_path, warn=warnings.append, resume=True)
    assert outcome(tmp_path) == expected
    assert len(warnings) == 1 and warnings[0].startswith(f"{newest}: is damaged")
    assert Path(f"{newest}.damaged").read_bytes() == bad
    assert [int(path.name[6:15]) for path in states(tmp_path)] == [8, STEPS]
    train(tmp_path, warn=warnings.append, resume=True)
    assert len(warnings) == 1  # once is enough


def test_a_state_that_cannot_be_read_is_as_good_as_damaged(tmp_path: Path) -> None:
    train(tmp_path)
    expected = outcome(tmp_path)
    newest = states(tmp_path)[-1]
    newest.unlink()
    newest.mkdir()
    train(tmp_path, resume=True)
    assert outcome(tmp_path) == expected


def test_if_all_states_are_damaged_nothing_is_trained_and_nothing_touched(tmp_path: Path) -> None:
    train(tmp_path)
    for path in states(tmp_path):
        path.write_bytes(flip(path.read_bytes()))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        warnings: list[str] = []
        message = refusal(train, tmp_path, warn=warnings.append, resume=True)
        assert message == f"--out {tmp_path}: every state in it is damaged. Start a new run."
        assert warnings == []
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_state_is_read_without_running_what_is_in_it(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "evil"),)

    buffer = io.BytesIO()
    torch.save({"model": Evil()}, buffer)
    with opened(tmp_path) as folder:
        folder.save_state(1, {})
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()[:16]
        (tmp_path / f"state-{2:09d}-{digest}.pt").write_bytes(data)
        assert "holds code objects, which kvtool never runs" in refusal(folder.load_state)
    assert not (tmp_path / "evil").exists()


def test_a_line_that_a_crash_cut_short_is_forgotten_with_all_later_steps(tmp_path: Path) -> None:
    lines = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 30, "loss": 0.5}]
    with opened(tmp_path) as folder:
        folder.rewind_log(5)
        assert not (tmp_path / "log.jsonl").exists()
        for line in lines:
            folder.log(**line)
        with open(tmp_path / "log.jsonl", "ab") as file:
            file.write(b'[1]\n12\n{"loss": 1}\n\x00\x00\xff\n{"step": 40, "lo')
        assert folder.read_log() == lines
        folder.rewind_log(20)
        assert folder.read_log() == lines[:2]
        text = "".join(json.dumps(line) + "\n" for line in lines[:2])
        assert (tmp_path / "log.jsonl").read_text() == text


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        (tmp_path / "log.jsonl").mkdir()
        assert "log.jsonl: cannot be written (Is a directory)" in refusal(folder.log, step=1)
