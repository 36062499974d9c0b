"""A state_dict that torch.save wrote, of which all is checked that can be before torch reads it.

Nothing but tensors is ever unpickled. What torch's reader would build is bounded (`pickle_walk`),
and the archive is one that two readers see alike: torch's finds a file in another way than Python's
does, and neither looks whether files overlap.
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
from kvtool.core.checkpoint.pickle_walk import PLAIN, Foreign, Record, Refused, walk
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
MOST_PICKLE = 2**26  # bytes, without the values; a hundred thousand tensors take a tenth of it
SHARED = 8  # how often tensors may share one value: embeddings and heads do
ZIP = b"PK\x03\x04"
END, END64, LOCATOR = 22, 56, 20  # bytes of a zip archive's last records
STEPS = 5  # pickles of the format before torch 1.6; tensors are in the fourth, keys in the fifth


class PickledFile:
    """The tensors of a regular file. It has no header, so that opening it reads it.

    Raises FileError for one that asks for more than tensors of `dtypes`, or is damaged.
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
        """All tensors, contiguous, each with memory of its own, and the digest of the file."""
        # Views may share memory, be transposed or repeat one value; a model owns its weights.
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
    """Raise FileError, or CapacityError, for what torch.load may not be given."""
    with opened(path, "weights") as file:
        zipped = file.read(len(ZIP)) == ZIP  # as torch tells the formats apart
        size = file.seek(0, 2)
        file.seek(0)
        try:
            (check_zip if zipped else _check_legacy)(file, size, path)
        except Foreign as error:
            raise _code(path) from error
        except KvtoolError:
            raise
        except Exception as error:  # BadZipFile, but also UnicodeDecodeError, OSError and others
            pass_on_shortage(error)
            raise _damaged(path, error) from error


def check_zip(file: BinaryIO, size: int, path: Path, compressed: bool = True) -> None:
    """Raise Refused, CapacityError, or what zipfile raises, for an archive; ValueError for one that
    is compressed where it must not be."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch.load inflates, so that a small file can stand for any amount.
        nbytes = sum(entry.file_size for entry in entries)
        if nbytes > size and not compressed:
            raise ValueError("compressed")
        require_memory(str(path), nbytes, torch.device("cpu"))
        if _end_of_directory(file, size) != size:
            raise Refused("its table of contents is not where it says")
        names = {entry.filename.lower(): entry for entry in entries}  # torch ignores the case
        if len(names) < len(entries):
            raise Refused("two files have one name")
        _check_apart(entries, archive.start_dir)
        if any(name.endswith("/constants.pkl") for name in names):
            raise Foreign("it is a TorchScript program")
        prefix = entries[0].filename.lower().partition("/")[0]
        pickled = names[f"{prefix}/data.pkl"]
        if pickled.file_size > MOST_PICKLE:
            raise Refused("its pickle is too large")
        for record in walk(io.BytesIO(archive.read(pickled)))[1]:
            held = names.get(f"{prefix}/data/{record.key}".lower())
            if held is None or held.file_size != record.nbytes:
                raise Refused(f"{short(record.key)} has other values than it says")


def _end_of_directory(file: BinaryIO, size: int) -> int:
    """Where an archive ends by its own word: its table of contents, and the records after it. They
    are its last bytes, with no comment, where a reader might find another end. Raises Refused."""
    file.seek(max(size - END64 - LOCATOR - END, 0))
    tail = file.read()
    end, locator, record = tail[-END:], tail[-END - LOCATOR : -END], tail[: -END - LOCATOR]
    length, offset, comment = struct.unpack("<LLH", end[12:])
    if end[:4] != b"PK\x05\x06" or comment:
        raise Refused("it does not end as torch.save ends it")
    if not locator.startswith(b"PK\x06\x07"):
        return int(offset + length + END)
    length, offset = struct.unpack("<QQ", record[40:])  # of an archive of many or large files
    return int(offset + length + END64 + LOCATOR + END)


def _check_apart(entries: list[zipfile.ZipInfo], end: int) -> None:
    """Raise Refused unless each file of an archive has bytes of its own, before the table."""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in ordered[1:]] + [end]
    for entry, after in zip(ordered, ends, strict=True):
        if entry.header_offset + 30 + entry.compress_size > after:
            raise Refused("files in it overlap")


def _check_legacy(file: BinaryIO, size: int, path: Path) -> None:
    """The same of the format before torch 1.6: pickles, and then the values."""
    require_memory(str(path), size, torch.device("cpu"))
    head = file.read(MOST_PICKLE)
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
    """As the format before that did, which torch still looks for."""
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
    except Exception as error:  # a damaged file raises almost anything, from EOFError to KeyError
        pass_on_shortage(error)
        # torch's text is left out: it recommends weights_only=False, which runs the file's code.
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
    """The state_dict itself, unwrapped, if it holds ordinary tensors alone."""
    for name in WRAPPERS:
        if isinstance(found, dict) and isinstance(dict.get(found, name), dict):
            found = found[name]
    if not isinstance(found, dict):
        raise FileError(f"{path}: holds no state_dict (found {type(found).__name__})")
    # By dict's own method: an ordered dictionary has attributes, which may hide its methods.
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
    """Raise FileError for tensors that stand for far more values than there are: a stride of 0
    repeats one without end, and the file's size would bound nothing."""
    storages = (tensor.untyped_storage() for tensor in state.values())
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    said = sum(tensor.nbytes for tensor in state.values())
    if said > SHARED * held + 2**20:
        raise FileError(
            f"{path}: its tensors repeat values (they have {said:,} bytes, but it holds {held:,})",
            "Save contiguous copies of them.",
        )
