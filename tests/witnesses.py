"""Models that others wrote, filled with kvtool's weights, to witness what kvtool computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvtool.config import ModelConfig


def witness_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found = model(torch.tensor([ids]))
    return getattr(found, "logits", found)[0].numpy()


def load(model: Any, state: dict[str, np.ndarray]) -> None:
    """Copy `state` into the model; every parameter must be named, up to the tied head."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head is listed once
            parameter.copy_(torch.from_numpy(state.pop(name)))
    assert not state


def gpt2_state(weights: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Rename to GPT-2's names. Its Conv1D holds (in, out), the transpose of a Linear layer."""
    names = {"embed.tokens": "transformer.wte", "embed.positions": "transformer.wpe"}
    names |= {"norm": "transformer.ln_f", "head": "lm_head"}
    transposed = []
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        names |= {f"{ours}.norm1": f"{theirs}.ln_1", f"{ours}.norm2": f"{theirs}.ln_2"}
        names |= {f"{ours}.attn.qkv": f"{theirs}.attn.c_attn"}
        names |= {f"{ours}.attn.out": f"{theirs}.attn.c_proj"}
        names |= {f"{ours}.mlp.up": f"{theirs}.mlp.c_fc"}
        names |= {f"{ours}.mlp.down": f"{theirs}.mlp.c_proj"}
        transposed += [f"{ours}.{part}" for part in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")]
    state = {}
    for name, weight in weights.items():
        module, part = name.rsplit(".", 1)
        flip = module in transposed and part == "weight"
        state[f"{names[module]}.{part}"] = weight.T.copy() if flip else weight
    return state


def gpt2(weights: dict[str, np.ndarray], config: ModelConfig) -> Any:
    """GPT2LMHeadModel in float64, with the weights of a decoder that has learned positions."""
    import transformers

    names = {"gelu_tanh": "gelu_new"}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.d_model,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_inner=config.d_ff,
            activation_function=names.get(config.activation, config.activation),
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tied,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model = model.double().eval()
    load(model, gpt2_state(weights, config))
    return model
