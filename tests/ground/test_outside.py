"""What lies in the folder that one stands in, or where others may write, decides nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import drawn
from cli_probe import HANGS
from kvtool.core.native import compiling
from kvtool.core.native.compiled import tools as numba_tools
from kvtool.files import model_folder, weights_folder
from kvtool.outside import STAND, elsewhere, made_private

MARK = "import pathlib; pathlib.Path({!r}).touch()\n"
SETTINGS = """
import os, sys, pathlib
{before}
from kvtool.core.native import compiling
from kvtool.core.native import arrays as native
import torch
assert native.layer_code(torch.float32) is not None
from kvtool.core.native.compiled import layers
import numba
pathlib.Path(".numba_config.yaml").write_text("opt: 1\\ncache_dir: evil\\n")
numba.njit(lambda x: x + 1)(1)
print(numba.config.OPT + 0, numba.config.CACHE_DIR or "none", layers.product.folder)
"""


def run_in(folder: Path, code: str, *words: str) -> str:
    """Run a script that lies elsewhere, standing in `folder`."""
    script = folder.parent / "script.py"
    script.write_text(code)
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder where one stands."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    return folder


# Settings of libraries


@pytest.mark.parametrize("before", ["", "import numba"])
def test_numba_takes_no_settings_from_where_one_stands_nor_later(
    hostile: Path, before: str
) -> None:
    (hostile / ".numba_config.yaml").write_text("opt: 0\ncache_dir: evil\n")
    optimises, cache, folder = run_in(hostile, SETTINGS.format(before=before)).split()
    assert (optimises, cache) == ("3", "none")
    assert folder.startswith(numba_tools.FOLDER)
    assert not (hostile / "evil").exists()


DRAW = Path(drawn.__file__).read_text()


def test_a_picture_is_the_same_whatever_settings_lie_about(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for folder in (hostile, home):
        (folder / "matplotlibrc").write_text("text.usetex: True\naxes.facecolor: red\n")
    monkeypatch.setenv("MPLCONFIGDIR", str(home))
    run_in(
        hostile,
        DRAW,
        str(tmp_path / "b.png"),
    )
    assert (tmp_path / "b.png").read_bytes() == drawn.draw(tmp_path / "a.png")


def test_settings_beside_the_user_that_nobody_writes_are_not_waited_for(hostile: Path) -> None:
    os.mkfifo(hostile / "matplotlibrc")
    out = hostile.parent / "a.png"
    run_in(hostile, DRAW, str(out))
    assert out.exists()


# Modules


def test_no_module_beside_the_user_is_taken_for_a_library(hostile: Path) -> None:
    for name in ("typer", "torch", "numba", "yaml", "sacrebleu"):
        (hostile / f"{name}.py").write_text(MARK.format(f"imported {name}"))
    command = [sys.executable, "-m", "kvtool", "generate", "--prompt", "x", "--max-tokens", "1"]
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(hostile.glob("imported*"))


SWEEP = """
from kvtool.core.verify.hf import sweep
from kvtool.core.verify.hf.task import Task
if __name__ == "__main__":
    sweep.PRELOADED.clear()
    print(sweep.judge_type(Task("no-such-type", (), (), 2, 0), 300).verdict)
"""


def test_the_processes_of_a_sweep_import_nothing_beside_the_user(hostile: Path) -> None:
    for name in ("multiprocessing", "socket", "selectors"):
        (hostile / f"{name}.py").write_text(MARK.format("imported"))
    run_in(hostile, SWEEP)
    assert not (hostile / "imported").exists()


def test_the_model_that_nobody_named_is_the_shipped_one(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (hostile / "shakespeare-2l").mkdir()
    monkeypatch.chdir(hostile)
    assert model_folder("") == weights_folder() / "shakespeare-2l"
    assert model_folder("shakespeare-2l") == weights_folder() / "shakespeare-2l"
    assert model_folder("./shakespeare-2l") == Path("shakespeare-2l")


# The way there and back


def test_one_stands_elsewhere_for_a_while_and_comes_back_also_after_an_error(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    with pytest.raises(ZeroDivisionError), elsewhere():
        assert Path.cwd() == STAND
        raise ZeroDivisionError
    assert Path.cwd() == hostile


def test_where_one_stands_there_is_nothing_to_import_or_to_obey() -> None:
    assert {path.suffix for path in STAND.iterdir()} == {".txt", ".md", ".xz", ".json"}
    assert [path.name for path in STAND.glob("*.json")] == ["architectures.json"]


def test_a_folder_that_is_gone_is_come_back_to(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    inode = hostile.stat().st_ino
    hostile.rmdir()
    with elsewhere():
        pass
    assert os.stat(".").st_ino == inode
    monkeypatch.undo()


# Where code is kept


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def open_to_group(folder: Path) -> None:
    os.chown(folder, -1, 12345)
    folder.chmod(0o775)


@pytest.mark.parametrize("spoil", [open_to_all, open_to_group])
def test_code_is_kept_where_nobody_else_can_write(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    above = tmp_path / "above"
    assert made_private(above / "a" / "b") == ""
    assert (above / "a" / "b").stat().st_mode & 0o777 == 0o700
    try:
        spoil(above)
    except PermissionError:
        pytest.skip("only root gives a folder to another group")
    assert made_private(above / "a" / "b") == f"others can write to {above}"
    above.chmod(0o1777)  # as /tmp
    assert made_private(above / "a" / "b") == ""
    (above / "a" / "b").chmod(0o755)
    assert made_private(above / "a" / "b") == f"others can reach {above / 'a' / 'b'}"


def test_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    for name in ("all", "own"):
        (tmp_path / name).mkdir(0o700)
    (tmp_path / "own" / "link").symlink_to(tmp_path / "all")
    (tmp_path / "all").chmod(0o777)
    assert made_private(tmp_path / "own" / "link" / "code") == f"others can write to {tmp_path}/all"


def test_a_folder_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made_private(tmp_path / "code") == ""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    owned = "" if os.getuid() == 0 else "belongs to another user"  # root's are trusted
    assert owned in made_private(tmp_path / "code")


def test_a_place_that_cannot_be_trusted_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    places = [Path("relative"), tmp_path / "open" / "code", tmp_path / "own"]
    monkeypatch.setattr(numba_tools, "_places", lambda: iter(places))
    assert numba_tools._chosen() == (str(tmp_path / "own"), "")
    places.pop()
    assert numba_tools._chosen() == ("", "relative depends on where one is")


def test_who_compiles_each_time_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_tools, "NOT_KEPT", "others can write to /x")
    assert compiling._how_often(Path("there")) == "once after an installation"
    said = "each time, as it cannot be kept (others can write to /x)"
    assert compiling._how_often(None) == said


def test_the_lock_of_kept_code_is_no_link(tmp_path: Path) -> None:
    (tmp_path / compiling.LOCK).symlink_to(tmp_path / "elsewhere")
    with compiling._alone(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
