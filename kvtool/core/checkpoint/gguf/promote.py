"""A GGUF file with the same numbers in F32, for a second server.

A quantised model's rounding may hide a fault of the cache; the same numbers in F32 show it. Tensors
are streamed: only a piece of one is in memory. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

from kvtool.core.checkpoint.gguf.formats import FORMATS, numbers, require_known
from kvtool.core.checkpoint.gguf.header import (
    ALL_F32,
    FILE_TYPE,
    MAGIC,
    TYPES,
    UINT32,
    Field,
    GGUFHeader,
    TensorField,
)
from kvtool.errors import CapacityError, FileError, UsageError
from kvtool.reading import opened

F32 = FORMATS[0]
BLOCK = re.compile(r"blk\.(\d+)\.")
COPIED = 2**22  # bytes at a time of tensors that are copied
Progress = Callable[[int, str], None]  # is called with the bytes just written, and their tensor


@dataclass(frozen=True)
class Plan:
    """The file that will be written, planned from the header alone."""

    source: GGUFHeader
    fields: list[bytes | Field]  # as they are, or made here
    tensors: list[tuple[TensorField, TensorField]]  # (as stored, as written), in order
    start: int  # of the first tensor in the new file
    nbytes: int  # of the whole new file
    n_blocks: int
    n_blocks_before: int

    @property
    def is_smaller(self) -> bool:
        """Whether blocks are left out, which makes another model."""
        return self.n_blocks < self.n_blocks_before


def plan(source: GGUFHeader, layers: int | None = None) -> Plan:
    """The plan of the F32 file, with the first `layers` blocks alone if that is given.

    Raises FileError for a format that cannot be dequantised, UsageError for more blocks than the
    file has, and KvtoolError without the package gguf.
    """
    key = f"{source.architecture}.block_count"
    there = source.get(key)
    if layers is not None and (type(there) is not int or layers > there):
        raise UsageError(f"--layers {layers}: {source.path} has {there or 'no'} blocks")
    kept = there if layers is None else layers
    stored = [t for t in source.tensors.values() if layers is None or _block(t) < layers]
    for t in stored:
        if not t.format.is_whole:
            require_known(f"{source.where}: {t.name}", t.format)
    fields = [_field(field, key, there, kept) for field in source.fields.values()]
    if FILE_TYPE not in source.fields:
        fields.append(_made(FILE_TYPE, UINT32, struct.pack("<I", ALL_F32)))
    made, offset = [], 0
    for t in stored:
        format_ = t.format if t.format.is_whole else F32
        end = offset + t.n_values * format_.nbytes
        made.append(replace(t, format=format_, begin=offset, end=end))
        offset = _up(end, source.alignment)
    length = 24 + sum(len(f) if isinstance(f, bytes) else f.end - f.begin for f in fields)
    length += sum(len(_info(t)) for t in made)
    start = _up(length, source.alignment)
    blocks = (kept or 0, there or 0)
    pairs = list(zip(stored, made, strict=True))
    return Plan(source, fields, pairs, start, start + offset, *blocks)


def _block(tensor: TensorField) -> int:
    """The number of the block that a tensor is in; -1 for tensors outside the blocks."""
    found = BLOCK.match(tensor.name)
    return int(found[1]) if found else -1


def _field(field: Field, key: str, there: Any, kept: Any) -> bytes | Field:
    """A field of the new file: the number of blocks, lists with an entry for each, and the format
    change."""
    if field.name == FILE_TYPE:
        return _made(FILE_TYPE, UINT32, struct.pack("<I", ALL_F32))
    if kept == there:
        return field
    if field.name == key:
        return _made(key, field.type, struct.pack(f"<{TYPES[field.type]}", kept))
    of_blocks = field.name.startswith(key.removesuffix("block_count"))
    if of_blocks and field.items in TYPES and len(field.value) == there:
        numbers_ = struct.pack(
            f"<IQ{kept}{TYPES[field.items]}", field.items, kept, *field.value[:kept]
        )
        return _made(field.name, field.type, numbers_)
    return field


def _made(name: str, kind: int, value: bytes) -> bytes:
    text = name.encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<I", kind) + value


def _info(t: TensorField) -> bytes:
    """A tensor's entry in the header."""
    name, n = t.name.encode(), len(t.shape)
    numbers_ = (n, *t.shape[::-1], t.format.number, t.begin)
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{n}QIQ", *numbers_)


def _up(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def require_room(found: Plan, out: Path) -> int:
    """The free bytes on the disk of `out`. Raises FileError if `out` is there already or has no
    folder, CapacityError if the file does not fit."""
    if os.path.lexists(out):
        raise FileError(f"--out {out}: is there already", "Give another name, or remove it first.")
    try:
        free = shutil.disk_usage(out.parent).free
    except OSError as error:
        raise FileError(
            f"--out {out}: the folder {out.parent} cannot be used ({error.strerror})"
        ) from error
    if found.nbytes > free:
        raise CapacityError(
            f"--out {out}: needs {gib(found.nbytes)} ({gib(free)} free)",
            "Free some room, or keep fewer blocks with --layers N.",
        )
    return free


def gib(nbytes: int) -> str:
    """A number of bytes in GiB, in words."""
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**29 else f"{nbytes / 2**20:.3g} MiB"


def write(found: Plan, out: Path, progress: Progress) -> None:
    """Write the file under a temporary name, and rename it at the end. An error, Ctrl-C or SIGTERM
    leaves nothing behind, and no file is replaced. Raises FileError."""
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            _write(found, _Output(file, out), progress)
            file.flush()
            os.fsync(file.fileno())
        _name(temporary, out)
    except FileExistsError as error:
        raise FileError(f"--out {out}: is there already", "Give another name.") from error
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


class _Output:
    """The output file. Its errors name it, not the file that is read meanwhile."""

    def __init__(self, file: BufferedWriter, out: Path) -> None:
        self.file, self.out, self.position = file, out, 0

    def write(self, data: Any) -> None:
        """Raises FileError."""
        try:
            self.position += self.file.write(data)
        except OSError as error:
            raise _unwritable(self.out, error) from error


def _unwritable(out: Path, error: OSError) -> FileError:
    hint = "Free some room." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return FileError(f"--out {out}: cannot be written ({error.strerror})", hint)


def _name(temporary: Path, out: Path) -> None:
    """Rename a file, and replace none. Raises OSError."""
    try:
        os.link(temporary, out)
    except FileExistsError:
        raise
    except OSError as error:
        if os.path.lexists(out):
            raise FileExistsError(error.errno, error.strerror) from error
        os.rename(temporary, out)  # on disks without links


def _write(found: Plan, file: _Output, progress: Progress) -> None:
    source = found.source
    with opened(source.path, "a GGUF file") as stored:
        file.write(
            MAGIC + struct.pack("<IQQ", source.version, len(found.tensors), len(found.fields))
        )
        for field in found.fields:
            file.write(field if isinstance(field, bytes) else _span(stored, field, source))
        for _, t in found.tensors:
            file.write(_info(t))
        _pad(file, found.start)
        progress(found.start, "")
        for before, after in found.tensors:
            stored.seek(before.begin)
            _write_tensor(stored, before, after, file, source, progress)
            _pad(file, found.start + _up(after.end, source.alignment))


def _write_tensor(
    stored: BufferedReader, before: TensorField, after: TensorField, file: _Output,
    source: GGUFHeader, progress: Progress,
) -> None:  # fmt: skip
    if before.format == after.format:
        left = before.end - before.begin
        while left:
            data = stored.read(min(left, COPIED))
            if not data:
                raise FileError(f"{source.path}: became shorter while it was read", "Try again.")
            file.write(data)
            left -= len(data)
            progress(len(data), before.name)
        return
    for _, piece in numbers(stored, before.format, before.n_values, str(source.path)):
        file.write(piece.astype("<f4", copy=False).data)
        progress(piece.nbytes, before.name)


def _span(stored: BufferedReader, field: Field, source: GGUFHeader) -> bytes:
    stored.seek(field.begin)
    data = stored.read(field.end - field.begin)
    if len(data) != field.end - field.begin:
        raise FileError(f"{source.path}: became shorter while it was read", "Try again.")
    return data


def _pad(file: _Output, end: int) -> None:
    file.write(bytes(end - file.position))
