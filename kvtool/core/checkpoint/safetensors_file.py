"""A safetensors file; its whole header is checked before any tensor is read."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from kvtool.core.checkpoint import safetensors_header
from kvtool.core.checkpoint.safetensors_header import BUFFERS as BUFFERS
from kvtool.core.checkpoint.safetensors_header import DamagedFile as DamagedFile
from kvtool.core.checkpoint.safetensors_header import SafetensorsHeader
from kvtool.errors import FileError
from kvtool.reading import opened

MAPPED = 2**26  # bytes; from this size on a file is mapped into memory, not read
READ_AT_ONCE = 2**20
TensorInfo: TypeAlias = safetensors_header.TensorInfo[torch.dtype]
Digest = Callable[[], str]  # the SHA-256 of what was read, in hexadecimal; computed when called
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
BUFFER_DTYPES = {**DTYPES, "BOOL": torch.bool, "U8": torch.uint8}
# Dtypes that models of transformers store besides those of weights, as for position ids.
STORED_DTYPES = {
    **BUFFER_DTYPES,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class SafetensorsFile:
    """The checked header of the regular file `path`; `read` loads the tensors.

    dtypes: the formats that its tensors may have, by their names in the header. resident: bytes of
    memory that `read` fills. Raises FileError for a damaged header, or one that contradicts the
    file's size.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        header = SafetensorsHeader(path, dtypes, BUFFER_DTYPES, dtypes == DTYPES)
        self.path, self.metadata, self.tensors = path, header.metadata, header.tensors
        self._prefix, self._size = header.prefix, header.size
        self.resident = 0 if self._size >= MAPPED else self._size - len(self._prefix)

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
