"""The weights in a checkpoint's folder: one safetensors file, shards, or a pickle.

`open_weights` finds them and lists their tensors, from headers alone if the format has headers.
`read` then loads the tensors.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kvtool.core.checkpoint.first_layers import FirstLayers
from kvtool.core.checkpoint.pickled_file import PickledFile
from kvtool.core.checkpoint.safetensors_file import DTYPES, Digest, SafetensorsFile, TensorInfo
from kvtool.core.checkpoint.weight_names import CONFIG as CONFIG
from kvtool.core.checkpoint.weight_names import INDEX, check_shard, weight_map
from kvtool.core.checkpoint.weight_names import WEIGHTS as WEIGHTS
from kvtool.core.checkpoint.weight_names import refuse_lookalike as refuse_lookalike
from kvtool.core.machine import dtype_name
from kvtool.errors import FileError, UsageError
from kvtool.reading import short

PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLES = ("model.pt", "pytorch_model.bin")
NAMES_SHOWN = 10


class WeightFile(Protocol):
    """A file of weights, with the list of its tensors before they are read; it raises FileError."""

    path: Path  # for error messages
    tensors: dict[str, TensorInfo]
    resident: int  # bytes of memory that `read` fills; 0 of a file that is mapped

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """All tensors, contiguous on the CPU, and the digest of the file(s)."""


def open_weights(
    folder: Path,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    layers: FirstLayers | None = None,
) -> WeightFile:
    """The weights in `folder`; safetensors are preferred to pickles.

    dtypes: the formats that tensors may have. layers: those that are wanted; shards without any of
    theirs need not be there. Raises FileError for missing or damaged weights.
    """
    if layers is not None:
        return SomeTensors(_open_weights(folder, dtypes, layers.needs), layers.needs)
    return _open_weights(folder, dtypes, lambda name: True)


class SomeTensors:
    """A weight file of which only some tensors are there."""

    def __init__(self, whole: WeightFile, needs: Callable[[str], bool]) -> None:
        self.path, self.whole = whole.path, whole
        self.tensors = {name: info for name, info in whole.tensors.items() if needs(name)}
        self.resident = whole.resident

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """As WeightFile.read. The digest is of all files that were read."""
        found, digest = self.whole.read()
        return {name: found[name] for name in self.tensors}, digest


def _open_weights(
    folder: Path, dtypes: Mapping[str, torch.dtype], needs: Callable[[str], bool]
) -> WeightFile:

    def safetensors(path: Path) -> SafetensorsFile:
        refuse_lookalike(path, "weights")
        return SafetensorsFile(path, dtypes)

    def pickled(path: Path) -> PickledFile:
        refuse_lookalike(path, "weights")
        return PickledFile(path, dtypes)

    # lexists: a broken link is an error, and no reason to take another file.
    if os.path.lexists(folder / WEIGHTS):
        return safetensors(folder / WEIGHTS)
    if os.path.lexists(folder / INDEX):
        return ShardedFile(folder / INDEX, safetensors, needs)
    for name in PICKLES:
        if os.path.lexists(folder / name):
            return pickled(folder / name)
    if os.path.lexists(folder / PICKLED_INDEX):
        return ShardedFile(folder / PICKLED_INDEX, pickled, needs)
    raise FileError(f"{folder / WEIGHTS}: not found (expected weights)", "Copy them there.")


def require_tensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str],
    said_by: str = CONFIG,
) -> None:
    """Raise FileError unless `tensors` have the names and shapes of `shapes`.

    optional: names that may be missing. said_by: the file that implies the shapes, for the message.
    """
    required = [name for name in shapes if name not in optional]
    missing = [name for name in required if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    refuse_names(path, missing, extra, len(required), said_by)
    for name, expected in shapes.items():
        found = tensors[name].shape if name in tensors else expected
        if found != expected:
            raise wrong_shape(f"{path}: {short(name)}", found, expected, said_by)


def refuse_names(
    path: Path, missing: list[str], extra: list[str], n_required: int, said_by: str = CONFIG
) -> None:
    """Raise FileError if any of `n_required` tensors are missing, or if there are extra ones."""
    if missing:
        raise FileError(
            f"{path}: lacks {len(missing)} of {n_required} tensors ({_listed(missing)})",
            f"It holds others instead: {_listed(extra)}".rstrip(".") + "." if extra else "",
        )
    if extra:
        raise FileError(
            f"{path}: holds {len(extra)} tensors that the model of {said_by} does not have "
            f"({_listed(extra)})"
        )


def wrong_shape(
    where: str, found: tuple[int, ...], expected: tuple[int, ...], said_by: str = CONFIG
) -> FileError:
    """The error for a tensor of another shape than the model's."""
    transposed = len(found) == 2 and found == expected[::-1]
    return FileError(
        f"{where} has shape {list(found)} (expected {list(expected)})",
        "It looks transposed: GPT-2's own matrices are (inputs, outputs), all others the reverse."
        if transposed
        else f"{said_by} implies that shape: is it of the same model?",
    )


def require_finite(
    path: Path, tensors: Iterable[tuple[str, Tensor, Tensor]], kind: type[Exception]
) -> None:
    """Raise `kind` for NaN or infinity in the file, or UsageError if the conversion caused it.

    tensors: each name, with the tensor as stored and as converted; they may be made one by one.
    """
    overflowed, in_file = "", []
    for name, stored, converted in tensors:
        if is_finite(converted):
            continue
        if n := _count_bad(stored):
            in_file.append(f"{name} holds {n} NaN or infinite values")
        elif not overflowed:
            dtype, n = dtype_name(converted.dtype), _count_bad(converted)
            overflowed = f"--dtype {dtype}: {n} values of {name} are beyond its range"
    if in_file:
        more = f", and so do {len(in_file) - 1} more tensors" if in_file[1:] else ""
        raise kind(f"{path}: {in_file[0]}{more}")
    if overflowed:
        raise UsageError(overflowed, "Use a --dtype of more range, such as float32 or float64.")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass that makes no other tensor."""
    return not tensor.numel() or all(math.isfinite(v) for v in map(float, tensor.aminmax()))


def _count_bad(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def _listed(names: list[str]) -> str:
    shown = ", ".join(short(name) for name in names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown}, ..."


class ShardedFile:
    """Weights in several files, with an index that lists which tensor is in which.

    open_shard: opens one of the files. Raises FileError.
    needs: says which tensors are wanted; a shard with none of them is not opened.
    """

    def __init__(
        self,
        path: Path,
        open_shard: Callable[[Path], WeightFile],
        needs: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self.path = path
        refuse_lookalike(path, "an index of weights")
        places = weight_map(path)
        listed: dict[str, set[str]] = {}
        for tensor, name in places.items():
            listed.setdefault(name, set()).add(tensor)
        self._shards: list[WeightFile] = []
        self.tensors: dict[str, TensorInfo] = {}
        wanted = sorted(name for name, held in listed.items() if any(map(needs, held)))
        _require_shards(path, wanted)
        for name in wanted:
            shard = open_shard(path.parent / name)
            # Check before opening the next: at most one shard with unlisted tensors is in memory.
            check_shard(path, name, places, listed[name], set(shard.tensors))
            self._shards.append(shard)
            self.tensors |= shard.tensors
        self.resident = sum(shard.resident for shard in self._shards)

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """The digest is of the shards' own digests, in the order of their names."""
        found: dict[str, Tensor] = {}
        digests = []
        for shard in self._shards:
            tensors, digest = shard.read()
            found |= tensors
            digests.append(digest)
        return found, lambda: hashlib.sha256("".join(d() for d in digests).encode()).hexdigest()


def _require_shards(index: Path, names: list[str]) -> None:
    """Raise FileError if a shard is not there, even as a broken link."""
    missing = [name for name in names if not os.path.lexists(index.parent / name)]
    if missing:
        many = f"{len(missing)} of {len(names)} shards are missing" if missing[1:] else "a shard"
        raise FileError(
            f"{index.parent / missing[0]}: not found ({many} that {index.name} lists)",
            "Download or copy the rest of the model.",
        )
