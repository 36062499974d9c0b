"""A safetensors file; its whole header is checked before any tensor is read.

The format: 8 bytes with the length N (little-endian), N bytes of JSON, then the bytes of the
tensors without gaps (https://github.com/huggingface/safetensors#format). The safetensors library
parses the header too, but its errors name no tensor, and it allocates before sizes are known.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvtool.errors import FileError
from kvtool.reading import opened, parse_json, short

LARGEST_HEADER = 2**25  # bytes; 100,000 tensors take 10^7, and the reference allows 10^8
MOST_DIMENSIONS = 8  # so that a shape of a million numbers costs no time; weights have 1 or 2
MAPPED = 2**26  # bytes; from this size on a file is mapped into memory, not read
READ_AT_ONCE = 2**20
Digest = Callable[[], str]  # the SHA-256 of what was read, in hexadecimal; computed when called
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
# Constants that some versions of transformers stored with the weights: masks and rotary rates.
BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
BUFFER_DTYPES = {**DTYPES, "BOOL": torch.bool, "U8": torch.uint8}
# Dtypes that models of transformers store besides those of weights, as for position ids.
STORED_DTYPES = {
    **BUFFER_DTYPES,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class DamagedFile(FileError):
    """A file was cut short or changed, so another copy of it may be whole."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "Download or copy it again.")


@dataclass(frozen=True)
class TensorInfo:
    """The header's entry for one tensor; `begin` and `end` are bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The checked header of the regular file `path`; `read` loads the tensors.

    dtypes: the formats that its tensors may have, by their names in the header. resident: bytes of
    memory that `read` fills. Raises FileError for a damaged header, or one that contradicts the
    file's size.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self.path = path
        with opened(path, "safetensors") as file:
            size = file.seek(0, 2)
            file.seek(0)
            self._prefix = _read_prefix(file, size, path)
        spec, self.metadata = _parse(self._prefix[8:], path)
        self.tensors = {
            name: _tensor_info(name, entry, path, dtypes) for name, entry in spec.items()
        }
        _check_layout(self.tensors, len(self._prefix), size, path)
        self._size = size
        self.resident = 0 if size >= MAPPED else size - len(self._prefix)

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """All tensors as stored, on the CPU, and the digest of the file.

        A small file is read in one pass. A large one is mapped: its bytes are read when they are
        used, processes share them, and a page that is written to is copied first. Raises FileError
        if the file has changed since it was opened.
        """
        with opened(self.path, "safetensors") as file:
            # A training run may have replaced the file since its header was checked.
            if file.read(len(self._prefix)) != self._prefix:
                raise FileError(f"{self.path}: changed while it was read", "Try again.")
            return self._copied(file) if self.resident else self._mapped(file)

    def _copied(self, file: BufferedReader) -> tuple[dict[str, Tensor], Digest]:
        found = {}
        digest = hashlib.sha256(self._prefix)
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].begin):
            buffer = torch.empty(info.end - info.begin, dtype=torch.uint8)
            if file.readinto(buffer.numpy().data) != len(buffer):
                raise _shorter(self.path)
            digest.update(buffer.numpy().data)
            found[name] = buffer.view(info.dtype).view(info.shape)
        return found, digest.hexdigest

    def _mapped(self, file: BufferedReader) -> tuple[dict[str, Tensor], Digest]:
        digest = _FileDigest(file, self.path)
        if not faulthandler.is_enabled():
            # Whoever cuts the file short has this process killed as it reads on: not without words.
            with contextlib.suppress(OSError, ValueError):  # a stderr without a descriptor
                faulthandler.enable(sys.__stderr__ or sys.stderr)
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(pages) < self._size:
            raise _shorter(self.path)
        if hasattr(mmap, "MADV_WILLNEED"):
            pages.madvise(mmap.MADV_WILLNEED)  # the disk is read ahead, while the rest is checked
        found = {}
        for name, info in self.tensors.items():
            begin, n = len(self._prefix) + info.begin, info.end - info.begin
            if not n:
                found[name] = torch.empty(info.shape, dtype=info.dtype)
                continue
            stored = torch.frombuffer(pages, dtype=torch.uint8, count=n, offset=begin)
            aligned = stored if begin % info.dtype.itemsize == 0 else stored.clone()
            found[name] = aligned.view(info.dtype).view(info.shape)
        return found, digest


class _FileDigest:
    """The digest of an open file, which may be replaced meanwhile by another of its name.

    Raises FileError if its own bytes changed since; a file whose times alone did is read again, if
    it is known what it held before.
    """

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self.path = path
        self._handle = os.dup(file.fileno())
        self._seen = self._state()
        self._found = ""

    def __call__(self) -> str:
        known = self._found
        self._found = known or self._read()
        state = self._state()
        if state != self._seen:
            if not known or self._read() != known or self._state() != state:
                raise FileError(f"{self.path}: changed while it was used", "Run it again.")
            self._seen = state
        return self._found

    def _read(self) -> str:
        digest, position = hashlib.sha256(), 0
        while data := os.pread(self._handle, READ_AT_ONCE, position):
            digest.update(data)
            position += len(data)
        return digest.hexdigest()

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns

    def __del__(self) -> None:
        os.close(self._handle)


def _shorter(path: Path) -> FileError:
    return FileError(f"{path}: became shorter while it was read", "Try again.")


def _read_prefix(file: BinaryIO, size: int, path: Path) -> bytes:
    """The first bytes of the file: the length of the header, and the header."""
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if length_bytes.startswith(b"PK\x03\x04") and length > LARGEST_HEADER:
        raise FileError(
            f"{path}: is a zip archive (expected safetensors)",
            "If torch.save wrote it, name it model.pt.",
        )
    if length > size - 8:  # also if the file is too short for a length
        found = f"{size} bytes, expected {8 + max(length, 2)} or more"
        raise DamagedFile(f"{path}: is cut short or no safetensors file ({found})")
    if length > LARGEST_HEADER:
        raise FileError(
            f"{path}: has a header of {length} bytes (expected {LARGEST_HEADER} or fewer)"
        )
    return length_bytes + file.read(length)


def _parse(header: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of the tensors in a header, and its metadata. Raises FileError."""
    try:
        found = parse_json(header.decode())
    except ValueError as error:
        raise DamagedFile(f"{path}: its header is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: its header holds no JSON object (found {type(found).__name__})")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ in its header is not an object of strings")
    return found, metadata


def _tensor_info(
    name: str, entry: Any, path: Path, dtypes: Mapping[str, torch.dtype]
) -> TensorInfo:
    where = f"{path}: {short(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise DamagedFile(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = {**BUFFER_DTYPES, **dtypes} if BUFFERS.search(name) else dtypes
    if not isinstance(dtype, str) or dtype not in known:
        raise FileError(
            f"{where} has dtype {short(str(dtype))} (expected one of {', '.join(dtypes)})",
            "Weights are floating-point numbers." if dtypes == DTYPES else "",
        )
    if not _whole_numbers(shape) or len(shape) > MOST_DIMENSIONS:
        raise FileError(
            f"{where} has shape {short(str(shape))} "
            f"(expected up to {MOST_DIMENSIONS} whole numbers, none negative)"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileError(
            f"{where} has data_offsets {short(str(offsets))} (expected two rising whole numbers)"
        )
    begin, end = offsets
    nbytes = math.prod(shape) * known[dtype].itemsize
    if end - begin != nbytes:
        raise DamagedFile(
            f"{where} has {_digits(end - begin)} bytes "
            f"(expected {_digits(nbytes)} for {short(str(shape))} of {dtype})",
        )
    return TensorInfo(known[dtype], tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    # type() and not isinstance: bool is a subclass of int, and `true` is no size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _digits(number: int) -> str:
    """A number from a file as text; Python refuses to print more than 4,300 digits."""
    return str(number) if number < 2**64 else "more than 2^64"


def _check_layout(tensors: dict[str, TensorInfo], start: int, size: int, path: Path) -> None:
    """Raise FileError unless each byte after the header, from `start` on, is of just one tensor."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    needed = start + max((info.end for info in tensors.values()), default=0)
    if needed > size:
        raise DamagedFile(f"{path}: is cut short ({size} bytes, expected {_digits(needed)})")
    position = 0
    for name, info in ordered:
        if info.begin != position:
            what = "overlaps the tensor before it" if info.begin < position else "follows a gap"
            raise DamagedFile(
                f"{path}: {short(name)} {what} (starts at {info.begin}, expected {position})",
            )
        position = info.end
    if needed < size:
        raise DamagedFile(f"{path}: has {size - needed} bytes after the last tensor")
