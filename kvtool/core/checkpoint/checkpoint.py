"""Checkpoints: a model, its configuration and its tokenizers, in a folder.

    config.json         ModelConfig, so that loading needs no flags
    model.safetensors   the weights; a head that shares the embedding's weights is left out
    tokenizer.json      of a decoder-only model; an encoder-decoder has source.json and target.json

Folders of Hugging Face are read too, if `families` has their model_type, and GGUF files, which have
all of this in one file. Everything is checked before it costs memory or time: sizes, then names and
shapes, then memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.described import (
    SOURCE,
    TARGET,
    TOKENIZER,
    described_in,
    read_described,
    read_tokenizers,
)
from kvtool.core.checkpoint.families import Family
from kvtool.core.checkpoint.first_layers import FirstLayers
from kvtool.core.checkpoint.gguf.weights import GGUFModel
from kvtool.core.checkpoint.safetensors_file import Digest
from kvtool.core.checkpoint.sizes import (
    CPU,
    SMALLER,
    check_sizes,
    n_bytes,
    require_memory_for,
    require_tables,
    stored_dtype,
    table_nbytes,
)
from kvtool.core.checkpoint.weight_files import (
    CONFIG,
    WEIGHTS,
    WeightFile,
    open_weights,
    require_finite,
    require_tensors,
)
from kvtool.core.machine import dtype_name, require_memory
from kvtool.core.models import Model, build_model
from kvtool.core.text.tokenizer import NoTokenizer, Tokenizer
from kvtool.errors import CapacityError, CheckFailed, FileError, UsageError
from kvtool.files import json_bytes, model_folder, write_durable

LOG = logging.getLogger("kvtool")


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run, with its tokenizers and its origin."""

    model: Model  # on its device, in its dtype, in eval mode
    config: ModelConfig
    tokenizer: Tokenizer  # of the output; for a decoder-only model also of the input
    source_tokenizer: Tokenizer | None  # of the encoder's input
    path: Path
    digest: Digest  # of model.safetensors, or of the GGUF file
    stored_dtype: str  # of most weights in the file; `model` may have another dtype

    @property
    def sha256(self) -> str:
        """The SHA-256 of its weights' file, in hexadecimal. Raises FileError if that changed."""
        return self.digest()

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of the checkpoint for a report."""
        return {
            "model": str(self.path),
            "sha256": self.sha256,
            "stored_dtype": self.stored_dtype,
        }

    @property
    def reads_text(self) -> bool:
        """Whether it has a tokenizer; a folder of Hugging Face may have none."""
        return not isinstance(self.tokenizer, NoTokenizer)


def save(
    folder: Path, model: Model, tokenizer: Tokenizer, source_tokenizer: Tokenizer | None = None
) -> str:
    """Write a checkpoint durably -> the SHA-256 of model.safetensors. Raises FileError.

    The weights are written last, so a folder with weights is complete.
    """
    contents = files(model, tokenizer, source_tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot be made ({error.strerror})") from error
    for name, data in contents.items():
        write_durable(folder / name, data)
    return hashlib.sha256(contents[WEIGHTS]).hexdigest()


def files(
    model: Model, tokenizer: Tokenizer, source_tokenizer: Tokenizer | None = None
) -> dict[str, bytes]:
    """The files of a checkpoint by name, in the order of writing: the weights come last.

    Raises ValueError unless an encoder-decoder, and no other model, has a source tokenizer.
    """
    config = model.config
    if (source_tokenizer is not None) != bool(config.n_encoder_layers):
        raise ValueError("an encoder-decoder model, and no other, has a source tokenizer")
    aliases = _aliases(model)
    weights = {
        name: tensor.detach().to("cpu").contiguous()
        for name, tensor in model.state_dict().items()
        if name not in aliases
    }
    found = {TOKENIZER if source_tokenizer is None else TARGET: tokenizer.to_json()}
    if source_tokenizer is not None:
        found[SOURCE] = source_tokenizer.to_json()
    found[CONFIG] = json_bytes(config.to_dict())
    found[WEIGHTS] = safetensors.torch.save(weights, metadata={"format": "pt"})
    return found


def load(
    name: str, device: torch.device, dtype: torch.dtype, check: bool = False, layers: int = 0
) -> Checkpoint:
    """Read the checkpoint `name`, a folder or a shipped model; `layers`: only the first of them, 0
    for all.

    check: raise CheckFailed in place of FileError for NaN or infinite weights, for commands that
    judge the model.
    Raises FileError for files that are missing, damaged or contradictory, and for NaN or infinite
    weights; UsageError for weights that overflow `dtype`; CapacityError for too little memory.
    """
    folder = model_folder(name)
    config, family = read_described(folder)
    tokenizer, source_tokenizer = read_tokenizers(folder, config, family)
    if layers > config.n_layers:
        raise UsageError(
            f"--layers {layers}: the model has {config.n_layers}", "Leave it out to judge all."
        )
    first = None
    if layers and layers < config.n_layers:
        _require_layers(folder, config)
        first, config = FirstLayers(layers), config.first_layers(layers)
    source = _open(folder, config, family, dtype, first)
    model = _empty_model(config, source, described_in(folder))
    _check_tensors(source, model)
    require_memory_for(source, config, device, dtype)
    stored, digest = _read(source, model)
    weights: dict[str, Tensor] = {}
    converted = _converted(stored, device, dtype, weights)
    require_finite(source.path, converted, CheckFailed if check else FileError)
    _fill(model, weights)
    kept = _tell_stored(name or folder.name, source, family, dtype)
    # The weights are on the device already; this moves the tables.
    model = model.to(device).eval()
    return Checkpoint(model, config, tokenizer, source_tokenizer, folder, digest, kept)


def _require_layers(folder: Path, config: ModelConfig) -> None:
    """Raise UsageError for a model whose first layers cannot be had alone."""
    why = "is GGUF" if folder.is_file() else "is an encoder-decoder"
    if folder.is_file() or config.n_encoder_layers:
        raise UsageError(f"--layers: {folder} {why} (expected a folder of a decoder)")


def require_context(name: str, flag: str, n_tokens: int) -> None:
    """Raise CapacityError for more tokens than the context of the model `name`, before its weights
    are read.

    flag: the option that asked for them, for the message. Raises FileError as `load` does.
    """
    context = read_described(model_folder(name))[0].context
    if n_tokens > context:
        raise CapacityError(
            f"{flag} {n_tokens:,}: is beyond the context (the model holds {context:,})",
            "Ask for fewer tokens.",
        )


def tell_format(model: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Log that a model runs in a wider dtype than it is stored in; not for float64, which only the
    user can ask for."""
    if stored.itemsize < dtype.itemsize and dtype != torch.float64:
        kept, run = dtype_name(stored), dtype_name(dtype)
        LOG.info(f"{model}: stored in {kept}, run in {run} (--dtype {kept} runs it as stored)")


def _tell_stored(
    name: str, source: WeightFile, family: Family | GGUFModel | None, dtype: torch.dtype
) -> str:
    """The format of most stored weights; logs if the model runs in another one."""
    if isinstance(family, GGUFModel):
        if family.stored not in ("F32", "F16", "BF16"):
            LOG.info(f"{name}: stored in {family.stored}, dequantised to {dtype_name(dtype)}")
        return family.stored
    kept = stored_dtype(source)
    tell_format(name, kept, dtype)
    return dtype_name(kept)


def prompt_ids(loaded: Checkpoint, text: str | None) -> list[int]:
    """The ids of `text`, or for None, ids from the whole vocabulary. Raises FileError for text if
    there is no tokenizer."""
    if text is not None:
        return (loaded.source_tokenizer or loaded.tokenizer).encode(text)
    n, n_vocab = min(12, max(loaded.config.context // 4, 1)), loaded.config.vocab_size
    return [(2 * i + 1) * n_vocab // (2 * n) for i in range(n)]


def load_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The stored weights of a model of `config`, on the CPU, without a check for NaN.

    A head that shares the embedding's weights is left out. Raises FileError, and CapacityError for
    too little memory.
    """
    described = os.path.lexists(described_in(folder))
    family = read_described(folder)[1] if described else None
    source = _open(folder, config, family)
    model = _empty_model(config, source, described_in(folder))
    _check_tensors(source, model)
    require_memory(str(source.path), n_bytes(source), CPU, SMALLER)
    return _read(source, model)[0]


class StoredWeights(Mapping[str, Tensor]):
    """`load_weights`, read when the first of them is asked for."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self.config = folder, config

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return load_weights(self.folder, self.config)

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def fits(folder: Path, dtype: torch.dtype) -> bool:
    """Whether a format holds all that is stored in a folder exactly; False for GGUF, whose codes
    are numbers of no format. Raises FileError."""
    if folder.is_file():
        return False
    infos = open_weights(folder).tensors.values()
    return all(torch.promote_types(info.dtype, dtype) == dtype for info in infos)


# --- what must be there


class WithoutWeights(TorchFunctionMode):
    """A mode in which torch.empty, which makes all weights, takes no memory and sets no values.

    Tables are computed as usual: on the meta device, torch.arange and normal_ would import
    PyTorch's compiler, which takes a second. No random numbers are drawn, so the generator's state
    does not change.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return kwargs["tensor"]
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _open(
    folder: Path, config: ModelConfig, family: Family | GGUFModel | None,
    dtype: torch.dtype = torch.float32, layers: FirstLayers | None = None,
) -> WeightFile:  # fmt: skip
    """The weights in `folder` under kvtool's names. Raises FileError.

    Those of GGUF are dequantized to bfloat16 if that is `dtype`, and otherwise to float32.
    """
    source: WeightFile
    if isinstance(family, GGUFModel):
        source = family.open(dtype)
    else:
        source = open_weights(folder, layers=layers)
    check_sizes(config, source, described_in(folder))
    return source if family is None else family.weights(source, config)


def _empty_model(config: ModelConfig, source: WeightFile, where: Path) -> Model:
    """The model that the file `where` describes, with tables but without values of weights.

    Raises FileError for position tables that are far larger than the weights, and CapacityError for
    tables that do not fit into memory.
    """
    require_tables(where, table_nbytes(config), source, f"context {config.context}")
    # Making a table takes about three times its size for a moment.
    require_memory(f"{where}: context {config.context}", 3 * table_nbytes(config), CPU, SMALLER)
    with WithoutWeights():
        return build_model(config)


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of shared parameters -> first names: {"head.weight": "embed.tokens.weight"}."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    owners = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    return {name: owner for name, owner in owners.items() if name != owner}


def _check_tensors(source: WeightFile, model: nn.Module) -> None:
    """Raise FileError unless the file has the names and shapes of the model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    require_tensors(source.path, source.tensors, shapes, _aliases(model).keys())


# --- from the file into the model


def _read(source: WeightFile, model: nn.Module) -> tuple[dict[str, Tensor], Digest]:
    """The tensors, without second names of shared ones, and the digest of the file."""
    weights, digest = source.read()
    for alias, owner in _aliases(model).items():
        twin = weights.pop(alias, None)
        if twin is not None and not _same_bytes(twin, weights[owner]):
            raise FileError(
                f"{source.path}: {alias} differs from {owner} (expected the same values, as "
                f"{CONFIG} ties them)",
                "Set tied to false to keep both, or leave the head out of the file.",
            )
    return weights, digest


def _converted(
    stored: dict[str, Tensor], device: torch.device, dtype: torch.dtype, weights: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each tensor of `stored`, which is emptied, as it was and as it is moved to `weights`."""
    for name in list(stored):
        tensor = stored.pop(name)
        weights[name] = tensor.to(device, dtype)
        yield name, tensor, weights[name]


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    # Compare bytes, because NaN is not equal to itself.
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make `weights` the model's parameters without a copy, and share those that were shared."""
    aliases = _aliases(model)
    shared = {alias: weights[owner] for alias, owner in aliases.items()}
    model.load_state_dict({**weights, **shared}, assign=True)
    for alias, owner in aliases.items():
        module, _, name = alias.rpartition(".")
        setattr(model.get_submodule(module), name, model.get_parameter(owner))
