"""A state_dict from torch.save, checked as far as possible before PyTorch reads it.

Only tensors are unpickled. `pickle_walk` bounds what PyTorch's reader would build. The archive must
look the same to two readers: PyTorch finds files in another way than Python, and neither checks
whether files overlap.
"""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvtool import ending
from kvtool.core.checkpoint.pickle_walk import PLAIN, Record, Refused, UnsafePickle, walk
from kvtool.core.checkpoint.safetensors_file import (
    BUFFER_DTYPES,
    BUFFERS,
    DTYPES,
    Digest,
    TensorInfo,
)
from kvtool.core.machine import require_memory
from kvtool.errors import FileError, KvtoolError, pass_on_shortage
from kvtool.reading import opened, sha256, short

WRAPPERS = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights
MAX_PICKLE_BYTES = 2**26  # bytes without values; a hundred thousand tensors take a tenth of it
SHARED = 8  # how many tensors may share one value, as embeddings and heads do
ZIP = b"PK\x03\x04"
END, END64, LOCATOR = 22, 56, 20  # bytes of a zip archive's last records
STEPS = 5  # pickles in the format before torch 1.6; the fourth has tensors, the fifth keys


class PickledFile:
    """The tensors of a regular file; since it has no header, opening reads all of it.

    Raises FileError if it is damaged or contains anything but tensors of `dtypes`, and
    CapacityError for too little memory.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self.path = path
        _check(path)
        self._state = _checked_state(_unpickle(path), path, dtypes)
        _check_held(self._state, path)
        self.tensors = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in self._state.items()
        }
        self.resident = sum(info.end for info in self.tensors.values())

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """All tensors, contiguous and each in its own memory, and the digest of the file."""
        # Stored views may share memory, be transposed or repeat a value; a model's weights may not.
        owners = Counter(t.untyped_storage().data_ptr() for t in self._state.values())
        found = {}
        for name, tensor in self._state.items():
            storage = tensor.untyped_storage()
            alone = owners[storage.data_ptr()] == 1 and storage.nbytes() == tensor.nbytes
            kept = tensor.detach().contiguous()
            found[name] = kept if alone else kept.clone()
        digest = sha256(self.path)
        return found, lambda: digest


# --- before torch sees it


def _check(path: Path) -> None:
    """Raise FileError or CapacityError for a file that torch.load must not read."""
    with opened(path, "weights") as file:
        zipped = file.read(len(ZIP)) == ZIP  # as torch tells the formats apart
        size = file.seek(0, 2)
        file.seek(0)
        try:
            (check_zip if zipped else _check_legacy)(file, size, path)
        except UnsafePickle as error:
            raise _code(path) from error
        except KvtoolError:
            raise
        except Exception as error:  # BadZipFile, but also UnicodeDecodeError, OSError and others
            pass_on_shortage(error)
            raise _damaged(path, error) from error


def check_zip(file: BinaryIO, size: int, path: Path, compressed: bool = True) -> None:
    """Check a zip archive of torch.save.

    compressed: whether it may be. Raises Refused, CapacityError or an error of zipfile, and
    ValueError if it is compressed and must not be.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch.load inflates, so a small file can expand to any size.
        nbytes = sum(entry.file_size for entry in entries)
        if nbytes > size and not compressed:
            raise ValueError("compressed")
        require_memory(str(path), nbytes, torch.device("cpu"))
        if _end_of_directory(file, size) != size:
            raise Refused("its table of contents is not where it says")
        names = {entry.filename.lower(): entry for entry in entries}  # PyTorch ignores case
        if len(names) < len(entries):
            raise Refused("two files have one name")
        _check_apart(entries, archive.start_dir)
        if any(name.endswith("/constants.pkl") for name in names):
            raise UnsafePickle("it is a TorchScript program")
        prefix = entries[0].filename.lower().partition("/")[0]
        pickled = names[f"{prefix}/data.pkl"]
        if pickled.file_size > MAX_PICKLE_BYTES:
            raise Refused("its pickle is too large")
        for record in walk(io.BytesIO(archive.read(pickled)))[1]:
            held = names.get(f"{prefix}/data/{record.key}".lower())
            if held is None or held.file_size != record.nbytes:
                raise Refused(f"{short(record.key)} has other values than it says")


def _end_of_directory(file: BinaryIO, size: int) -> int:
    """The end of an archive as its own records give it: the directory, and the records after it.

    These must be the last bytes, without a comment, in which a reader might find another end.
    Raises Refused.
    """
    file.seek(max(size - END64 - LOCATOR - END, 0))
    tail = file.read()
    end, locator, record = tail[-END:], tail[-END - LOCATOR : -END], tail[: -END - LOCATOR]
    length, offset, comment = struct.unpack("<LLH", end[12:])
    if end[:4] != b"PK\x05\x06" or comment:
        raise Refused("it does not end as torch.save ends it")
    if not locator.startswith(b"PK\x06\x07"):
        return int(offset + length + END)
    length, offset = struct.unpack("<QQ", record[40:])  # zip64, for many or large files
    return int(offset + length + END64 + LOCATOR + END)


def _check_apart(entries: list[zipfile.ZipInfo], end: int) -> None:
    """Raise Refused if files of an archive overlap each other or its directory."""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in ordered[1:]] + [end]
    for entry, after in zip(ordered, ends, strict=True):
        if entry.header_offset + 30 + entry.compress_size > after:
            raise Refused("files in it overlap")


def _check_legacy(file: BinaryIO, size: int, path: Path) -> None:
    """As `check_zip`, for the format before torch 1.6: pickles, then the values."""
    require_memory(str(path), size, torch.device("cpu"))
    head = file.read(MAX_PICKLE_BYTES)
    if _begins_a_tar(head):
        raise Refused("it is a tar archive")
    stream = io.BytesIO(head)
    found = [walk(stream) for _ in range(STEPS)]
    magic, version, _, _, keys = (value for value, _ in found)
    if type(magic) is not int or type(version) is not int:
        raise Refused("it does not begin as torch.save begins it")
    if not isinstance(keys, list) or not all(isinstance(key, PLAIN) for key in keys):
        raise Refused("its keys are no list of strings")
    records: dict[str, Record] = {record.key: record for record in found[3][1]}
    if sum(record.nbytes for record in records.values()) > size:
        raise Refused("it has fewer values than it says")


def _begins_a_tar(head: bytes) -> bool:
    """Whether it looks like a tar archive, the still older format, which PyTorch also reads."""
    try:
        tarfile.TarInfo.frombuf(head[:512], tarfile.ENCODING, "surrogateescape")
    except tarfile.TarError:
        return False
    return True


# --- by torch


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), ending.signals_at_default():
            warnings.simplefilter("ignore")  # on protocols, and on what is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises many types, from EOFError to KeyError
        pass_on_shortage(error)
        # PyTorch's message is left out: it suggests weights_only=False, which runs the file's code.
        raise _damaged(path, error) from error


def _code(path: Path) -> FileError:
    return FileError(
        f"{path}: holds code objects, which kvtool never runs (expected tensors)",
        "Save a state_dict or safetensors.",
    )


def _damaged(path: Path, error: Exception) -> FileError:
    why = str(error) if isinstance(error, Refused) else type(error).__name__
    return FileError(
        f"{path}: is damaged or no PyTorch file ({why})",
        "Save a state_dict or safetensors.",
    )


def _checked_state(found: Any, path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The state_dict, unwrapped, if it has only ordinary tensors. Raises FileError."""
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(dict.get(found, name), dict):
            found = found[name]
    if not isinstance(found, dict):
        raise FileError(f"{path}: holds no state_dict (found {type(found).__name__})")
    # By dict's method: the attributes of an ordered dictionary may hide its own methods.
    found = dict(dict.items(found))
    for name, tensor in found.items():
        where = f"{path}: {short(str(name))}"
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FileError(f"{where} is of type {type(tensor).__name__} (expected a named tensor)")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise FileError(f"{where} is {tensor.layout} on {tensor.device} (expected dense)")
        known = {**BUFFER_DTYPES, **dtypes} if BUFFERS.search(name) else dtypes
        if tensor.dtype not in known.values():
            raise FileError(
                f"{where} has dtype {str(tensor.dtype).removeprefix('torch.')} "
                f"(expected one of {', '.join(dtypes)})",
                "Weights are floating-point numbers.",
            )
    return found


def _check_held(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise FileError for tensors with far more elements than stored values.

    A stride of 0 repeats a value without limit, so the file's size would bound nothing.
    """
    storages = (tensor.untyped_storage() for tensor in state.values())
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    said = sum(tensor.nbytes for tensor in state.values())
    if said > SHARED * held + 2**20:
        raise FileError(
            f"{path}: its tensors repeat values (they have {said:,} bytes, but it holds {held:,})",
            "Save contiguous copies of them.",
        )
