"""Tensors under other names: the same values, some of them in other pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvtool.core.checkpoint.safetensors_file import BUFFERS, Digest, TensorInfo
from kvtool.core.checkpoint.weight_files import CONFIG, WeightFile, require_tensors

HEAD = "lm_head.weight"
EMBEDDING = "embed.tokens.weight"  # ours
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where a tensor of kvtool is stored: in `parts`, each a (name, shape), stacked along dim 0.

    transposed: each is stored as (inputs, outputs), as GPT-2's Conv1D is.
    """

    parts: tuple[tuple[str, Shape], ...]
    transposed: bool = False

    @classmethod
    def one(cls, name: str, *shape: int) -> Stored:
        """The place of a tensor that is stored in kvtool's own shape."""
        return cls(((name, shape),))

    @classmethod
    def conv1d(cls, name: str, n_out: int, n_in: int) -> Stored:
        """The place of the weight (n_out,n_in) of a GPT-2 Conv1D."""
        return cls(((name, (n_in, n_out)),), transposed=True)

    @property
    def made(self) -> bool:
        """Whether the tensor differs from the stored bytes, and so takes memory of its own."""
        return self.transposed or len(self.parts) > 1

    @property
    def shape(self) -> Shape:
        """The shape of kvtool's tensor."""
        first = self.parts[0][1]
        if self.transposed:
            return first[::-1]
        return (sum(shape[0] for _, shape in self.parts), *first[1:])


NameMap = dict[str, Stored]


class RenamedFile:
    """A weight file under kvtool's names. `prefix` stands before all its names but the head's,
    unless it was saved without a head. A tied head may be absent, or the embedding instead: of
    tensors that share memory, safetensors' save_model keeps the last by name.

    Raises FileError, before anything is read, for tensors that are missing, left over or misshapen,
    in the names that the file uses. Buffers that hold no weights are passed over, and names that
    begin like one of `beside`.
    """

    def __init__(
        self, source: WeightFile, names: NameMap, prefix: str, tied: bool, head: str = HEAD,
        said_by: str = CONFIG, beside: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.path: Path = source.path
        self._source = source
        held = {
            name: info
            for name, info in source.tensors.items()
            if not BUFFERS.search(name) and not name.startswith(beside)
        }
        self._head = head
        self._prefix = prefix if any(name.startswith(prefix) for name in held) else ""
        if tied and head in held and self._theirs(names[EMBEDDING].parts[0][0]) not in held:
            names = {**names, EMBEDDING: Stored.one(head, *names[EMBEDDING].shape)}
            del names["head.weight"]
        shapes = {self._theirs(n): shape for s in names.values() for n, shape in s.parts}
        require_tensors(source.path, held, shapes, {head} if tied else (), said_by)
        self._names = {
            ours: stored
            for ours, stored in names.items()
            if self._theirs(stored.parts[0][0]) in held
        }
        self.tensors = {ours: self._info(stored) for ours, stored in self._names.items()}
        self.resident = source.resident + sum(
            math.prod(info.shape) * info.dtype.itemsize
            for ours, info in self.tensors.items()
            if self._names[ours].made
        )

    def _theirs(self, name: str) -> str:
        return name if name == self._head else self._prefix + name

    def _info(self, stored: Stored) -> TensorInfo:
        infos = [self._source.tensors[self._theirs(name)] for name, _ in stored.parts]
        dtype = infos[0].dtype
        for info in infos[1:]:
            dtype = torch.promote_types(dtype, info.dtype)
        return TensorInfo(dtype, stored.shape, 0, 0)

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """As WeightFile.read, under kvtool's names."""
        tensors, digest = self._source.read()
        found = {}
        for ours, stored in self._names.items():
            parts = [tensors.pop(self._theirs(name)) for name, _ in stored.parts]
            if stored.transposed:
                found[ours] = parts[0].T.contiguous()
            else:
                found[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found, digest
