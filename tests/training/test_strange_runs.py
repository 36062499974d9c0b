"""A run that a stranger handed over: it is resumed, or refused in one line, and all stays in it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kvtool import ending, files
from kvtool.core.training import runs
from kvtool.core.training.runs import RunFolder
from kvtool.errors import FileError
from run_cases import opened, refusal, states
from training_cases import outcome, train

FILES = (".lock", "run.json", "log.jsonl", "loss.png")
Plant = Callable[[Path, Path], None]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(tmp_path / "run", steps=4)
    (tmp_path / "run" / "loss.png").touch()
    return tmp_path / "run"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Files of the user's, and what may not become of them."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "file").write_text("mine")
    (folder / ".model.safetensors.ab_3xy9z.tmp").touch()
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    most = runs.MOST_LOG // len(line)
    (run / "log.jsonl").write_bytes(line * most)
    with patch.object(runs, "log_line", side_effect=lambda text: None) as asked:
        message = refusal(train, run, steps=4, resume=True)
    assert (
        message == f"{run / 'log.jsonl'}: is too long for the log of a run (more than 250,000 "
        "lines)"
    )
    assert asked.call_count == 250_000


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


# What states hold


def replaced(run: Path, change: Callable[[Any], Any], step: Callable[[], int] = lambda: 4) -> Path:
    """The newest state as a stranger would write it, with the right SHA-256."""
    newest = states(run)[-1]
    buffer = io.BytesIO()
    torch.save(change(torch.load(newest, weights_only=True)), buffer)
    newest.unlink()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    path = run / f"state-{step():09d}-{digest}.pt"
    path.write_bytes(buffer.getvalue())
    return path


def with_part(name: str, value: Any) -> Callable[[Any], Any]:
    return lambda state: {**state, name: value}


def in_part(part: str, **fields: Any) -> Callable[[Any], Any]:
    return lambda state: {**state, part: {**state[part], **fields}}


def moments(**fields: Any) -> Callable[[Any], Any]:
    def change(state: Any) -> Any:
        found = state["optimizer"]["state"][0]
        for name, value in fields.items():
            found[name] = torch.full_like(found[name], value) if type(value) is float else value
        return state

    return change


def model_tensor(change: Callable[[torch.Tensor], Any]) -> Callable[[Any], Any]:
    def changed(state: Any) -> Any:
        name = next(iter(state["model"]))
        return {**state, "model": {**state["model"], name: change(state["model"][name])}}

    return changed


STRANGE: dict[str, Callable[[Any], Any]] = {
    "a list": lambda state: [state],
    "a number": lambda state: 3,
    "nothing": lambda state: {},
    "no model": lambda state: {k: v for k, v in state.items() if k != "model"},
    "a model that is a text": with_part("model", "x"),
    "more tensors": in_part("model", more=torch.zeros(1)),
    "another shape": model_tensor(lambda x: x[:1]),
    "whole numbers": model_tensor(lambda x: x.to(torch.int64)),
    "no tensor": model_tensor(lambda x: 3),
    "sparse": model_tensor(lambda x: torch.zeros_like(x).to_sparse()),
    "one number for all": model_tensor(lambda x: torch.zeros(()).expand(x.shape)),
    "no moments": with_part("optimizer", {}),
    "moments in a list": with_part("optimizer", {"state": [], "param_groups": []}),
    "of other parameters": with_part("optimizer", {"state": {99: {}}, "param_groups": []}),
    "by a float": with_part("optimizer", {"state": {0.0: {}}, "param_groups": []}),
    "moments of another shape": moments(exp_avg=torch.zeros(3)),
    "a step that is a text": moments(step="1"),
    "no place": with_part("position", None),
    "a place without a step": with_part("position", {"epoch": 0}),
    "a step below zero": in_part("position", step=-1),
    "a step that is a flag": in_part("position", step=True),
    "a step without end": in_part("position", step=2**80),
    "a batch that is not there": in_part("position", batch=10**9),
    "seconds that are none": in_part("position", seconds=float("nan")),
    "a score in words": in_part("position", best_score="best"),
    "one thing more": in_part("position", more=1),
    "weights to average": lambda state: {**state, "recent": [state["model"]]},
    "an average of nothing": with_part("recent", 3),
    "another step than its name's": in_part("position", step=3),
    "more epochs than steps": in_part("position", epoch=2**53 - 1),
    "more tokens than any step has": in_part("position", tokens=2**53 - 1),
    "a million years": in_part("position", seconds=3e38),
    "a best step to come": in_part("position", best_step=5),
    "a best score of nothing": in_part("position", best_sha256=""),
    "a best of no score": in_part("position", best_score=None),
    "no moments behind steps": in_part("optimizer", state={}),
    "moments of a step below zero": moments(step=torch.tensor(-1.0)),
    "moments of half a step": moments(step=torch.tensor(1.5)),
    "moments of no number": moments(step=torch.tensor(float("nan"))),
    "moments of steps to come": moments(step=torch.tensor(9.0)),
    "squares below zero": moments(exp_avg_sq=-1.0),
    "moments that are not finite": moments(exp_avg=float("inf")),
    "weights that are not finite": model_tensor(lambda x: x / 0),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_state_that_the_run_cannot_have_written_is_refused_by_its_name(
    run: Path, kind: str
) -> None:
    path = replaced(run, STRANGE[kind])
    before = everything(run)
    message = refusal(train, run, steps=4, resume=True)
    assert message.startswith(f"{path}: ")
    assert message.endswith(". Start a new run, or remove that state.")
    assert "weights_only" not in message and "\n" not in message
    assert everything(run) == {**before, str(run / ".lock"): str(os.getpid()).encode()}


@pytest.mark.parametrize(
    "place", [{"step": 5}, {"step": 4, "epoch": 1, "batch": 1}, {"step": 4, "epoch": 2, "batch": 0}]
)
def test_a_state_behind_the_end_of_its_run_is_refused(
    tmp_path: Path, place: dict[str, int]
) -> None:
    place = dict(place)
    length = {"steps": 4} if place["step"] == 5 else {"epochs": 1}
    train(tmp_path, **length)
    last = int(states(tmp_path)[-1].name[6:15])
    for path in states(tmp_path)[:-1]:
        path.unlink()

    def change(state: Any) -> Any:
        place["step"] += last - 4
        for moments in state["optimizer"]["state"].values():
            moments["step"].fill_(place["step"])
        return in_part("position", **place)(state)

    replaced(tmp_path, change, lambda: place["step"])
    assert "stands behind the end of its run" in refusal(train, tmp_path, resume=True, **length)


def test_a_state_with_settings_of_an_optimizer_changes_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, steps=4)
    groups = [{"lr": 9.0, "betas": "x", "weight_decay": 1e9, "params": [0], "fused": "yes"}]
    replaced(
        tmp_path / "a", lambda s: {**s, "optimizer": {**s["optimizer"], "param_groups": groups}}
    )
    for name in ("a", "b"):
        path = tmp_path / name / "run.json"
        path.write_text(path.read_text().replace('"steps": 4', '"steps": 8'))
        train(tmp_path / name, steps=8, resume=True)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.parametrize("data", [b"PK\x03\x04", b"x" * 99, b"\x80\x02}q\x00."])
def test_a_state_that_is_no_file_of_torch_is_refused_in_words_of_ours(
    run: Path, data: bytes
) -> None:
    for path in states(run):
        path.unlink()
    digest = hashlib.sha256(data).hexdigest()[:16]
    (run / f"state-000000004-{digest}.pt").write_bytes(data)
    assert "is no state of a run (" in refusal(train, run, steps=4, resume=True)


def test_a_packed_state_is_not_unpacked(run: Path) -> None:
    import zipfile

    newest = states(run)[-1]
    packed = io.BytesIO()
    with zipfile.ZipFile(newest) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info) + bytes(2**20))
    newest.unlink()
    digest = hashlib.sha256(packed.getvalue()).hexdigest()[:16]
    (run / f"state-000000004-{digest}.pt").write_bytes(packed.getvalue())
    assert "is no state of a run (ValueError)" in refusal(train, run, steps=4, resume=True)


def test_a_state_beyond_the_memory_is_not_read(run: Path) -> None:
    digest = "0" * 16
    (run / f"state-000000099-{digest}.pt").touch()
    os.truncate(run / f"state-000000099-{digest}.pt", 2**43)
    with pytest.raises(Exception, match=r"needs 8.19e\+03 GiB"):
        train(run, steps=4, resume=True)


# What other files keep


def test_a_lock_of_results_is_not_taken_through_a_link(tmp_path: Path, other: Path) -> None:
    (tmp_path / "kept").symlink_to(other / "none")
    with pytest.raises(FileError, match="--resume kept: is a link"):
        files.take_lock(tmp_path / "kept", "--resume kept", "file")
    assert not (other / "none").exists()
