"""A state of training by whoever wrote it: what the run cannot have written is refused."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import run_cases
from run_cases import everything, refusal, states
from training_cases import outcome, train

run = run_cases.run


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
