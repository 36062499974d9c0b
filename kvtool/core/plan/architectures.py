"""The model types that can be planned: how they name their sizes, and what is left unsaid.

A configuration leaves out what is its type's default. These defaults are transformers' own, kept in
kvtool/data/architectures.json, so that a plan needs neither transformers nor seconds to load it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "data" / "architectures.json"
# What is read of a configuration, by the names that most types have.
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "n_inner", "ffn_dim", "vocab_size", "max_position_embeddings",
    "tie_word_embeddings", "local_attention", "sliding_window", "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern", "attention_chunk_size", "num_kv_shared_layers", "no_rope_layers",
    "no_rope_layer_interval", "global_attn_every_n_layers", "kv_lora_rank", "q_lora_rank",
    "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "multi_query",
    "new_decoder_architecture", "attn_config", "global_head_dim", "num_global_key_value_heads",
    "attention_k_eq_v", "bias", "attention_bias", "mlp_bias", "use_bias", "qkv_bias",
    "use_qk_norm", "attention_out_bias", "num_experts", "num_local_experts", "n_routed_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size",
    "n_shared_experts", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers",
    "moe_num_experts", "moe_topk", "mlp_layer_types", "moe_layer_freq",
    "shared_intermediate_size", "moe_num_shared_experts", "num_decoder_attention_heads",
    "decoder_layers", "decoder_attention_heads", "d_kv", "num_decoder_layers", "num_layers",
    "max_source_positions", "max_target_positions", "is_encoder_decoder",
    "num_layers_per_stack", "H_cycles", "L_cycles",
)  # fmt: skip

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LAYERS = {"f": FULL, "s": SLIDING, "c": CHUNKED}  # as the table has them


@dataclass(frozen=True)
class Architecture:
    """One type: `names` of its fields where they are not those of FIELDS, and their `defaults`.

    part: which field of the configuration is the language model, of the type `of`; "": all of it.
    defaults of a type with a part: those that the part has otherwise, where a file has no part.
    layer_types: those of the default configuration, where they differ.
    """

    name: str
    part: str = ""
    of: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ()


@cache
def architectures() -> dict[str, Architecture]:
    """All types, by name."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: Architecture(
            name,
            one.get("part", ""),
            one.get("type", ""),
            one.get("names", {}),
            one.get("defaults", {}),
            tuple(LAYERS[letter] for letter in one.get("layers", "")),
        )
        for name, one in table.items()
    }
