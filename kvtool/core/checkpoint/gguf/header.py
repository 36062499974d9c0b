"""The header of a GGUF file, checked to the last tensor before any is read. Imports no torch.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, the numbers
of tensors and of fields; the fields; name, shape and format of each tensor; then the tensors,
aligned. The package `gguf` has a reader too, but it makes an array of every token, and its errors
name no tensor.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any

from kvtool.core.checkpoint.gguf.formats import FORMATS, Format
from kvtool.errors import FileError
from kvtool.reading import opened, quoted, short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 2**28  # bytes; a vocabulary of 262,144 tokens with its merges has 2^23
MAX_ITEMS = 2**22  # items of a list; the merges of the largest vocabularies are 600,000
MAX_TENSORS = 2**18
LONGEST_NAME = 256  # bytes, of a tensor; ggml itself has 64
MAX_DIMENSIONS = 4
ALIGNMENT = 32  # bytes, unless general.alignment is given
FILE_TYPE = "general.file_type"
ALL_F32 = 0  # of general.file_type
AGAIN = "Download or copy it again."
TYPES = {  # by number: how struct spells it
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
UINT32, STRING, LIST = 4, 8, 9  # the others that are named


@dataclass(frozen=True)
class Field:
    """One field of the metadata, and where it begins and ends in the file, its name included."""

    name: str
    type: int
    value: Any  # texts are bytes
    begin: int
    end: int
    items: int = -1  # the type of a list's items


@dataclass(frozen=True)
class TensorField:
    """One tensor's entry in the header. `begin` and `end` count bytes from the file's start."""

    name: str
    format: Format
    shape: tuple[int, ...]  # as in NumPy: the last dimension is contiguous
    begin: int
    end: int

    @property
    def n_values(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class GGUFHeader:
    """The checked header of the regular file `path`.

    Raises FileError for a file that is not GGUF, has another byte order, is one part of several or
    cut short, and for a header that contradicts itself or the file's size. No memory is allocated
    for sizes that it only claims.
    """

    def __init__(self, path: Path, flag: str = "") -> None:
        self.path = path
        self.where = f"{flag} {path}".strip()
        with opened(path, "a GGUF file", flag) as file:
            self.size = file.seek(0, 2)
            file.seek(0)
            reader = _Reader(file, self.size, self.where)
            n_tensors, n_fields = self._read_start(reader)
            self.fields = self._read_fields(reader, n_fields)
            self._refuse_part()
            self.alignment = self._read_alignment()
            found = self._read_tensors(reader, n_tensors)
            self.start = _aligned(reader.position, self.alignment)  # of the first tensor
        self.tensors = self._placed(found)

    def _read_start(self, reader: _Reader) -> tuple[int, int]:
        magic = reader.take(4) if self.size >= 4 else b""
        if magic != MAGIC:
            raise FileError(f"{self.where}: is not a GGUF file (begins with {quoted(magic)})")
        (self.version,) = reader.unpack("I")
        if self.version & 0xFFFF == 0 and self.version:
            raise FileError(
                f"{self.where}: is a GGUF file for big-endian machines (expected little-endian)",
                "Convert it first: gguf-convert-endian of the package gguf.",
            )
        if self.version not in VERSIONS:
            raise FileError(f"{self.where}: is GGUF of version {self.version} (expected 2 or 3)")
        n_tensors, n_fields = reader.unpack("QQ")
        if n_tensors > MAX_TENSORS:
            raise FileError(f"{self.where}: claims {n_tensors} tensors (at most {MAX_TENSORS})")
        return n_tensors, n_fields

    def _read_fields(self, reader: _Reader, n_fields: int) -> dict[str, Field]:
        found: dict[str, Field] = {}
        for _ in range(n_fields):
            field = reader.field()
            if field.name in found:
                raise FileError(f"{self.where}: has the field {short(field.name)} twice")
            found[field.name] = field
        return found

    def _refuse_part(self) -> None:
        n = self.fields.get("split.count")
        if n is not None and n.value != 1:
            raise FileError(
                f"{self.where}: is one part of a model in {n.value} files",
                "Merge them first: llama-gguf-split --merge FIRST-PART MERGED.gguf",
            )

    def _read_alignment(self) -> int:
        field = self.fields.get("general.alignment")
        n = ALIGNMENT if field is None else field.value
        if field is not None and (field.type != UINT32 or not 1 <= n <= 2**20 or n & (n - 1)):
            raise FileError(f"{self.where}: general.alignment is {n} (expected a power of two)")
        return int(n)

    def _read_tensors(self, reader: _Reader, n_tensors: int) -> list[TensorField]:
        found = []
        for _ in range(n_tensors):
            name = reader.name(LONGEST_NAME)
            where = f"{self.where}: {short(name)}"
            (n_dimensions,) = reader.unpack("I")
            if not 1 <= n_dimensions <= MAX_DIMENSIONS:
                raise FileError(
                    f"{where} has {n_dimensions} dimensions (expected 1 to {MAX_DIMENSIONS})"
                )
            shape = reader.unpack("Q" * n_dimensions)[::-1]
            number, offset = reader.unpack("IQ")
            format_ = FORMATS.get(number)
            if format_ is None:
                raise FileError(f"{where} has the unknown format {number}", "Is kvtool too old?")
            if not all(shape) or math.prod(shape) >= 2**56 or offset >= 2**62:
                raise FileError(f"{where} has shape {list(shape)} at {offset}, which no file holds")
            if shape[-1] % format_.block:
                raise FileError(
                    f"{where} has rows of {shape[-1]} values "
                    f"(expected a multiple of {format_.block}, as it is {format_.name})"
                )
            nbytes = math.prod(shape) // format_.block * format_.nbytes
            found.append(TensorField(name, format_, shape, offset, offset + nbytes))
        return found

    def _placed(self, found: list[TensorField]) -> dict[str, TensorField]:
        """Tensors by name, in the file's order; each byte belongs to one of them at most."""
        tensors: dict[str, TensorField] = {}
        for t in found:
            if t.name in tensors:
                raise FileError(f"{self.where}: holds {short(t.name)} twice")
            if t.begin % self.alignment:
                expected = f"expected a multiple of {self.alignment}"
                raise FileError(f"{self.where}: {short(t.name)} is at {t.begin} ({expected})")
            tensors[t.name] = TensorField(
                t.name, t.format, t.shape, self.start + t.begin, self.start + t.end
            )
        end = self.start
        for t in sorted(tensors.values(), key=lambda t: t.begin):
            if t.begin < end:
                raise FileError(f"{self.where}: {short(t.name)} overlaps the tensor before it")
            end = t.end
        if tensors and end > self.size:
            raise FileError(
                f"{self.where}: is cut short ({self.size} bytes, expected {end})", AGAIN
            )
        return tensors

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field, texts decoded. Raises FileError for one that is not UTF-8."""
        field = self.fields.get(name)
        return default if field is None else self._decoded(name, field.value)

    def _decoded(self, name: str, value: Any) -> Any:
        try:
            if isinstance(value, bytes):
                return value.decode()
            if isinstance(value, list) and value and isinstance(value[0], bytes):
                return [item.decode() for item in value]
        except UnicodeDecodeError as error:
            raise FileError(f"{self.where}: {name} is not UTF-8 ({error.reason})") from error
        return value

    @cached_property
    def architecture(self) -> str:
        """The value of general.architecture. Raises FileError if it is missing."""
        found = self.get("general.architecture")
        if not isinstance(found, str) or not found:
            raise FileError(f"{self.where}: general.architecture is missing")
        return found

    def in_order(self) -> list[TensorField]:
        """The tensors in the order of their bytes in the file."""
        return sorted(self.tensors.values(), key=lambda t: t.begin)

    def formats(self) -> dict[str, list[TensorField]]:
        """The tensors by the name of their format, the format with the most bytes first."""
        found: dict[str, list[TensorField]] = {}
        for t in self.tensors.values():
            found.setdefault(t.format.name, []).append(t)
        return dict(sorted(found.items(), key=lambda item: -sum(t.end - t.begin for t in item[1])))


class _Reader:
    """Reads a header forwards. Sizes that it claims must fit into the rest of the file."""

    def __init__(self, file: BufferedReader, size: int, where: str) -> None:
        self.file, self.where = file, where
        self.position, self.end = 0, min(size, LARGEST_HEADER)
        self.is_whole = size <= LARGEST_HEADER

    def require(self, n: int) -> None:
        """Raise FileError if there are not `n` more bytes."""
        if n > self.end - self.position:
            if not self.is_whole:
                most = LARGEST_HEADER >> 20
                raise FileError(f"{self.where}: has a header of more than {most} MiB")
            raise FileError(f"{self.where}: is cut short, or damaged, within its header", AGAIN)

    def take(self, n: int) -> bytes:
        """The next `n` bytes."""
        self.require(n)
        data = self.file.read(n)
        if len(data) != n:
            raise FileError(f"{self.where}: became shorter while it was read", "Try again.")
        self.position += n
        return data

    def unpack(self, kinds: str) -> tuple[Any, ...]:
        """Numbers, little-endian, without gaps."""
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))

    def text(self) -> bytes:
        """A length, and as many bytes."""
        return self.take(self.unpack("Q")[0])

    def name(self, most: int) -> str:
        """A text that names something."""
        data = self.text()
        try:
            name = data.decode()
        except UnicodeDecodeError as error:
            raise FileError(f"{self.where}: has a name that is not UTF-8", AGAIN) from error
        if len(data) > most or not name.isprintable():
            raise FileError(f"{self.where}: {quoted(name)} names nothing (found {len(data)} bytes)")
        return name

    def field(self) -> Field:
        """A name, a type and a value."""
        begin = self.position
        name = self.name(2**16 - 1)
        (kind,) = self.unpack("I")
        if kind == LIST:
            inner, n = self.unpack("IQ")
            return Field(name, kind, self._items(inner, n, name), begin, self.position, inner)
        if kind != STRING and kind not in TYPES:
            raise FileError(f"{self.where}: {short(name)} has the unknown type {kind}", AGAIN)
        value = self.text() if kind == STRING else self.unpack(TYPES[kind])[0]
        return Field(name, kind, value, begin, self.position)

    def _items(self, inner: int, n: int, name: str) -> list[Any]:
        if n > MAX_ITEMS:
            expected = f"expected {MAX_ITEMS} or fewer"
            raise FileError(f"{self.where}: {short(name)} claims {n} items ({expected})")
        if inner == STRING:
            return list(self._texts(n))
        if inner not in TYPES:
            raise FileError(f"{self.where}: {short(name)} is a list of the unknown type {inner}")
        return list(self.unpack(f"{n}{TYPES[inner]}"))

    def _texts(self, n: int) -> Iterator[bytes]:
        self.require(8 * n)
        for _ in range(n):
            yield self.text()


def _aligned(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment
