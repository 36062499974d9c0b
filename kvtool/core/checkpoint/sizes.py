"""Checks that a model fits its weight file and this machine, before any of it is allocated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.safetensors_file import TensorInfo
from kvtool.core.checkpoint.weight_files import WeightFile
from kvtool.core.machine import require_memory
from kvtool.core.models import model_class
from kvtool.errors import FileError

MAX_TABLE_BYTES = 2**28  # bytes; making tables takes three times as much
LARGEST_TENSOR = 2**48  # values; PyTorch counts bytes in 63 bits, and no file has this many
CPU = torch.device("cpu")
SMALLER = "Free memory, or use a smaller model."


def check_sizes(config: ModelConfig, source: WeightFile, where: Path) -> None:
    """Raise FileError for a configuration, from the file `where`, that describes far more tensors
    than the weight file has, or tensors larger than any file."""
    n_layers = config.n_layers + config.n_encoder_layers
    # A thousand tensors cost little, and the usual error then names the missing ones.
    least = n_layers * model_class(config.kind).tensors_per_layer
    if least > max(len(source.tensors), 1000):
        raise FileError(
            f"{source.path}: holds {len(source.tensors)} tensors (expected "
            f"{least} or more for the {n_layers} layers of {where.name})"
        )
    longest = max(config.vocab_size, config.source_vocab_size, config.d_ff, config.context)
    largest = config.d_model * max(config.d_model, longest, config.n_heads * config.head_dim)
    if largest > LARGEST_TENSOR:
        raise FileError(
            f"{where}: implies a tensor of {largest} values (expected {LARGEST_TENSOR} or fewer)"
        )


def table_nbytes(config: ModelConfig) -> int:
    """Bytes of the float64 position tables, which no file contains and no file's size bounds."""
    turning = config.rotary_width * config.n_turns
    width = {"sinusoidal": config.d_model, "rotary": turning}.get(config.positions, 0)
    return (2 if config.n_encoder_layers else 1) * config.context * width * 8


def require_tables(
    where: Path, nbytes: int, source: WeightFile, what: str = "what it describes"
) -> None:
    """Raise FileError if position tables of `nbytes` are far larger than the weights.

    For comparison: tables for a million positions take 1 GiB in a model of 15 GiB.
    """
    most = max(MAX_TABLE_BYTES, 4 * n_bytes(source))
    if nbytes > most:
        raise FileError(
            f"{where}: {what} takes {nbytes / 2**30:.3g} GiB of tables "
            f"(expected {most / 2**30:.3g} GiB or less, beside its weights)"
        )


def require_memory_for(
    source: WeightFile, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise CapacityError unless stored weights, if not mapped, and converted ones fit together."""
    stored = n_bytes(source)
    on_cpu = device.type == "cpu"  # there a weight of the right dtype is used without a copy
    made = sum(
        math.prod(info.shape) * dtype.itemsize
        for info in source.tensors.values()
        if not (on_cpu and info.dtype == dtype)
    )
    where = str(source.path)
    # On a CPU the stored dtype takes the least memory: any other needs a copy.
    wider = dtype if on_cpu and dtype.itemsize > stored_dtype(source).itemsize else None
    needed = max(stored, source.resident + (made if on_cpu else 0))
    require_memory(where, needed, CPU, SMALLER, wider)
    if not on_cpu:
        require_memory(where, made + table_nbytes(config), device, SMALLER, dtype)


def n_bytes(source: WeightFile) -> int:
    """Bytes of the tensors as stored."""
    return _nbytes(source.tensors.values())


def _nbytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) * info.dtype.itemsize for info in tensors)


def stored_dtype(source: WeightFile) -> torch.dtype:
    """The format of most weights in a file."""
    nbytes: Counter[torch.dtype] = Counter()
    for info in source.tensors.values():
        nbytes[info.dtype] += _nbytes([info])
    return nbytes.most_common(1)[0][0]
