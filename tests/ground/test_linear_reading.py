"""Headers and indices of many names: the work grows with their number, and not with its square."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from kvtool.core.checkpoint.weight_files import open_weights
from kvtool.errors import FileError

ENTRY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of Python run, each turn of a comprehension counted."""
    lines = 0

    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        with contextlib.suppress(FileError):
            work()
    finally:
        sys.settrace(before)
    return lines


def write_header(path: Path, text: str) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode())


def one_file(folder: Path, n: int) -> Path:
    write_header(folder / "model.safetensors", json.dumps({f"t{i}": ENTRY for i in range(n)}))
    return folder


def shards(folder: Path, n: int) -> Path:
    """Each tensor in a file of its own."""
    for i in range(n):
        write_header(folder / f"s{i}", json.dumps({f"t{i}": ENTRY}))
    index = {"weight_map": {f"t{i}": f"s{i}" for i in range(n)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def shards_that_hold_none(folder: Path, n: int) -> Path:
    """The first of many shards lacks all that is listed in it."""
    index = {"weight_map": {f"t{i}": "s0" for i in range(n)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_header(folder / "s0", json.dumps({f"u{i}": ENTRY for i in range(n)}))
    return folder


@pytest.mark.parametrize("make", [one_file, shards, shards_that_hold_none])
def test_twice_the_names_take_twice_the_work(
    make: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, n in ((few, 200), (many, 400)):
        folder.mkdir()
        make(folder, n)
    assert lines_of(lambda: open_weights(many)) < 2.2 * lines_of(lambda: open_weights(few))


def test_a_name_that_occurs_twice_among_sixty_thousand_is_found(tmp_path: Path) -> None:
    """By sorting: looking for each among all took half a minute."""
    path = tmp_path / "model.safetensors"
    entry = json.dumps(ENTRY)
    names = [f"t{i}" for i in range(60_000)]
    write_header(path, "{" + ",".join(f'"{name}":{entry}' for name in [*names, "t777"]) + "}")
    with pytest.raises(FileError, match=r"is not valid JSON \(t777 occurs twice\)"):
        SafetensorsFile(path)


def test_a_shard_that_nobody_asked_for_is_refused_before_the_next_is_opened(
    tmp_path: Path,
) -> None:
    """Many names may be links to one large header."""
    folder = shards(tmp_path, 3)
    (folder / "s1").unlink()
    (folder / "s1").symlink_to("s0")
    (folder / "s2").write_bytes(b"no shard")
    with pytest.raises(FileError, match="places t1 in s1, which does not hold it"):
        open_weights(folder)


def test_a_shards_name_is_one_that_a_file_can_have(tmp_path: Path) -> None:
    index = {"weight_map": {"t": 10**6 * "x"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="expected a file name") as caught:
        open_weights(tmp_path)
    assert len(str(caught.value)) < 1000
