"""GPT-2 (Radford 2019): learned positions, LayerNorm, one matrix of queries, keys and values."""

from __future__ import annotations

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.fields import Fields, head_size
from kvtool.core.checkpoint.families.weights import HEAD, NameMap, Stored

PREFIX = "transformer."
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def read(f: Fields) -> ModelConfig:
    """Raises UsageError, naming the field."""
    d_model, n_heads, _ = head_size(f, "n_head", "n_embd")
    return ModelConfig(
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
    )


def names(config: ModelConfig) -> NameMap:
    """Where our tensors are in theirs."""
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
