"""Arrays in a .safetensors or .npz file by somebody else: all of its headers before any array.

What a file holds is known, and can be refused, before it costs memory: an archive of a megabyte may
unpack to gigabytes, and a file of gigabytes may be a hole on the disk.
"""

from __future__ import annotations

import io
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from kvtool.core.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from kvtool.core.machine import dtype_name
from kvtool.errors import FileError, first_line, pass_on_shortage
from kvtool.reading import opened, short

BLOCK = 1 << 20  # bytes that are unpacked at once
LARGEST_LIST = 1 << 20  # bytes, of the list of an archive's members: some ten thousand
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # all that NumPy writes
WHOLE_NUMBERS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class ArrayInfo:
    """What a file says of an array; `dtype` in NumPy's words."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def __str__(self) -> str:
        return f"{self.dtype} {short(str(list(self.shape)))}"


class ArrayFile(ABC):
    """What a file holds by name, as its headers say, and its texts. Raises FileError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays: dict[str, ArrayInfo] = {}
        self.texts: dict[str, str] = {}

    @abstractmethod
    def read(self) -> dict[str, np.ndarray]:
        """All arrays. Raises FileError for a file that is not what its headers say."""


class SafetensorsArrays(ArrayFile):
    """Those of a .safetensors file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = SafetensorsFile(path, {**DTYPES, **WHOLE_NUMBERS})
        self.texts = self._file.metadata
        for name, info in self._file.tensors.items():
            nbytes = info.end - info.begin
            self.arrays[name] = ArrayInfo(dtype_name(info.dtype), info.shape, nbytes)

    def read(self) -> dict[str, np.ndarray]:
        return {name: tensor.numpy() for name, tensor in self._file.read()[0].items()}


class NpzArrays(ArrayFile):
    """Those of an .npz file as NumPy writes one: a zip archive of .npy files of plain numbers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self._archive() as archive:
            for member in archive.infolist():
                name = self._checked_name(member)
                with archive.open(member) as file:
                    self.arrays[name], *_ = self._header(name, file, member.file_size)

    def read(self) -> dict[str, np.ndarray]:
        found = {}
        with self._archive() as archive:
            for member in archive.infolist():
                name = self._checked_name(member, again=True)
                with archive.open(member) as file:
                    info, dtype, by_columns = self._header(name, file, member.file_size)
                    if self.arrays.get(name) != info:
                        raise FileError(f"{self.path}: changed while it was read", "Try again.")
                    values = np.frombuffer(_unpacked(file, info.nbytes), dtype)
                    order: Literal["F", "C"] = "F" if by_columns else "C"
                    found[name] = values.reshape(info.shape, order=order)
        return found

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        what = "not an .npz file"
        with opened(self.path, "an .npz file") as file:
            try:
                with zipfile.ZipFile(InPieces(file.raw)) as archive:
                    what = "not an .npz file of plain arrays"
                    yield archive
            except FileError:
                raise
            except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds between them
                pass_on_shortage(error)
                raise FileError(f"{self.path}: is {what} ({first_line(error)})") from error

    def _checked_name(self, member: zipfile.ZipInfo, again: bool = False) -> str:
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise FileError(f"{self.path}: {short(name)!r} in it is no array (expected NAME.npy)")
        if name in self.arrays and not again:
            raise FileError(f"{self.path}: holds {short(name)} twice")
        if member.compress_type not in METHODS:
            raise FileError(f"{self.path}: {short(name)} is packed in a way that NumPy does not")
        return name

    def _header(
        self, name: str, file: IO[bytes], size: int
    ) -> tuple[ArrayInfo, np.dtype[Any], bool]:
        """What the header says of an array, which has `size` bytes with it: also the exact format
        of its values, and whether they stand column by column."""
        version = np.lib.format.read_magic(file)
        if version != (1, 0):  # the header of later ones, for names of fields, may be of any length
            raise FileError(f"{self.path}: {short(name)} is not an array of plain numbers")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            found = short(str(dtype))
            raise FileError(f"{self.path}: {short(name)} is {found} (expected plain numbers)")
        nbytes = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or nbytes != size - file.tell():
            raise FileError(
                f"{self.path}: {short(name)} has {size - file.tell()} bytes (not as many as "
                f"{dtype} {short(str(list(shape)))} has)"
            )
        return ArrayInfo(dtype.name, tuple(shape), nbytes), dtype, by_columns


def _unpacked(file: IO[bytes], nbytes: int) -> bytearray:
    """The `nbytes` that are left of a member of an archive, whose checksum is compared then."""
    found, at = bytearray(nbytes), 0
    while block := file.read(BLOCK):
        if at + len(block) > nbytes:
            raise zipfile.BadZipFile("a member is longer than it says")
        found[at : at + len(block)] = block
        at += len(block)
    if at < nbytes:
        raise zipfile.BadZipFile("a member is shorter than it says")
    return found


class InPieces(io.BufferedReader):
    """A file of which nobody reads much at once: zipfile reads a list of members as a whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and 0 <= size <= LARGEST_LIST:
            return super().read(size)
        data = super().read(LARGEST_LIST + 1)
        if len(data) > LARGEST_LIST:
            raise zipfile.BadZipFile("its list of members is too long")
        return data


def open_arrays(path: Path) -> ArrayFile:
    """The arrays of a file, by its suffix. Raises FileError."""
    if path.suffix == ".npz":
        return NpzArrays(path)
    if path.suffix == ".safetensors":
        return SafetensorsArrays(path)
    found = path.suffix or "no suffix"
    raise FileError(f"--reference {path}: {found} (expected .safetensors or .npz)")
