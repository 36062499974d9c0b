"""The log of a run in TensorBoard: the same figures, each once, whatever happened on the way."""

from __future__ import annotations

import json
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtool.core.training.runs import RunFolder
from kvtool.errors import FileError
from training_cases import Hook, outcome, train

Shown = dict[str, list[tuple[str, int, float]]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What a TensorBoard would show of each folder: tags, steps and values."""
    folders: Shown = {}

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            Path(folder).mkdir(exist_ok=True)
            self.folder = folder
            folders[folder] = [event for event in folders.get(folder, []) if event[1] < purge_step]

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            folders[self.folder].append((tag, step, value))

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return folders


def logged(out: Path) -> list[tuple[str, int, float]]:
    """The log of a run as events."""
    events = []
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        figures = {f"valid/{name}": value for name, value in line.get("valid", {}).items()}
        if "loss" in line:
            figures = {f"train/{name}": line[name] for name in ("loss", "lr", "grad_norm")}
            figures["train/tokens_per_s"] = line["tokens"] / line["seconds"]
        events += [(name, line["step"], value) for name, value in figures.items()]
    return events


def stop_at(step: int) -> Hook:
    return Hook(step, lambda: signal.raise_signal(signal.SIGINT))


def fail_at(step: int) -> Hook:
    return Hook(step, lambda: 1 // 0)


def test_tensorboard_shows_the_log_and_changes_nothing(tmp_path: Path, shown: Shown) -> None:
    train(tmp_path / "a", tensorboard=True)
    train(tmp_path / "b")
    assert list(shown) == [str(tmp_path / "a" / "tensorboard")]
    events = shown[str(tmp_path / "a" / "tensorboard")]
    assert events == logged(tmp_path / "a")
    assert {tag for tag, *_ in events} == {
        *(f"train/{name}" for name in ("loss", "lr", "grad_norm", "tokens_per_s")),
        "valid/bits_per_char",
        "valid/nats_per_token",
    }
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert not (tmp_path / "b" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("watcher", "error"), [(stop_at, KeyboardInterrupt), (fail_at, ZeroDivisionError)]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_shows_each_event_once_those_from_before_it_was_asked_for_too(
    tmp_path: Path,
    shown: Shown,
    watcher: Callable[[int], Hook],
    error: type[BaseException],
    first: bool,
) -> None:
    with pytest.raises(error):
        train(tmp_path, watcher=watcher(11), tensorboard=first)
    train(tmp_path, resume=True, tensorboard=True)
    assert sorted(shown[str(tmp_path / "tensorboard")]) == sorted(logged(tmp_path))


def test_a_folder_of_events_that_cannot_be_made_is_named(tmp_path: Path, shown: Shown) -> None:
    with RunFolder(tmp_path, False, lambda _: None) as folder:
        (tmp_path / "tensorboard").touch()
        with pytest.raises(FileError, match="tensorboard: cannot be written"):
            folder.open_events(0)
