"""Rules that make the default configuration of any model type small.

The names of its fields are much the same everywhere. Layers are dropped so that one of each kind is
left, and windows and chunks become short, so that a short check goes beyond them.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

ORDINARY = 128  # ids that are words: special ones lie beyond them
VOCABULARY = 192
WINDOW = 8  # of attention, in tokens
HEADS = 4
MAX_LAYERS = 6
AMPLE = 2**16  # tokens

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
LAYER_NUMBERS = re.compile(r".*(_layers|_ids|_idxs|_indices)")  # lists of the numbers of layers
DERIVED = ("model_type", "architectures", "transformers_version", "_name_or_path")
REQUIRED = {  # of what some configurations leave open
    "head_dim": 16, "num_key_value_heads": HEADS, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}  # fmt: skip


class Layers(NamedTuple):
    """What a configuration says of its layers before it is shrunk."""

    n: int  # 0: it does not say
    n_heads: int  # 0: it does not say
    kept: list[int]  # numbers of the layers that are left; none: no list says how they differ


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, smaller; those of configurations in it too."""
    model_type = fields.get("model_type", "")
    fields = {name: value for name, value in fields.items() if name not in DERIVED}
    n_layers = next((fields[k] for k in LAYERS if isinstance(fields.get(k), int)), 0)
    n_heads = next((fields[k] for k in ("num_attention_heads", "n_heads") if fields.get(k)), 0)
    layers = Layers(n_layers, n_heads, kept_layers(fields, n_layers))
    small = {name: _shrunk_field(name, value, layers) for name, value in fields.items()}
    if fields.get("head_dim") and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]  # two names of one size
    if layers.kept:
        _count_kept_layers(small, fields, layers)
    merge(small, SPECIAL.get(model_type, {}))
    if isinstance(small.get("moe_layer_end_index"), int):  # of the last layer
        small["moe_layer_end_index"] = max(len(layers.kept), 2) - 1
    return small


def _shrunk_field(name: str, value: Any, layers: Layers) -> Any:
    """What the first rule that matches a field makes of it; a field that none matches stays."""
    for pattern, kind, shrink in RULES:
        if isinstance(value, kind) and pattern.fullmatch(name):
            return shrink(name, value, layers)
    return value


# What the rules do


def _unchanged(name: str, value: Any, layers: Layers) -> Any:
    return value


def _ample(name: str, value: int, layers: Layers) -> int:
    """More tokens than any check feeds."""
    return AMPLE


def _token_id(name: str, value: int, layers: Layers) -> int:
    """An id within the small vocabulary, beyond the words, and mostly another for each name."""
    return value if value < 4 else ORDINARY + sum(map(ord, name)) % (VOCABULARY - ORDINARY)


def _kv_heads(name: str, value: int, layers: Layers) -> int:
    """As many as query heads, one, or some between, as it was."""
    if value == 1:
        return 1
    return HEADS if value >= layers.n_heads else HEADS // 2


def _size(name: str, value: int, layers: Layers) -> int:
    return min(value, next((most for pattern, most in SIZES if pattern.fullmatch(name)), value))


def _list_of_layers(name: str, value: Any, layers: Layers) -> Any:
    """What a list says of the layers that are left; a list of something else stays."""
    if not layers.kept:
        return value
    if is_layer_numbers(name, value):
        return [layers.kept.index(i) for i in value if i in layers.kept]
    if len(value) != layers.n:
        return list(value)
    return [HEADS if "heads" in name else value[i] for i in layers.kept]


def _configs_by_layer(name: str, value: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """The configurations of the layers that are left, by their new numbers."""
    kept = layers.kept
    return {str(kept.index(int(i))): shrunk(v) for i, v in value.items() if int(i) in kept}


def _dictionary(name: str, value: dict[str, Any], layers: Layers) -> dict[str, Any]:
    if "model_type" in value:
        return shrunk(value)
    return {k: rope_value(k, v) for k, v in value.items()}


def _required(name: str, value: None, layers: Layers) -> int | None:
    return REQUIRED.get(name)


# The name of a field, the type of its value, and what makes it small: the first that matches.
RULES: tuple[tuple[re.Pattern[str], type, Callable[[str, Any, Layers], Any]], ...] = tuple(
    (re.compile(name), kind, shrink)
    for name, kind, shrink in (
        (r".*", bool, _unchanged),  # in Python a bool is an int too
        (r".*_token_(id|index)", int, _token_id),  # it must be in the small vocabulary
        (r"(swa_)?(num_)?(key_value|kv)_(n_)?heads|num_kv_heads", int, _kv_heads),  # as grouped
        (r"expert_capacity", int, _ample),  # beyond it a pass drops tokens, and no step does
        (r".*", int, _size),  # sizes, by their names
        (r".*", list, _list_of_layers),  # what differs from layer to layer
        (r".*", tuple, _list_of_layers),
        (r"per_layer_config", dict, _configs_by_layer),
        (r".*", dict, _dictionary),  # a configuration in this one, or how positions rotate
        (r".*", type(None), _required),  # a default that would be derived from the large sizes
    )
)

# Names of fields that count something, and the largest value: the first that matches.
SIZES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(name), most)
    for name, most in (
        # Ids
        (r"(.*_)?vocab_size(_.*)?|encoder_hash_byte_group_vocab", VOCABULARY),
        # Layers, and after how many of them another kind comes
        (r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers", 2),
        (r"depth|num_blocks", 2),
        (r"num_layers_per_stack|num_global_layers|num_dense_layers|first_k_dense_replace", 1),
        (r".*_layer_period|.*sliding_window_pattern|.*every_n_layers|.*_interval", 2),
        (r"layer_group_size|.*_sparse_step", 2),
        (r".*_layer_offset", 1),
        # Windows and chunks, which a check of a few tokens must pass
        (r"sliding_window(_size)?|(attention_|keep_)?window(_size)?|local_radius", WINDOW),
        (r"attention_chunk_size|local_attention|local_attention_window_len", 2 * WINDOW),
        (r"(mamba_|max_inference_)?chunk_?size|block_size", WINDOW),
        (r".*attn_chunk_length|index_block_size", 4),
        # How many keys are chosen: fewer than there are
        (r"index_topk|indexer_budget", 16),
        (r"index_topk_blocks", 3),
        # Widths within a head, and of states
        (r"(kv|q|o)_lora_rank|.*low_?rank|adapter_rank|gated_norm_rank", 32),
        (r"qk_rope_head_dim|rotary_dim|d_rel", 8),  # with the 16 that do not rotate,
        (r"qk_head_dim", 24),  # these are the whole
        (r".*head_dim|.*head_size|dim_head|d_head|d_kv|kv_channels", 16),
        (r"mamba_d_head|mamba_headdim", 16),
        (r"(ssm_)?state_size|mamba_d_state", 8),
        (r"time_step_rank|mamba_dt_rank", 4),
        # Heads
        (r"(mamba_num|mamba_n|n_mamba)_heads", 8),
        (r"linear_num_value_heads", HEADS),
        (r"linear_num_key_heads", 2),
        (r"(n|num|swa_num|num_query)_(attention_)?(heads?|groups)|.*attention_heads", HEADS),
        (r"index(er)?_n_heads", 32),  # scores pass a relu: of 4, many are 0, and none the largest
        # Widths of the model, and of its MLP
        (r".*(inter|interm)mediate.*|.*ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner", 128),
        (r".*ffn_hidden_size|mlp_dim|feed_forward_size", 128),
        (r"moe_latent_size|router_hidden_size", 128),
        (r"(.*_)?hidden_size(_global|_per_layer_input)?|d_model|n_embd", 64),
        (r"emb_dim|embedding_dim|adapter_(in|out)(put)?_(dim|size)", 64),
        (r"lru_width|.*embed(ding)?_(proj_)?(dim|size)|embedding_size", 64),
        (r"mamba_d_ssm|dim_model_base", 64),
        # Experts
        (r".*experts_per_tok(en)?|moe_(topk|top_k|k)|zero_expert_num", 2),
        (r"n_group|num_expert_group|n_groups|mamba_n_?groups", 2),
        (r"topk_group", 1),
        (r"num_shared_experts|n_shared_experts|moe_num_shared_experts|num_mem_blocks", 1),
        (r"(n|num|moe_num)_(routed_|local_)?experts", 8),
        # What a single family has
        (r"rel_extent|index_local_blocks", 32),
        (r"max_window_layers|num_sparse_(en|de)coder_layers", 1),
    )
)

# What the rules cannot know, by the type of the model.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note_text": {"head_dim": 24},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "musicgen_decoder": {"num_codebooks": 1}, "musicgen_melody_decoder": {"num_codebooks": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_head_dim": 16,
                       "indexer_kv_heads": 1, "indexer_n_heads": HEADS},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (16, 48)},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
              "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}  # fmt: skip


# Layers


def kept_layers(fields: dict[str, Any], n_layers: int) -> list[int]:
    """The first layer of each kind, two or more: its kind is what all lists say of it."""
    lists = {name: value for name, value in fields.items() if _is_by_layer(name, value, n_layers)}
    if not lists or n_layers < 2:
        return []
    first_of_kind: dict[str, int] = {}
    for i in range(n_layers):
        kind = [i in v if is_layer_numbers(name, v) else v[i] for name, v in lists.items()]
        first_of_kind.setdefault(repr(kind), i)
    kept = list(first_of_kind.values())[:MAX_LAYERS]
    if n_sharing := fields.get("num_kv_shared_layers"):
        kept = _with_sharing(kept, fields["layer_types"], n_layers - n_sharing)
    return kept if len(kept) > 1 else [0, 1]


def _with_sharing(kept: list[int], types: list[str], n_own: int) -> list[int]:
    """Of the layers with keys of their own, those in `kept`; and one of each of their types that
    shares their keys, of the layers from `n_own` on."""
    own = [i for i in kept if i < n_own]
    return own + [types.index(types[i], n_own) for i in own]


def _is_by_layer(name: str, value: Any, n_layers: int) -> bool:
    """Whether a field says something of each layer, or which layers it is true of."""
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return len(value) == n_layers or is_layer_numbers(name, value)


def is_layer_numbers(name: str, value: Any) -> bool:
    """Whether a list has the numbers of layers, and not something for each."""
    return (
        LAYER_NUMBERS.fullmatch(name) is not None
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        and all(a < b for a, b in itertools.pairwise(value))
    )


def _count_kept_layers(small: dict[str, Any], fields: dict[str, Any], layers: Layers) -> None:
    for name in LAYERS:
        if small.get(name) and fields[name] == layers.n:
            small[name] = len(layers.kept)
    if small.get("num_kv_shared_layers"):  # one of each type, beside one with keys of its own
        small["num_kv_shared_layers"] = len(layers.kept) // 2


# Dictionaries


def rope_value(name: str, value: Any) -> Any:
    """What stands in a dictionary of a configuration: positions, rates of compression."""
    if isinstance(value, dict):
        return {k: rope_value(k, v) for k, v in value.items()}
    if name == "mrope_section":
        return [4, 2, 2]
    if name == "heavily_compressed_attention" and isinstance(value, int):
        return WINDOW
    return value


def merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set what stands in `changes`, in dictionaries in them too."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            merge(fields[name], value)
        else:
            fields[name] = copy.deepcopy(value)
