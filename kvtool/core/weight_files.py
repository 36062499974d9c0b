"""The weights in a checkpoint's folder, in whichever form they are: one file, shards, or a pickle.

`open_weights` finds them and says what there is, from headers alone where the form has any; `read`
then yields the tensors.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvtool.core.machine import require_memory
from kvtool.core.safetensors_file import (
    BUFFER_DTYPES,
    BUFFERS,
    DTYPES,
    SafetensorsFile,
    TensorInfo,
)
from kvtool.errors import FileError, pass_on_shortage
from kvtool.reading import opened, read_json_object, sha256, short

WEIGHTS = "model.safetensors"
INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
PICKLES = ("model.pt", "pytorch_model.bin")
NAMES_SHOWN = 10
WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights

# What a download may leave in place of the file. Neither can start a valid file of ours.
LOOKALIKES = {
    b"version https://git-lfs": ("a Git LFS pointer", "Run git lfs pull to fetch the file itself."),
    b"<!doctype": ("an HTML page", "Download the file itself, not the page that shows it."),
    b"<html": ("an HTML page", "Download the file itself, not the page that shows it."),
}


class WeightFile(Protocol):
    """Tensors that can be looked at before they are read; all that it raises is FileError."""

    path: Path  # for error messages
    tensors: dict[str, TensorInfo]

    def read(self) -> tuple[dict[str, Tensor], str]:
        """All tensors, on the CPU, contiguous, and a SHA-256 of the file(s) in hexadecimal."""


def open_weights(folder: Path) -> WeightFile:
    """The weights in `folder`; safetensors are preferred. Raises FileError if there are none."""
    # lexists: a broken link is an error about that file, not a reason to take another one.
    if os.path.lexists(folder / WEIGHTS):
        return _open_safetensors(folder / WEIGHTS)
    if os.path.lexists(folder / INDEX):
        return ShardedFile(folder / INDEX, _open_safetensors)
    for name in PICKLES:
        if os.path.lexists(folder / name):
            return PickledFile(folder / name)
    if os.path.lexists(folder / PICKLED_INDEX):
        return ShardedFile(folder / PICKLED_INDEX, PickledFile)
    raise FileError(f"{folder / WEIGHTS}: not found (expected weights)", "Copy them there.")


def refuse_lookalike(path: Path, what: str) -> None:
    """Raise FileError unless `path` is a file, and not a pointer or web page in place of one."""
    with opened(path, what) as file:
        head = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, (found, hint) in LOOKALIKES.items():
        if head.startswith(start):
            raise FileError(f"{path}: is {found} (expected {what})", hint)


def _open_safetensors(path: Path) -> SafetensorsFile:
    refuse_lookalike(path, "weights")
    return SafetensorsFile(path)


def require_tensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
) -> None:
    """Raise FileError unless `tensors` are those of `shapes`; the `optional` ones may be absent."""
    required = [name for name in shapes if name not in optional]
    missing = [name for name in required if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    if missing:
        raise FileError(
            f"{path}: lacks {len(missing)} of {len(required)} tensors ({_listed(missing)})",
            f"It holds others instead: {_listed(extra)}." if extra else "",
        )
    if extra:
        raise FileError(
            f"{path}: holds {len(extra)} tensors that the model of config.json does not have "
            f"({_listed(extra)})"
        )
    for name, expected in shapes.items():
        found = tensors[name].shape if name in tensors else expected
        if found != expected:
            raise _wrong_shape(f"{path}: {name}", found, expected)


def _wrong_shape(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> FileError:
    transposed = len(found) == 2 and found == expected[::-1]
    return FileError(
        f"{where} has shape {list(found)} (expected {list(expected)})",
        "It looks transposed: GPT-2's own matrices are (inputs, outputs), all others the reverse."
        if transposed
        else "config.json implies that shape: is it of the same model?",
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(short(name) for name in names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ..."


def folder_sha256(folder: Path) -> str | None:
    """The SHA-256 of the weights in a folder, as `WeightFile.read` has it; None without any."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        digests = [sha256(path) for path in sorted(folder.glob(pattern))]
        if digests:
            return _together(digests) if digests[1:] else digests[0]
    return None


def _together(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


class ShardedFile:
    """Several files that `open_shard` opens, and an index that says which tensor is in which."""

    def __init__(self, path: Path, open_shard: Callable[[Path], WeightFile]) -> None:
        self.path = path
        refuse_lookalike(path, "an index of weights")
        places = _weight_map(path)
        names = sorted(set(places.values()))
        self._shards = [open_shard(path.parent / name) for name in names]
        self.tensors: dict[str, TensorInfo] = {}
        for name, shard in zip(names, self._shards, strict=True):
            _check_shard(path, name, places, set(shard.tensors))
            self.tensors |= shard.tensors

    def read(self) -> tuple[dict[str, Tensor], str]:
        """The SHA-256 is of the shards' own SHA-256s, in the order of their names."""
        found: dict[str, Tensor] = {}
        digests = []
        for shard in self._shards:
            tensors, digest = shard.read()
            found |= tensors
            digests.append(digest)
        return found, _together(digests)


def _weight_map(path: Path) -> dict[str, str]:
    """The index's table of tensor -> shard. Raises FileError before any shard is opened."""
    places = read_json_object(path, "an index of weights").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise FileError(f"{path}: weight_map is not an object of file names")
    for tensor, name in places.items():
        # isprintable: a NUL or half a surrogate pair is in no file's name, and breaks open().
        if not name.isprintable() or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise FileError(
                f"{path}: places {short(tensor)} in {short(repr(name))} (expected a file name)",
                "Shards lie beside their index; kvtool opens nothing elsewhere.",
            )
    return places


def _check_shard(index: Path, shard: str, places: Mapping[str, str], held: set[str]) -> None:
    listed = {tensor for tensor, place in places.items() if place == shard}
    if listed - held:
        tensor = min(listed - held)
        raise FileError(f"{index}: places {short(tensor)} in {shard}, which does not hold it")
    if held - listed:
        tensor = min(held - listed)
        if tensor in places:
            raise FileError(
                f"{index}: places {short(tensor)} in {places[tensor]}, but {shard} holds one too"
            )
        raise FileError(f"{index}: does not list {short(tensor)}, which {shard} holds")


class PickledFile:
    """A state_dict that torch.save wrote. It has no header, so that opening it reads it.

    Nothing but tensors is ever unpickled: a file that asks for more is refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_lookalike(path, "weights")
        require_memory(str(path), _unpacked_size(path), torch.device("cpu"))
        self._state = _checked_state(_unpickle(path), path)
        self.tensors = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in self._state.items()
        }

    def read(self) -> tuple[dict[str, Tensor], str]:
        # Views may share memory, be transposed or repeat one value; a model owns its weights.
        found = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format)
            for name, tensor in self._state.items()
        }
        return found, sha256(self.path)


def _unpacked_size(path: Path) -> int:
    """In bytes. torch.load also inflates, so that a small file can stand for any amount."""
    try:
        if not zipfile.is_zipfile(path):
            return path.stat().st_size  # the format before torch 1.6, or damaged: torch.load tells
        with zipfile.ZipFile(path) as archive:
            return sum(info.file_size for info in archive.infolist())
    except Exception as error:  # BadZipFile, but also UnicodeDecodeError, struct.error and others
        raise _damaged_pickle(path, error) from error


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on TorchScript, which is refused in the next line
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything, from EOFError to KeyError
        pass_on_shortage(error)
        # torch's text is left out: it recommends weights_only=False, which runs the file's code.
        refused = isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error)
        if refused or "TorchScript" in str(error):
            raise FileError(
                f"{path}: holds code objects, which kvtool never runs (expected tensors)",
                "Save a state_dict or safetensors.",
            ) from error
        raise _damaged_pickle(path, error) from error


def _damaged_pickle(path: Path, error: Exception) -> FileError:
    return FileError(
        f"{path}: is damaged or no PyTorch file ({type(error).__name__})",
        "Save a state_dict or safetensors.",
    )


def _checked_state(found: Any, path: Path) -> dict[str, Tensor]:
    """The state_dict itself, unwrapped, if it holds ordinary tensors alone."""
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict):
        raise FileError(f"{path}: holds no state_dict (found {type(found).__name__})")
    for name, tensor in found.items():
        where = f"{path}: {short(str(name))}"
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FileError(f"{where} is of type {type(tensor).__name__} (expected a named tensor)")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise FileError(f"{where} is {tensor.layout} on {tensor.device} (expected dense)")
        known = BUFFER_DTYPES if BUFFERS.search(name) else DTYPES
        if tensor.dtype not in known.values():
            raise FileError(
                f"{where} has dtype {str(tensor.dtype).removeprefix('torch.')} "
                f"(expected one of {', '.join(DTYPES)})",
                "Weights are floating-point numbers.",
            )
    return found
