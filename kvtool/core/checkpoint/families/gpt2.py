"""GPT-2 (Radford 2019): learned positions, LayerNorm, one matrix of queries, keys and values."""

from __future__ import annotations

from typing import Any

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.fields import Fields, head_size
from kvtool.core.checkpoint.families.weights import HEAD, NameMap, Stored
from kvtool.core.models.general import GeneralConfig

PREFIX = "transformer."
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def read(f: Fields) -> ModelConfig:
    """The configuration of a gpt2. Raises UsageError, naming the field."""
    d_model, n_heads, _ = head_size(f, "n_head", "n_embd")
    scales = _scales(f)
    return (GeneralConfig if scales else ModelConfig)(
        vocab_size=f.size("vocab_size"),
        n_layers=f.size("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        d_ff=f.size("n_inner", 4 * d_model),
        context=f.size("n_positions"),
        positions="learned",
        norm="layernorm",
        norm_eps=f.number("layer_norm_epsilon", 1e-5),
        activation=f.one_of("activation_function", ACTIVATIONS, "gelu_new"),
        bias=True,
        tied=f.flag("tie_word_embeddings", True),
        **scales,
    )


def _scales(f: Fields) -> dict[str, Any]:
    """The fields of a GeneralConfig for the scale of scores; none for the usual scale."""
    scaled = f.flag("scale_attn_weights", True)
    by_depth = f.flag("scale_attn_by_inverse_layer_idx", False)
    if scaled and not by_depth:
        return {}
    return {"attention_scale": 0.0 if scaled else 1.0, "scale_by_depth": by_depth}


def names(config: ModelConfig) -> NameMap:
    """Maps each tensor of kvtool to those of the folder."""
    d, ff = config.d_model, config.d_ff
    found = {
        "embed.tokens.weight": Stored.one("wte.weight", config.vocab_size, d),
        "embed.positions.weight": Stored.one("wpe.weight", config.context, d),
        "norm.weight": Stored.one("ln_f.weight", d),
        "norm.bias": Stored.one("ln_f.bias", d),
        "head.weight": Stored.one(HEAD, config.vocab_size, d),
    }
    matrices = (
        ("attn.qkv", "attn.c_attn", 3 * d, d),
        ("attn.out", "attn.c_proj", d, d),
        ("mlp.up", "mlp.c_fc", ff, d),
        ("mlp.down", "mlp.c_proj", d, ff),
    )
    for i in range(config.n_layers):
        ours, theirs = f"layers.{i}", f"h.{i}"
        for a, b in (("norm1", "ln_1"), ("norm2", "ln_2")):
            for part in ("weight", "bias"):
                found[f"{ours}.{a}.{part}"] = Stored.one(f"{theirs}.{b}.{part}", d)
        for a, b, n_out, n_in in matrices:
            found[f"{ours}.{a}.weight"] = Stored.conv1d(f"{theirs}.{b}.weight", n_out, n_in)
            found[f"{ours}.{a}.bias"] = Stored.one(f"{theirs}.{b}.bias", n_out)
    return found
