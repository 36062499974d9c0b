"""A small checkpoint, and the ways to damage it that the tests of checkpoints share."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.safetensors_file import DamagedFile, SafetensorsFile
from kvtool.core.models import Model, build_model
from kvtool.core.text.tokenizer import Tokenizer
from kvtool.errors import FileError, KvtoolError

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.train("char", ["abcdef"])  # 10 tokens
SOURCE_TOKENIZER = Tokenizer.train("char", ["uvwxyz!"])  # 11 tokens
TINY = ModelConfig(
    vocab_size=12,
    n_layers=1,
    d_model=4,
    n_heads=2,
    d_ff=6,
    context=8,
    norm="rmsnorm",
    bias=False,
)
EMBEDDING, QKV = "embed.tokens.weight", "layers.0.attn.qkv.weight"
TINY_PAIR = dataclasses.replace(TINY, n_encoder_layers=1, source_vocab_size=11, bias=True)


def saved(folder: Path, config: ModelConfig = TINY, **changes: Any) -> Model:
    """Save a random model with `changes` to its configuration, and return it."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, **changes))
    source_tokenizer = SOURCE_TOKENIZER if config.n_encoder_layers else None
    with patch.object(os, "fsync"):  # it takes half of the tests' time, and nothing crashes here
        checkpoint.save(folder, model, TOKENIZER, source_tokenizer)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, check: bool = False) -> Model:
    return checkpoint.load(str(folder), CPU, dtype, check).model


def refusal(folder: Path, kind: type[KvtoolError] = FileError, **options: Any) -> str:
    """The text of the error that loading raises."""
    with pytest.raises(kind) as caught:
        load(folder, **options)
    assert type(caught.value) in (kind, DamagedFile)
    return str(caught.value)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def take_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and its tensors' bytes."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def put_together(path: Path, header: Any, tensors: bytes = b"") -> None:
    """Write a safetensors file whose header is `header`: text as it is, all else as JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + tensors)


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of model.safetensors; `__` in a name is a dot."""
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    path.write_bytes(safetensors.torch.save(weights))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def unread(file: SafetensorsFile) -> None:
    raise AssertionError("tensors were read before all checks had passed")
