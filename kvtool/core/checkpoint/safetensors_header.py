"""The header of a safetensors file, checked to the last tensor. Imports no torch.

The format: 8 bytes with the length N (little-endian), N bytes of JSON, then the bytes of the
tensors without gaps (https://github.com/huggingface/safetensors#format). The safetensors library
parses the header too, but its errors name no tensor, and it allocates before sizes are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

from kvtool.errors import FileError
from kvtool.reading import opened, parse_json, short

LARGEST_HEADER = 2**25  # bytes; 100,000 tensors take 10^7, and the reference allows 10^8
MAX_DIMENSIONS = 8  # so that a shape of a million numbers costs no time; weights have 1 or 2
# Constants that some versions of transformers stored with the weights: masks and rotary rates.
BUFFERS = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


class Sized(Protocol):
    """A number format: torch's own, or how many bytes it has."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""


Format = TypeVar("Format", bound=Sized)


class DamagedFile(FileError):
    """A file was cut short or changed, so another copy of it may be whole."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "Download or copy it again.")


@dataclass(frozen=True)
class TensorInfo(Generic[Format]):
    """The header's entry for one tensor; `begin` and `end` are bytes from the end of the header."""

    dtype: Format
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader(Generic[Format]):
    """The checked header of the regular file `path`.

    dtypes: the formats that its tensors may have, by their names in the header; of_buffers: those
    of the constants that some store beside the weights. weights: whether all are floating-point.
    prefix: the file's bytes before the tensors. Raises FileError for a damaged header, or one that
    contradicts the file's size.
    """

    def __init__(
        self,
        path: Path,
        dtypes: Mapping[str, Format],
        of_buffers: Mapping[str, Format],
        weights: bool = False,
    ) -> None:
        self.path = path
        with opened(path, "safetensors") as file:
            self.size = file.seek(0, 2)
            file.seek(0)
            self.prefix = _read_prefix(file, self.size, path)
        spec, self.metadata = _parse(self.prefix[8:], path)
        hint = "Weights are floating-point numbers." if weights else ""
        self.tensors = {
            name: _tensor_info(name, entry, path, dtypes, of_buffers, hint)
            for name, entry in spec.items()
        }
        _check_layout(self.tensors, len(self.prefix), self.size, path)


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
    name: str,
    entry: Any,
    path: Path,
    dtypes: Mapping[str, Format],
    of_buffers: Mapping[str, Format],
    hint: str,
) -> TensorInfo[Format]:
    where = f"{path}: {short(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise DamagedFile(f"{where} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = {**of_buffers, **dtypes} if BUFFERS.search(name) else dtypes
    if not isinstance(dtype, str) or dtype not in known:
        raise FileError(
            f"{where} has dtype {short(str(dtype))} (expected one of {', '.join(dtypes)})",
            hint,
        )
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        raise FileError(
            f"{where} has shape {short(str(shape))} "
            f"(expected up to {MAX_DIMENSIONS} whole numbers, none negative)"
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


def _check_layout(
    tensors: Mapping[str, TensorInfo[Any]], start: int, size: int, path: Path
) -> None:
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
