"""A run that a stranger handed over: it is resumed, or refused in one line, and all stays in it."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

import run_cases
from kvtool import ending, files
from kvtool.core.training import runs
from kvtool.core.training.runs import RunFolder
from kvtool.errors import FileError
from run_cases import everything, opened, refusal
from training_cases import train

run, other = run_cases.run, run_cases.other


FILES = (".lock", "run.json", "log.jsonl", "loss.png")
Plant = Callable[[Path, Path], None]


def refused(run: Path, entry: str) -> str:
    """What probing and opening say of it, the same, without a trace."""
    before = sorted(run.rglob("*"))
    said = {refusal(RunFolder.probe, run, True), refusal(opened, run, resume=True)}
    assert sorted(run.rglob("*")) == before
    (message,) = said
    assert message.startswith(f"{run / entry}: is ")
    return message


@pytest.mark.parametrize("entry", [*FILES, "state-000000009-0123456789abcdef.pt"])
@pytest.mark.parametrize("target", ["file", "none"])
def test_a_file_of_a_run_that_is_a_link_is_refused_and_not_followed(
    run: Path, other: Path, entry: str, target: str
) -> None:
    (run / entry).unlink(missing_ok=True)
    (run / entry).symlink_to(other / target)
    before = everything(other)
    assert refused(run, entry).endswith("is a link (expected a file of this run)")
    assert everything(other) == before


@pytest.mark.parametrize("entry", ["best", "last", "tensorboard"])
def test_a_folder_of_a_run_that_is_a_link_is_refused_and_not_followed(
    run: Path, other: Path, entry: str
) -> None:
    if (run / entry).exists():
        (run / entry).rename(run.parent / entry)
    (run / entry).symlink_to(other)
    before = everything(other)
    assert refused(run, entry).endswith("is a link (expected a folder of this run)")
    assert everything(other) == before


@pytest.mark.parametrize("entry", ["best/config.json", "last/new", "tensorboard/events"])
def test_nor_may_links_be_inside(run: Path, other: Path, entry: str) -> None:
    (run / "tensorboard").mkdir()
    (run / entry).unlink(missing_ok=True)
    (run / entry).symlink_to(other / "file")
    assert "is a link" in refused(run, entry)
    assert (other / "file").read_text() == "mine"


@pytest.mark.parametrize("entry", [*FILES, "best", "state-000000009-0123456789abcdef.pt"])
def test_nobody_waits_for_a_fifo_in_a_run(run: Path, entry: str) -> None:
    path = run / entry
    path.rename(run.parent / "moved") if path.exists() else None
    os.mkfifo(path)
    assert "neither a file nor a folder" in refused(run, entry)


def test_a_link_that_is_no_part_of_the_run_is_the_users_own(run: Path, other: Path) -> None:
    (run / "notes").symlink_to(other)
    opened(run, resume=True).__exit__()


def test_a_new_run_does_not_follow_a_lock_that_is_a_link(tmp_path: Path, other: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").symlink_to(other / "file")
    assert "is a link" in refusal(opened, out)
    assert (other / "file").read_text() == "mine"


def test_a_lock_with_another_name_is_not_emptied(run: Path, other: Path) -> None:
    (run / ".lock").unlink()
    os.link(other / "file", run / ".lock")
    message = refusal(opened, run, resume=True)
    assert "has another name elsewhere, a hard link" in message
    assert (other / "file").read_text() == "mine"


def test_other_names_of_what_is_replaced_keep_what_they_hold(run: Path, other: Path) -> None:
    kept = {}
    for path in (p for p in run.rglob("*") if p.is_file() and p.name != ".lock"):
        os.link(path, other / f"of {path.parent.name} {path.name}")
    kept = everything(other)
    path = run / "run.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 8'))
    kept[str(other / f"of {run.name} run.json")] = path.read_bytes()
    train(run, steps=8, resume=True)
    assert everything(other) == kept


def test_a_log_that_gets_another_name_meanwhile_is_not_added_to(run: Path, other: Path) -> None:
    with opened(run, resume=True) as folder:
        os.link(run / "log.jsonl", other / "log")
        before = (other / "log").read_bytes()
        assert "hard link" in refusal(folder.log, step=1)
    assert (other / "log").read_bytes() == before


def test_a_run_in_a_folder_that_the_user_named_by_a_link_is_his(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    train(tmp_path / "link", steps=4, resume=True)


def test_probing_empties_no_lock_and_removes_nothing(run: Path) -> None:
    (run / ".run.json.0123abcd.tmp").touch()
    before = everything(run)
    RunFolder.probe(run, True)
    assert everything(run) == before


# What the log holds


SPOILT = [
    '{"step": true, "loss": 1}',
    '{"step": -1, "loss": 1}',
    '{"step": 1.5, "loss": 1}',
    '{"step": 1e3, "loss": 1}',
    f'{{"step": {2**63}, "loss": 1}}',
    '{"step": 1, "loss": "2"}',
    '{"step": 1, "loss": null}',
    '{"step": 1, "loss": [1]}',
    '{"step": 1, "loss": NaN}',
    '{"step": 1, "loss": 1e999}',
    '{"step": 1, "loss": 1e300}',
    '{"step": 1, "loss": 1, "loss": 2}',
    '{"step": 1, "valid": 3}',
    '{"step": 1, "valid": [["loss", 1]]}',
    '{"step": 1, "averaged": {"per": "x"}}',
    '{"step": 1, "averaged": {"per": {"a": 1}}}',
    '{"step": 1, "tokens": 5, "seconds": "0"}',
    '{"step": ' + "[" * 5000 + "]" * 5000 + "}",
    '{"step": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("line", SPOILT, ids=range(len(SPOILT)))
def test_a_line_of_the_log_that_is_none_is_passed_over(tmp_path: Path, line: str) -> None:
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "valid": {"per": 1}, "seconds": 0.5}]
    with opened(tmp_path) as folder:
        for fields in good:
            folder.log(**fields)
        with open(tmp_path / "log.jsonl", "a") as file:
            file.write(line + "\n")
        assert folder.read_log() == good
        folder.rewind_log(5)
    assert [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()] == good


def test_a_log_of_any_size_is_not_read(run: Path) -> None:
    os.truncate(run / "log.jsonl", 2**40)
    assert "is too large for the log of a run" in refusal(train, run, steps=4, resume=True)


@pytest.mark.parametrize("line", [b"\n", b'{"step": 1}\n'])
def test_a_log_of_more_lines_than_a_run_writes_is_refused_unread(run: Path, line: bytes) -> None:
    (run / "log.jsonl").write_bytes(line * (runs.MAX_LINES + 9_999))
    asked = itertools.count()  # a Mock keeps each call

    def log_line(text: bytes) -> None:
        next(asked)

    with patch.object(runs, "log_line", log_line):
        message = refusal(train, run, steps=4, resume=True)
    assert (
        message == f"{run / 'log.jsonl'}: is too long for the log of a run (more than 250,000 "
        "lines)"
    )
    assert next(asked) == 250_000


def test_a_line_without_end_is_no_line_of_the_log(run: Path) -> None:
    good = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(b'{"step": 1, "loss": 1' + b" " * 2**16 + b"}\n" + good)
    train(run, steps=4, resume=True)
    assert (run / "log.jsonl").read_bytes() == good


def test_a_signal_that_got_lost_ends_the_reading_of_a_long_log(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(run, resume=True) as folder:
        monkeypatch.setattr(ending._signals, "pending", ending.End.TERMINATED)
        folder.read_log()  # a short one is read, for the plot of a run that was stopped
        (run / "log.jsonl").write_bytes(b"\n" * runs.CHECKED_EVERY)
        with pytest.raises(ending.Ended):
            folder.read_log()


@pytest.mark.parametrize("entry", [*FILES, "best", "last", "tensorboard"])
def test_a_folder_in_place_of_a_file_is_refused_and_a_file_in_place_of_a_folder(
    run: Path, entry: str
) -> None:
    path, is_file = run / entry, entry in FILES
    path.rename(run.parent / "moved") if path.exists() else None
    path.mkdir() if is_file else path.touch()
    found, expected = ("a folder", "a file") if is_file else ("a file", "a folder")
    assert refused(run, entry).endswith(f"is {found} (expected {expected} of this run)")


def test_thousands_of_damaged_states_are_told_in_one_line(run: Path) -> None:
    for step in range(10, 310):
        (run / f"state-{step:09d}-0123456789abcdef.pt").touch()
    told: list[str] = []
    train(run, told.append, steps=4, resume=True)
    assert told == [
        f"{run / 'state-000000309-0123456789abcdef.pt'}: is damaged (its SHA-256 is not that of "
        "its name), and so are 299 more; going back"
    ]


def test_a_damaged_state_that_cannot_be_set_aside_is_told_in_one_line(run: Path) -> None:
    name = "state-000000009-0123456789abcdef.pt"
    (run / name).touch()
    (run / f"{name}.damaged").mkdir()
    message = refusal(train, run, steps=4, resume=True)
    assert message.startswith(f"{run / name}: cannot be renamed to {name}.damaged (")


# What run.json holds


@pytest.mark.parametrize(
    "text", ['{"lr": {"a": [1]}}', '{"lr": 1, "lr": 1}', "3", "[" * 5000, '{"a": ' + "[" * 400]
)
def test_settings_of_wrong_types_are_refused_in_one_line(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    message = refusal(train, run, steps=4, resume=True)
    assert "\n" not in message and len(message) < 600


def test_settings_without_end_are_told_in_part(run: Path) -> None:
    (run / "run.json").write_text(json.dumps({f"x{i}": i for i in range(10_000)}))
    message = refusal(train, run, steps=4, resume=True)
    assert " more. Resume with" in message and len(message) < 600


# What other files keep


def test_a_lock_of_results_is_not_taken_through_a_link(tmp_path: Path, other: Path) -> None:
    (tmp_path / "kept").symlink_to(other / "none")
    with pytest.raises(FileError, match="--resume kept: is a link"):
        files.take_lock(tmp_path / "kept", "--resume kept", "file")
    assert not (other / "none").exists()
