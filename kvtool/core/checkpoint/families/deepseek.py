"""DeepSeek-V2 and V3 (2024): latent attention. Only their layers without experts."""

from __future__ import annotations

import math
from typing import Any

from kvtool.config import ModelConfig, check_int
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.llama import ACTIVATIONS, NORMS
from kvtool.core.checkpoint.families.rope import rope_spec, rotation
from kvtool.core.checkpoint.families.weights import HEAD, NameMap, Stored
from kvtool.core.models.latent import LatentConfig
from kvtool.errors import UsageError

# Fields of the router, which chooses the experts.
OF_EXPERTS = (
    "aux_loss_alpha", "ep_size", "moe_intermediate_size", "moe_layer_freq", "n_group",
    "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
    "num_local_experts", "output_router_logits", "routed_scaling_factor", "scoring_func",
    "seq_aux", "topk_group", "topk_method", "num_experts",
)  # fmt: skip
# Layers after the last one, which predict further tokens (multi-token prediction). Not used here.
OF_GUESSES = ("num_mtp_layers", "num_nextn_predict_layers")


def read_v2(f: Fields) -> ModelConfig:
    """The configuration of a deepseek_v2. Raises UsageError, naming the field."""
    return _read(f, first_dense=0, interleaved=True, mlp_bias=f.flag("mlp_bias", False))


def read_v3(f: Fields) -> ModelConfig:
    """A model_type of deepseek_v3."""
    return _read(f, first_dense=3, interleaved=f.flag("rope_interleave", True), mlp_bias=False)


def _read(f: Fields, first_dense: int, interleaved: bool, mlp_bias: bool) -> ModelConfig:
    f.take("auto_map")  # names code for versions of transformers that had no such model
    n_layers, n_heads = f.size("num_hidden_layers"), f.size("num_attention_heads")
    dense = f.take("first_k_dense_replace", first_dense)
    check_int("first_k_dense_replace", dense, 0)
    if f.take("n_routed_experts", 1) and dense < n_layers:
        raise UsageError(
            f"first_k_dense_replace: layers from {dense} on have experts (expected {n_layers}: "
            "kvtool has no experts)"
        )
    for name in (*OF_EXPERTS, *OF_GUESSES):
        f.take(name)
    f.require(num_key_value_heads=n_heads)
    turning, still = f.size("qk_rope_head_dim", 64), f.size("qk_nope_head_dim", 128)
    if turning % 2:
        raise UsageError(f"qk_rope_head_dim: {turning} is odd (expected an even one)")
    f.require(head_dim=turning, qk_head_dim=turning + still)
    context = f.size("max_position_embeddings")
    scale = (turning + still) ** -0.5 * _longer(rope_spec(f)) ** 2
    theta, scaling = rotation(f, context)
    bias = f.flag("attention_bias", False)
    return LatentConfig(
        vocab_size=f.size("vocab_size"),
        n_layers=n_layers,
        d_model=f.size("hidden_size"),
        n_heads=n_heads,
        d_ff=f.size("intermediate_size"),
        context=context,
        positions="rotary",
        norm="rmsnorm",
        norm_eps=f.number("rms_norm_eps", 1e-6),
        activation=f.one_of("hidden_act", ACTIVATIONS, "silu"),
        bias=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=mlp_bias,
        tied=f.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        rotary_dim=turning,
        attention_scale=scale,
        q_rank=0 if f.is_null("q_lora_rank") else f.size("q_lora_rank", 1536),
        kv_rank=f.size("kv_lora_rank", 512),
        still_dim=still,
        value_dim=f.size("v_head_dim", 128),
        interleaved=interleaved,
    )


def _longer(spec: Fields) -> float:
    """The factor of queries and keys for a longer context, apart from their rotation (mscale)."""
    kind: Any = spec.take("rope_type", spec.take("type", "default"))
    every = spec.take("mscale_all_dim", 0)
    if kind == "default" or not every:
        return 1.0
    factor = spec.number("factor")
    return 1.0 + 0.1 * spec.number("mscale_all_dim") * math.log(factor) if factor > 1 else 1.0


def names(config: ModelConfig) -> NameMap:
    """Maps each tensor of kvtool to those of the folder."""
    assert isinstance(config, LatentConfig)
    c, d = config, config.d_model
    found = {
        "embed.tokens.weight": Stored.one("embed_tokens.weight", c.vocab_size, d),
        "norm.weight": Stored.one("norm.weight", d),
        "head.weight": Stored.one(HEAD, c.vocab_size, d),
    }
    n_query, n_value = c.n_heads * c.query_dim, c.n_heads * c.value_dim
    linears = [
        ("kv_down", "kv_a_proj_with_mqa", c.kv_rank + c.rotary_dim, d),
        ("kv", "kv_b_proj", c.n_heads * c.still_dim + n_value, c.kv_rank),
        ("out", "o_proj", d, n_value),
        ("q", "q_b_proj" if c.q_rank else "q_proj", n_query, c.q_rank or d),
    ]
    norms = [("kv_norm", "kv_a_layernorm", c.kv_rank)]
    if c.q_rank:
        linears.append(("q_down", "q_a_proj", c.q_rank, d))
        norms.append(("q_norm", "q_a_layernorm", c.q_rank))
    biased = {"kv_down": "qkv", "q_down": "qkv", "out": "out"}
    for i in range(c.n_layers):
        layer = f"layers.{i}"
        for ours, theirs, n_out, n_in in linears:
            goal, source = f"{layer}.attn.{ours}", f"{layer}.self_attn.{theirs}"
            found[f"{goal}.weight"] = Stored.one(f"{source}.weight", n_out, n_in)
            if ours in biased and c.has_bias(biased[ours]):
                found[f"{goal}.bias"] = Stored.one(f"{source}.bias", n_out)
        for ours, theirs, width in norms:
            found[f"{layer}.attn.{ours}.weight"] = Stored.one(
                f"{layer}.self_attn.{theirs}.weight", width
            )
        for ours, theirs in NORMS["before"]:
            found[f"{layer}.{ours}.weight"] = Stored.one(f"{layer}.{theirs}.weight", d)
        up = [(f"{layer}.mlp.{x}_proj", c.d_ff) for x in ("gate", "up")]
        found[f"{layer}.mlp.up.weight"] = Stored(tuple((f"{x}.weight", (n, d)) for x, n in up))
        found[f"{layer}.mlp.down.weight"] = Stored.one(f"{layer}.mlp.down_proj.weight", d, c.d_ff)
        if c.has_bias("mlp"):
            found[f"{layer}.mlp.up.bias"] = Stored(tuple((f"{x}.bias", (n,)) for x, n in up))
            found[f"{layer}.mlp.down.bias"] = Stored.one(f"{layer}.mlp.down_proj.bias", d)
    return found
