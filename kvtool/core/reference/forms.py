"""Our plain decoders in the form of models of transformers: which they have, and by what names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kvtool.config import ModelConfig
from kvtool.core.reference import oracle

Arrays = dict[str, np.ndarray]
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


class Form(NamedTuple):
    """A class of transformers' models that computes what a decoder of ours does.

    described: transformers and our configuration -> theirs. state: our weights by name -> theirs.
    """

    described: Callable[[Any, ModelConfig], Any]
    state: Callable[[Mapping[str, np.ndarray], ModelConfig], Arrays]


def form_of(config: ModelConfig) -> Form | None:
    """The form of a decoder, if it has one.

    Layer norm and a plain MLP make a GPT-2 with added positions, and with rotary ones a GPT-NeoX
    whose residual connections are one after the other. Rotary positions, RMSNorm and SwiGLU make a
    Llama.
    """
    if config != config.plain() or config.n_encoder_layers:
        return None
    rotary = config.positions == "rotary"
    if rotary and (config.norm, config.activation) == ("rmsnorm", "swiglu"):
        return Form(_llama_config, _llama_state)
    plain = config.norm == "layernorm" and config.activation in ACTIVATIONS
    if not plain or config.n_kv_heads != config.n_heads:
        return None
    return Form(_neox_config, _neox_state) if rotary else Form(_gpt2_config, _gpt2_state)


def _modules(
    weights: Mapping[str, np.ndarray],
    config: ModelConfig,
    names: Mapping[str, str],
    prefix: str,
    layers: str,
    norm: str,
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Our name, theirs, weight and bias (zeros if there is none) of each module that has both.

    names: of a layer, ours to theirs. prefix: of their names. layers, norm: what they call the list
    of layers, and the last norm.
    """
    modules = {"norm": f"{prefix}{norm}"}
    for i in range(config.n_layers):
        modules |= {f"layers.{i}.{a}": f"{prefix}{layers}.{i}.{b}" for a, b in names.items()}
    for ours, theirs in modules.items():
        weight = weights[f"{ours}.weight"]
        bias = weights[f"{ours}.bias"] if config.bias else np.zeros(weight.shape[0])
        yield ours, theirs, weight, bias


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
        tie_word_embeddings=_gpt2_ties(config),
        bos_token_id=0,
        eos_token_id=0,
    )


def _gpt2_ties(config: ModelConfig) -> bool:
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
    if not _gpt2_ties(config):
        state["lm_head.weight"] = embedding if config.tied else weights["head.weight"]
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.qkv": "attn.c_attn", "attn.out": "attn.c_proj"}
    names |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for _, theirs, weight, bias in _modules(weights, config, names, "transformer.", "h", "ln_f"):
        state[f"{theirs}.weight"] = weight.T.copy() if weight.ndim == 2 else weight
        state[f"{theirs}.bias"] = bias
    return state


def _neox_config(transformers: Any, config: ModelConfig) -> Any:
    return transformers.GPTNeoXConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
        hidden_act=ACTIVATIONS[config.activation],
        layer_norm_eps=config.norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": 1.0,
        },
        use_parallel_residual=False,
        tie_word_embeddings=config.tied,
        bos_token_id=0,
        eos_token_id=0,
    )


def _neox_state(weights: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
    """Rename to GPT-NeoX's names, with q, k and v of a head side by side."""
    state = {"gpt_neox.embed_in.weight": weights["embed.tokens.weight"]}
    if not config.tied:
        state["lm_head.weight"] = weights["head.weight"]
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {"attn.qkv": "attention.query_key_value", "attn.out": "attention.dense"}
    names |= {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    found = _modules(weights, config, names, "gpt_neox.", "layers", "final_layer_norm")
    for ours, theirs, *both in found:
        for part, rows in zip(("weight", "bias"), both, strict=True):
            if ours.endswith("qkv"):
                of_head = rows.reshape(3, config.n_heads, config.head_dim, *rows.shape[1:])
                rows = of_head.swapaxes(0, 1).reshape(rows.shape)
            state[f"{theirs}.{part}"] = rows
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
