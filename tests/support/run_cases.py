"""Folders of runs, as tests open them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtool.core.training import runs
from kvtool.core.training.runs import RunFolder
from kvtool.errors import FileError


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
