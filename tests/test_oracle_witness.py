"""The NumPy oracle against independent models: kvtool's own in torch, and two of transformers.

All compute in float64, so that rounding is all that may stand between them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvtool.config import POSITIONS, ModelConfig
from kvtool.core import oracle
from kvtool.core.models import build_model
from oracle_cases import EVERY_CONFIG, IDS, TINY, gap, random_weights
from witnesses import gpt2, load, witness_logits

# --- kvtool's torch model


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_torch_decoder_agrees_in_every_config(positions: str) -> None:
    """1e-12: rounding through two layers."""
    torch.manual_seed(9)
    for config in EVERY_CONFIG:
        if config.positions != positions:
            continue
        model = build_model(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # else biases are 0 and norm weights 1
                parameter += 0.1 * torch.randn_like(parameter)
        weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
        # A tied head is in torch's state too, under its own name.
        assert oracle.weight_shapes(config).keys() | {"head.weight"} == weights.keys()
        assert gap(witness_logits(model, IDS), oracle.logits(weights, config, IDS)) < 1e-12, config


# --- models of transformers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
def test_gpt2_of_transformers_agrees(activation: str, tied: bool) -> None:
    """1e-12: rounding through two layers; nothing in GPT-2 computes below float64."""
    pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, positions="learned", activation=activation, tied=tied)
    weights = random_weights(config, 7)
    found = witness_logits(gpt2(weights, config), IDS)
    assert gap(oracle.logits(weights, config, IDS), found) < 1e-12


def llama_state(weights: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
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


def llama(transformers: Any, config: ModelConfig) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
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
    ).double()


def llama_gap(transformers: Any, config: ModelConfig) -> float:
    weights = random_weights(config, 8)
    model = llama(transformers, config).eval()
    load(model, llama_state(weights, config))
    return gap(oracle.logits(weights, config, IDS), witness_logits(model, IDS))


LLAMA = dataclasses.replace(
    TINY,
    positions="rotary",
    norm="rmsnorm",
    activation="swiglu",
    n_kv_heads=2,
    bias=False,
    tied=False,
    rope_theta=700.0,
)


def test_llama_of_transformers_agrees_to_float32() -> None:
    """1e-5: even in float64, transformers computes RMSNorm and the rotary table in float32
    (rounding 6e-8 each time, through two layers)."""
    transformers = pytest.importorskip("transformers")
    assert llama_gap(transformers, LLAMA) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_llama_of_transformers_agrees_to_float64_once_its_float32_casts_are_lifted(
    n_kv_heads: int, bias: bool, tied: bool
) -> None:
    """1e-12: with every cast to float32 turned into one to float64, only rounding is left."""
    transformers = pytest.importorskip("transformers")

    class Promote(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            return func(*args, **kwargs)

    config = dataclasses.replace(LLAMA, n_kv_heads=n_kv_heads, bias=bias, tied=tied)
    with Promote():
        assert llama_gap(transformers, config) < 1e-12
