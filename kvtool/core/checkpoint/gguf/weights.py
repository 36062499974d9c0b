"""The weights of a GGUF file, dequantised as they are read."""

from __future__ import annotations

import hashlib
import math
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.weights import RenamedFile
from kvtool.core.checkpoint.gguf.config import (
    FACTORS,
    HEAD,
    GGUFFamily,
    family_of,
    names,
    read_config,
)
from kvtool.core.checkpoint.gguf.formats import numbers, require_known
from kvtool.core.checkpoint.gguf.header import GGUFHeader, TensorField
from kvtool.core.checkpoint.safetensors_file import Digest, TensorInfo
from kvtool.core.checkpoint.weight_files import WeightFile
from kvtool.errors import FileError
from kvtool.reading import opened

BLOCK = 2**20  # bytes read at once between tensors
TABLE_VALUES = 2**16  # the most values of a table that belongs to a configuration


class GGUFModel:
    """A GGUF file as a model: its configuration, and its weights as a RenamedFile.

    Raises FileError for a damaged or unsupported file, and KvtoolError without the package gguf.
    """

    def __init__(self, path: Path) -> None:
        self.header = GGUFHeader(path)
        self.family: GGUFFamily = family_of(self.header)
        self.config: ModelConfig = read_config(self.header, self._factors())
        self.stored = next(iter(self.header.formats()))  # the format of the most bytes

    def _factors(self) -> list[float] | None:
        field = self.header.tensors.get(FACTORS)
        if field is None:
            return None
        where = f"{self.header.where}: {FACTORS}"
        require_known(where, field.format)
        if field.n_values > TABLE_VALUES:
            raise FileError(f"{where} has {field.n_values} values ({TABLE_VALUES} at most)")
        with opened(self.header.path, "a GGUF file") as file:
            file.seek(field.begin)
            pieces = numbers(file, field.format, field.n_values, where)
            return [float(x) for _, piece in pieces for x in piece]

    def open(self, dtype: torch.dtype = torch.float32) -> GGUFWeights:
        """The tensors under their own names. Raises FileError for a format that is not known."""
        return GGUFWeights(self.header, self.config, self.family, dtype)

    def weights(self, source: WeightFile, config: ModelConfig) -> RenamedFile:
        """The tensors under kvtool's names. Raises FileError for a tensor that is missing or has
        another shape."""
        ours = names(config, self.family)
        return RenamedFile(source, ours, "", config.tied, HEAD, said_by="its header")


class GGUFWeights:
    """A WeightFile of the tensors in a GGUF file, in float32, or in bfloat16 if `dtype` is that:
    then no tensor is held in both."""

    def __init__(
        self, header: GGUFHeader, config: ModelConfig, family: GGUFFamily, dtype: torch.dtype
    ) -> None:
        self.path, self.header, self.config, self.family = header.path, header, config, family
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.tensors: dict[str, TensorInfo] = {}
        for name, field in header.tensors.items():
            if name == FACTORS:
                continue
            require_known(f"{header.where}: {name}", field.format)
            self.tensors[name] = TensorInfo(self.dtype, field.shape, field.begin, field.end)
        n_values = sum(math.prod(info.shape) for info in self.tensors.values())
        self.resident = n_values * self.dtype.itemsize

    def read(self) -> tuple[dict[str, Tensor], Digest]:
        """As WeightFile.read, in one pass over the file."""
        found: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        with opened(self.path, "a GGUF file") as file:
            for field in self.header.in_order():
                self._skip(file, field.begin, digest)
                found[field.name] = self._tensor(file, field, digest)
            self._skip(file, self.header.size, digest)
        found.pop(FACTORS, None)
        weights = {name: self._as_stored(name, found.pop(name)) for name in self.tensors}
        return weights, digest.hexdigest

    def _skip(self, file: BufferedReader, end: int, digest: Any) -> None:
        """Add the bytes before `end` to the digest: the header, or padding between tensors."""
        while (left := end - file.tell()) > 0:
            data = file.read(min(left, BLOCK))
            if not data:
                raise FileError(f"{self.path}: became shorter while it was read", "Try again.")
            digest.update(data)

    def _tensor(self, file: BufferedReader, field: TensorField, digest: Any) -> Tensor:
        values = torch.empty(field.n_values, dtype=self.dtype)
        at = 0
        where = f"{self.path}: {field.name}"
        for data, piece in numbers(file, field.format, field.n_values, where):
            digest.update(data)
            # torch.tensor copies: F32 is a view of bytes that cannot be written to.
            values[at : at + len(piece)] = torch.tensor(piece)
            at += len(piece)
        return values.view(field.shape)

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of llama's queries and keys in the order of Hugging Face.

        llama.cpp rotates neighbouring channels against each other, and kvtool the two halves of a
        head.
        """
        heads = {"attn_q": self.config.n_heads, "attn_k": self.config.n_kv_heads}
        n = heads.get(name.split(".")[-2]) if name.startswith("blk.") else None
        if not self.family.permuted or n is None:
            return tensor
        rows = tensor.reshape(n, tensor.shape[0] // n // 2, 2, *tensor.shape[1:])
        return rows.swapaxes(1, 2).reshape(tensor.shape)
