"""A decoder's logits from the models of transformers: code that others wrote, the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.checkpoint import WithoutWeights
from kvtool.core.checkpoint.families import FAMILIES
from kvtool.core.checkpoint.families.weights import HEAD
from kvtool.core.checkpoint.safetensors_file import BUFFERS
from kvtool.core.checkpoint.weight_files import CONFIG, open_weights
from kvtool.core.limited import limited
from kvtool.core.reference.forms import form_of
from kvtool.core.verify.hf.configuration import make_config, read_settings
from kvtool.core.verify.hf.folder import bounded_build
from kvtool.core.verify.hf.library import in_one_line, quiet_transformers
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.widened import Room, is_large, twin
from kvtool.errors import UsageError
from kvtool.hub import offline
from kvtool.reading import MAX_CONFIG_BYTES, read_json_object

# What asks for a model of transformers, and what to do where there is none.
AGAINST, IMPL = "--against transformers", "--impl transformers"
OTHERWISE = {
    AGAINST: "Use --against numpy.",
    IMPL: "Leave it out, or give --model a folder of Hugging Face.",
}


def witness(
    weights: Mapping[str, np.ndarray],
    config: ModelConfig,
    dtype: torch.dtype = torch.float64,
    flag: str = AGAINST,
) -> Any:
    """A model of transformers in `dtype` that holds `weights`, kvtool's own by name.

    Its form is one of `forms`. Raises UsageError, naming `flag`, for other mixtures and if
    transformers is not installed.
    """
    transformers = _transformers()
    if config.kind not in ("decoder", "seq2seq"):
        raise UsageError(
            f"{flag}: is for folders of transformers' decoders, and for GPT-2's, GPT-NeoX's and "
            f"Llama's form, which a model of the family {config.kind} has not",
            OTHERWISE[flag],
        )
    form = form_of(config)
    if form is None:
        raise UsageError(
            f"{flag}: this mixture of positions, norm, activation and heads is neither GPT-2's nor "
            "GPT-NeoX's nor Llama's",
            OTHERWISE[flag],
        )
    described = form.described(transformers, config)
    model = _empty(transformers, described, dtype)
    fill(model, form.state(weights, config))
    return model


def _empty(transformers: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model of a configuration of transformers, in float64 with tables of that precision."""
    # Tables of rotary angles are made now: in float32, if nobody asks for more.
    with Promote() if dtype == torch.float64 else contextlib.nullcontext():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def folder_witness(folder: Path) -> Any | None:
    """The model of transformers in float64 for a folder of `families`, by its own configuration and
    its tensors' own names, so that kvtool's reading of both is checked too; None for others, GGUF
    among them.

    Raises UsageError if transformers is not installed, FileError for what it cannot build.
    """
    if folder.is_file():
        return None
    path = folder / CONFIG
    data = read_json_object(path, "a configuration", MAX_CONFIG_BYTES)
    family = FAMILIES.get(data.get("model_type", ""))
    if family is None or family.beside:  # of a part of a model, transformers has other names
        return None
    transformers = _transformers()
    source = open_weights(folder)
    with quiet_transformers(), in_one_line(path):
        with limited(f"{path}: what it describes"), bounded_build(source, folder):
            config = make_config(read_settings(folder))
            with torch.device("meta"):  # what this costs, its weights do not
                large = is_large(_empty(transformers, config, torch.float64).float())
        with WithoutWeights() if large else contextlib.nullcontext():
            model = _empty(transformers, config, torch.float64)
        put = _put if large else fill
        _fill_as_stored(model, config.tie_word_embeddings, source.read()[0], put)
    return twin(model, Room(), model) if large else model


def _put(model: Any, state: dict[str, Any]) -> None:
    """`fill`, but the tensors themselves become the parameters: to be widened as they are read."""
    made: dict[int, torch.nn.Parameter] = {}
    owners = dict(model.named_modules())
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            tensor = state.pop(name)
            if tensor.shape != parameter.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
            made[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=False)
        where, _, leaf = name.rpartition(".")
        owners[where]._parameters[leaf] = made[id(parameter)]
    if state:
        raise ValueError(f"transformers' model has no {', '.join(sorted(state))}")


def _fill_as_stored(
    model: Any, tied: bool, tensors: dict[str, torch.Tensor], put: Callable[[Any, Any], None]
) -> None:
    """Move tensors of a folder's own names into its model."""
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in tensors):
        prefix = ""
    state = {
        name if name == HEAD else prefix + name: tensor
        for name, tensor in tensors.items()
        if not BUFFERS.search(name)
    }
    if tied and HEAD in state:
        # Equal to the embedding, or loading would have failed; or stored in place of it.
        head = state.pop(HEAD)
        state.setdefault(next(name for name, _ in model.named_parameters()), head)
    put(model, state)


def _transformers() -> Any:
    offline()
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "--against transformers: transformers is not installed",
            "pip install 'kvtool[hf]', or use --against numpy.",
        ) from error
    return transformers


def witness_logits(model: Any, ids: list[int], folder: Path | None = None) -> np.ndarray:
    """Logits (T,V) of one uncached pass in which nothing is computed below float64.

    Raises FileError for what the configuration in `folder`, if it has the model's, breaks there.
    """
    told = contextlib.nullcontext() if folder is None else in_one_line(folder / CONFIG)
    with told, quiet_transformers(), torch.inference_mode(), Promote():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def fill(model: Any, state: dict[str, Any]) -> None:
    """Move arrays or tensors into the model; every parameter must be there, and nothing be left
    over. Each is let go as it is copied, in the model's format: there is no other copy."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is listed once
            parameter.copy_(torch.as_tensor(state.pop(name)))
    if state:
        raise ValueError(f"transformers' model has no {', '.join(sorted(state))}")
