"""A decoder's logits from the models of transformers: code that others wrote, the same weights."""

from __future__ import annotations

import contextlib
import math
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
from kvtool.core.reference import oracle
from kvtool.core.verify.hf.configuration import make_config, read_settings
from kvtool.core.verify.hf.folder import bounded_build
from kvtool.core.verify.hf.library import in_one_line, quiet_transformers
from kvtool.core.verify.precision import Promote
from kvtool.core.verify.widened import Room, is_large, twin
from kvtool.errors import UsageError
from kvtool.hub import offline
from kvtool.reading import MAX_CONFIG_BYTES, read_json_object

Arrays = dict[str, np.ndarray]
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
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

    Added positions, layer norm and a plain MLP make a GPT-2, rotary positions, RMSNorm and SwiGLU a
    Llama. Raises UsageError, naming `flag`, for other mixtures and if transformers is not
    installed.
    """
    transformers = _transformers()
    llama = (config.positions, config.norm, config.activation) == ("rotary", "rmsnorm", "swiglu")
    plain = config.norm == "layernorm" and config.activation in ACTIVATIONS
    if config.kind not in ("decoder", "seq2seq"):
        raise UsageError(
            f"{flag}: is for folders of transformers' decoders, and for GPT-2's and Llama's "
            f"form, which a model of the family {config.kind} has not",
            OTHERWISE[flag],
        )
    if config != config.plain() or config.n_encoder_layers:
        raise _no_model(flag)
    if llama:
        described, state = _llama_config(transformers, config), _llama_state
    elif plain and config.positions != "rotary" and config.n_kv_heads == config.n_heads:
        described, state = _gpt2_config(transformers, config), _gpt2_state
    else:
        raise _no_model(flag)
    model = _empty(transformers, described, dtype)
    fill(model, state(weights, config))
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


def _no_model(flag: str) -> UsageError:
    return UsageError(
        f"{flag}: this mixture of positions, norm, activation and heads is neither GPT-2's nor "
        "Llama's",
        OTHERWISE[flag],
    )


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


def _gpt2_config(transformers: Any, config: ModelConfig) -> Any:
    return transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=config.d_ff,
        activation_function=ACTIVATIONS[config.activation],
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=_tied(config),
        bos_token_id=0,
        eos_token_id=0,
    )


def _tied(config: ModelConfig) -> bool:
    """GPT-2 does not scale its embeddings: with sinusoids they are stored scaled, the head not."""
    return config.tied and config.positions == "learned"


def _gpt2_state(weights: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """Rename to GPT-2's names. Its Conv1D holds (in, out), the transpose of a Linear layer."""
    embedding = weights["embed.tokens.weight"]
    state = {"transformer.wte.weight": embedding}
    if config.positions == "sinusoidal":
        state["transformer.wte.weight"] = embedding * math.sqrt(config.d_model)
        state["transformer.wpe.weight"] = oracle.sinusoids(config.context, config.d_model)
    else:
        state["transformer.wpe.weight"] = weights["embed.positions.weight"]
    if not _tied(config):
        state["lm_head.weight"] = embedding if config.tied else weights["head.weight"]
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj"}
    names |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    modules = {"norm": "transformer.ln_f"}
    for i in range(config.n_layers):
        modules |= {f"layers.{i}.{a}": f"transformer.h.{i}.{b}" for a, b in names.items()}
    for ours, theirs in modules.items():
        weight = weights[f"{ours}.weight"]
        n_out = weight.shape[0]
        state[f"{theirs}.weight"] = weight.T.copy() if weight.ndim == 2 else weight
        bias = weights[f"{ours}.bias"] if config.bias else np.zeros(n_out)
        state[f"{theirs}.bias"] = bias
    return state


def _llama_config(transformers: Any, config: ModelConfig) -> Any:
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.d_ff,
        hidden_act="silu",
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_bias=config.bias,
        mlp_bias=config.bias,
        tie_word_embeddings=config.tied,
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama_state(weights: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """Rename to Llama's names, with q, k, v and gate, up in matrices of their own."""
    state = {
        "model.embed_tokens.weight": weights["embed.tokens.weight"],
        "model.norm.weight": weights["norm.weight"],
    }
    if not config.tied:
        state["lm_head.weight"] = weights["head.weight"]
    n_q = config.n_heads * config.head_dim
    n_kv = config.n_kv_heads * config.head_dim
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        state[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.norm1.weight"]
        state[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.norm2.weight"]
        for part in ("weight", "bias") if config.bias else ("weight",):
            q, k, v = np.split(weights[f"{ours}.attn.qkv.{part}"], [n_q, n_q + n_kv])
            gate, up = np.split(weights[f"{ours}.mlp.up.{part}"], 2)
            for letter, rows in (("q", q), ("k", k), ("v", v)):
                state[f"{theirs}.self_attn.{letter}_proj.{part}"] = rows
            state[f"{theirs}.self_attn.o_proj.{part}"] = weights[f"{ours}.attn.out.{part}"]
            state[f"{theirs}.mlp.gate_proj.{part}"] = gate
            state[f"{theirs}.mlp.up_proj.{part}"] = up
            state[f"{theirs}.mlp.down_proj.{part}"] = weights[f"{ours}.mlp.down.{part}"]
    return state
