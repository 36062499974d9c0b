"""Llama (Touvron 2023) and related models: rotary positions, RMSNorm, SwiGLU, grouped queries.

They differ in biases, in norms of queries and keys, in windows, and in what a missing field means
(as in transformers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvtool.config import ModelConfig, check_int
from kvtool.core.checkpoint.families.fields import Fields, head_size
from kvtool.core.checkpoint.families.rope import rotation
from kvtool.core.checkpoint.families.weights import HEAD, NameMap, Stored
from kvtool.errors import UsageError

PREFIX = "model."
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}


def read_llama(f: Fields) -> ModelConfig:
    """The configuration of a llama. Raises UsageError, naming the field; so do the others."""
    bias = f.flag("attention_bias", False)
    mlp_bias = f.flag("mlp_bias", False)
    return read_decoder(f, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def read_mistral(f: Fields) -> ModelConfig:
    """A model_type of mistral: a window for all layers."""
    window = 0 if f.is_null("sliding_window") else f.size("sliding_window", 4096)
    return read_decoder(f, kv_heads=8, window=window)


def read_qwen2(f: Fields) -> ModelConfig:
    """A model_type of qwen2: biases at queries, keys and values, and a window for some layers."""
    return read_decoder(f, kv_heads=32, qkv_bias=True, **_window_of_some_layers(f))


def read_qwen3(f: Fields) -> ModelConfig:
    """A model_type of qwen3: as qwen2, with heads that are normalised."""
    bias = f.flag("attention_bias", False)
    windows = _window_of_some_layers(f)
    return read_decoder(
        f, kv_heads=32, head=128, qkv_bias=bias, out_bias=bias, qk_norm=True, **windows
    )


def usual_turn(f: Fields, context: int) -> dict[str, Any]:
    """The rotary fields of a ModelConfig, for models whose layers all rotate alike."""
    theta, scaling = rotation(f, context)
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_decoder(
    f: Fields,
    kind: type[ModelConfig] = ModelConfig,
    kv_heads: int = 0,
    head: int | None = None,
    window: int = 0,
    turn: Callable[[Fields, int], dict[str, Any]] = usual_turn,
    activation: tuple[str, Mapping[str, str], str] = ("hidden_act", ACTIVATIONS, "silu"),
    tied: bool = False,
    eps: float = 1e-6,
    **extra: Any,
) -> ModelConfig:
    """The configuration, as `kind`, of a decoder with rotary positions and RMSNorm.

    `kv_heads` and `head` are the defaults of their fields; 0: as many as query heads. `turn` reads
    how positions turn in that context. activation: the field, what its values are here, and its
    default. tied, eps: defaults. Raises UsageError, naming the field.
    """
    d_model, n_heads, head_dim = head_size(f, "num_attention_heads", "hidden_size", head)
    absent = n_heads if f.is_null("num_key_value_heads") else kv_heads or n_heads
    n_kv_heads = f.size("num_key_value_heads", absent)
    if n_heads % n_kv_heads:
        raise UsageError(
            f"num_key_value_heads: {n_kv_heads} do not divide {n_heads} num_attention_heads"
        )
    if head_dim % 2:
        raise UsageError(f"head_dim: {head_dim} is odd (expected an even one, to be rotated)")
    context = _context(f)
    turned = {"context": context, **turn(f, context)}
    # A window as wide as the context hides nothing, but its layers may rotate in another way.
    hides = window < turned["context"] or turned.get("window_theta")
    return kind(
        vocab_size=f.size("vocab_size"),
        n_layers=f.size("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_size=0 if head_dim * n_heads == d_model else head_dim,
        d_ff=f.size("intermediate_size"),
        positions="rotary",
        norm="rmsnorm",
        norm_eps=f.number("rms_norm_eps", eps),
        activation=f.one_of(*activation),
        bias=False,
        tied=f.flag("tie_word_embeddings", tied),
        window=window if hides else 0,
        **turned,
        **extra,
    )


def _context(f: Fields) -> int:
    """max_position_embeddings, which the first conversions of Llama call max_sequence_length."""
    fields = ("max_position_embeddings", "max_sequence_length")
    new, old = (f.size(name) if name in f.data else None for name in fields)
    if new and old and new != old:
        raise UsageError(f"{fields[1]}: {old} contradicts {fields[0]} {new}")
    return new or old or f.size(fields[0])


def _window_of_some_layers(f: Fields) -> dict[str, Any]:
    """The window of Qwen's later layers, if it is used."""
    n_layers, used = f.size("num_hidden_layers"), f.flag("use_sliding_window", False)
    window = f.size("sliding_window", 4096) if not f.is_null("sliding_window") else 0
    first = f.take("max_window_layers", 28)
    layers = f.take("layer_types")
    if not used:
        window = 0
    if layers is not None:
        first = _first_sliding(layers, n_layers, window)
    check_int("max_window_layers", first, 0)
    if not window or first >= n_layers:
        return {}
    return {"window": window, "first_window_layer": first}


def _first_sliding(layers: Any, n_layers: int, window: int) -> int:
    """The number of the first layer with a window. Raises UsageError if a later one has none."""
    kinds = ("full_attention", "sliding_attention")
    known = isinstance(layers, list) and all(kind in kinds for kind in layers)
    if not known or len(layers) != n_layers:
        raise UsageError(f"layer_types: expected {n_layers} of {' and '.join(kinds)}")
    first = layers.index(kinds[1]) if kinds[1] in layers else n_layers
    if kinds[0] in layers[first:]:
        raise UsageError(
            f"layer_types: layer {first + layers[first:].index(kinds[0])} has no window after one "
            "that has (expected full_attention first)"
        )
    if first < n_layers and not window:
        raise UsageError("layer_types: names sliding_attention, but sliding_window is not used")
    return first


# Norms of a block, kvtool's and the folder's names, by their place in the block.
NORMS = {
    "before": (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")),
    "after": (
        ("norm1_after", "post_attention_layernorm"), ("norm2_after", "post_feedforward_layernorm")
    ),
    "both": (
        ("norm1", "input_layernorm"), ("norm1_after", "post_attention_layernorm"),
        ("norm2", "pre_feedforward_layernorm"), ("norm2_after", "post_feedforward_layernorm"),
    ),
}  # fmt: skip


def names(config: ModelConfig, fused: bool = False) -> NameMap:
    """Maps each tensor of kvtool to those of the folder. fused: queries, keys and values share one
    matrix, and so do gate and up projection."""
    d, ff, width = config.d_model, config.d_ff, config.head_dim
    heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
    found = {
        "embed.tokens.weight": Stored.one("embed_tokens.weight", config.vocab_size, d),
        "norm.weight": Stored.one("norm.weight", d),
        "head.weight": Stored.one(HEAD, config.vocab_size, d),
    }
    norms = NORMS[getattr(config, "norm_place", "before")]
    whole = getattr(config, "qk_norm_whole", False)
    for i in range(config.n_layers):
        ours = theirs = f"layers.{i}"
        qkv = [(f"{theirs}.self_attn.{x}_proj", n * width) for x, n in heads.items()]
        up = [(f"{theirs}.mlp.{x}_proj", ff) for x in ("gate", "up")]
        if fused:
            qkv = [(f"{theirs}.self_attn.qkv_proj", sum(heads.values()) * width)]
            up = [(f"{theirs}.mlp.gate_up_proj", 2 * ff)]
        stacks = (
            ("qkv", f"{ours}.attn.qkv", qkv, d),
            ("out", f"{ours}.attn.out", [(f"{theirs}.self_attn.o_proj", d)], heads["q"] * width),
            ("mlp", f"{ours}.mlp.up", up, d),
            ("mlp", f"{ours}.mlp.down", [(f"{theirs}.mlp.down_proj", d)], ff),
        )
        for part, name, rows, n_in in stacks:
            found[f"{name}.weight"] = Stored(tuple((f"{x}.weight", (n, n_in)) for x, n in rows))
            if config.has_bias(part):
                found[f"{name}.bias"] = Stored(tuple((f"{x}.bias", (n,)) for x, n in rows))
        for a, b in norms:
            found[f"{ours}.{a}.weight"] = Stored.one(f"{theirs}.{b}.weight", d)
        for x in "qk" if config.qk_norm else "":
            size = heads[x] * width if whole else width
            found[f"{ours}.attn.{x}_norm.weight"] = Stored.one(
                f"{theirs}.self_attn.{x}_norm.weight", size
            )
    return found
