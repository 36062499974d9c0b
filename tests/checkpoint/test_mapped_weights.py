"""A large file of weights is mapped into memory, and not copied."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from checkpoint_cases import load, put_together, same, saved, take_apart
from cli_probe import HANGS
from kvtool.core import machine
from kvtool.core.checkpoint import checkpoint, safetensors_file
from kvtool.core.checkpoint.pickled_file import PickledFile
from kvtool.core.checkpoint.safetensors_file import SafetensorsFile
from kvtool.core.checkpoint.weight_files import is_finite
from kvtool.errors import CapacityError, CheckFailed, FileError, UsageError

WEIGHTS = "model.safetensors"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights in a file that is as large as those that are mapped."""
    saved(tmp_path)
    monkeypatch.setattr(safetensors_file, "MAPPED", 1)
    return tmp_path / WEIGHTS


def test_a_mapped_file_has_the_tensors_and_the_digest_of_one_that_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, digest = SafetensorsFile(path).read()
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "MAPPED", 2**40)
        read, other = SafetensorsFile(path).read()
    assert same(mapped, read)
    assert digest() == other() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_lie_in_the_file_until_they_are_written_to(path: Path) -> None:
    before = path.read_bytes()
    tensors, _ = SafetensorsFile(path).read()
    first, second = (t.untyped_storage().data_ptr() for t in list(tensors.values())[:2])
    begins = [info.begin for info in SafetensorsFile(path).tensors.values()]
    assert second - first == begins[1] - begins[0]  # in one run, as in the file
    for tensor in tensors.values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_a_file_that_another_takes_the_place_of_stays_what_it_was(path: Path) -> None:
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    tensors, digest = SafetensorsFile(path).read()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes()[:-4] + bytes(4))
    os.replace(other, path)
    assert same(tensors, kept)
    assert digest() == expected


def test_a_file_that_was_overwritten_while_it_was_used_has_no_digest(path: Path) -> None:
    loaded = checkpoint.load(str(path.parent), torch.device("cpu"), torch.float32)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(bytes(4))
    os.utime(path, ns=(1, 1))  # clocks of file systems may stand still for ten milliseconds
    with pytest.raises(FileError, match="changed while it was used"):
        _ = loaded.sha256


def test_a_file_that_was_overwritten_after_its_digest_was_read_has_none_any_more(
    path: Path,
) -> None:
    loaded = checkpoint.load(str(path.parent), torch.device("cpu"), torch.float32)
    digest = loaded.sha256
    os.utime(path, ns=(1, 1))  # whose bytes are the same
    assert loaded.digest() == digest
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(bytes(4))
    os.utime(path, ns=(2, 2))
    with pytest.raises(FileError, match="changed while it was used"):
        loaded.digest()


CUT = """
import pathlib, torch
from kvtool.core.checkpoint import safetensors_file
safetensors_file.MAPPED = 0
path = pathlib.Path({path!r})
tensors, _ = safetensors_file.SafetensorsFile(path).read()
path.open("r+b").truncate(0)
print(max(float(tensor.sum()) for tensor in tensors.values()))
"""


def test_a_file_that_is_cut_short_while_it_is_used_does_not_kill_without_words(
    path: Path, warm_python: Callable[..., str]
) -> None:
    command = [warm_python(), "-c", CUT.format(path=str(path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr and "<string>" in done.stderr


def test_a_digest_is_computed_when_it_is_asked_for_and_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load(str(path.parent), torch.device("cpu"), torch.float32)
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(given) or pread(*given))
    assert not read
    assert loaded.sha256 == loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [position for _, _, position in read] == [0, path.stat().st_size]


def test_a_file_that_changed_between_check_and_mapping_is_noticed(path: Path) -> None:
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="became shorter while it was read"):
        file.read()
    path.write_bytes(b"\0" * 100)
    with pytest.raises(FileError, match="changed while it was read"):
        file.read()


def test_tensors_that_do_not_lie_at_multiples_of_their_size_are_copied(path: Path) -> None:
    header, data = take_apart(path)
    name = min(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"][0])
    text = json.dumps(header)
    text += " " * (len(text) % 2 == 0)  # an odd length, which nobody but us would write
    expected, _ = SafetensorsFile(path).read()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    odd = path.with_name("odd.safetensors")
    put_together(odd, text, data)
    found, _ = SafetensorsFile(odd).read()
    assert same(found, expected)
    assert found[name].data_ptr() % 4 == 0


def test_what_is_mapped_needs_memory_for_what_is_made_of_it_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = sum(info.end - info.begin for info in SafetensorsFile(path).tensors.values())
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2 * n)
    assert load(path.parent, dtype=torch.float64)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 2 * n - 1)
    with pytest.raises(CapacityError):
        load(path.parent, dtype=torch.float64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_seen(value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(5, 7, dtype=dtype)
    assert is_finite(tensor)
    assert is_finite(torch.empty(0, 3, dtype=dtype))
    tensor[3, 2] = value
    assert not is_finite(tensor)


def test_nan_in_a_file_comes_before_what_the_conversion_made(path: Path) -> None:
    tensors, _ = SafetensorsFile(path).read()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    first, last = min(tensors), max(tensors)
    tensors[first].view(-1)[0] = 1e6  # beyond float16
    rewrite(path, tensors)
    with pytest.raises(UsageError, match=f"--dtype float16: 1 values of {first} are beyond"):
        load(path.parent, dtype=torch.float16)
    tensors[last].view(-1)[:2] = float("nan")
    rewrite(path, tensors)
    with pytest.raises(CheckFailed, match=f"{last} holds 2 NaN or infinite values$"):
        checkpoint.load(str(path.parent), torch.device("cpu"), torch.float16, check=True)


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other values of the same shapes."""
    path.write_bytes(safetensors.torch.save(tensors))


def test_of_a_pickle_only_tensors_that_share_memory_are_copied(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "own": torch.ones(3),
        "view": whole[1:],
        "turned": whole.T,
        "part": torch.ones(9)[3:],
    }
    torch.save(tensors, tmp_path / "model.pt")
    file = PickledFile(tmp_path / "model.pt")
    found, _ = file.read()
    kept = {name for name in found if found[name].data_ptr() == file._state[name].data_ptr()}
    assert kept == {"own"}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(
        t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in found.values()
    )
