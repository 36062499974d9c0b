"""A run, what a stranger left in its folder, and what is read of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtool.core.training import runs
from kvtool.core.training.runs import RunFolder
from kvtool.errors import FileError
from training_cases import train


def silent(_: str) -> None:
    pass


def opened(path: Path, resume: bool = False) -> RunFolder:
    return RunFolder(path, resume, silent)


def states(path: Path) -> list[Path]:
    """Oldest first."""
    return sorted(entry for entry in path.iterdir() if runs.STATE.fullmatch(entry.name))


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(FileError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


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
