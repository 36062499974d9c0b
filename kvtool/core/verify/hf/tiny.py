"""Tiny random models of any architecture that transformers knows: a verdict needs no download.

The default configuration of a type is shrunk by rules over the names of its fields, which are much
the same everywhere. Layers are dropped so that one of each kind is left, and windows and chunks
become short, so that a short check goes beyond them.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from kvtool.core.verify.hf.library import (
    CAUSAL,
    SEQ2SEQ,
    known_types,
    loop_over_experts,
    quiet_transformers,
)
from kvtool.errors import UsageError, pass_on_shortage
from kvtool.files import shipped_models

ORDINARY = 128  # ids that are words: special ones lie beyond them
VOCABULARY = 192
WINDOW = 8  # of attention, in tokens
HEADS = 4
MOST_LAYERS = 6

# Field names -> the largest value; the first that matches counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers|depth|num_blocks", 2),
    (r"num_layers_per_stack|num_global_layers|num_dense_layers|first_k_dense_replace", 1),
    (r".*_layer_period|.*sliding_window_pattern|.*every_n_layers|.*_interval|layer_group_size", 2),
    (r".*_sparse_step", 2),
    (r".*_layer_offset", 1),
    (r"sliding_window(_size)?|(attention_|keep_)?window(_size)?|local_radius", WINDOW),
    (r"attention_chunk_size|local_attention|local_attention_window_len", 2 * WINDOW),
    (r"(mamba_|max_inference_)?chunk_?size|block_size", WINDOW),
    (r".*attn_chunk_length|index_block_size", 4),
    (r"index_topk|indexer_budget", 16),
    (r"index_topk_blocks", 3),
    (r"(kv|q|o)_lora_rank|.*low_?rank|adapter_rank|gated_norm_rank", 32),
    (r"qk_rope_head_dim|rotary_dim|d_rel", 8),
    (r"qk_head_dim", 24),
    (r".*head_dim|.*head_size|dim_head|d_head|d_kv|kv_channels|mamba_d_head|mamba_headdim", 16),
    (r"(ssm_)?state_size|mamba_d_state", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"(mamba_num|mamba_n|n_mamba)_heads", 8),
    (r"linear_num_value_heads", HEADS),
    (r"linear_num_key_heads", 2),
    (r"(n|num|swa_num|num_query)_(attention_)?(heads?|groups)|.*attention_heads", HEADS),
    (r"index(er)?_n_heads", 32),  # their scores pass a relu: of 4, many are 0, and none the largest
    (r".*(inter|interm)mediate.*|.*ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner|.*ffn_hidden_size", 128),
    (r"mlp_dim|feed_forward_size|moe_latent_size|router_hidden_size", 128),
    (r"(.*_)?hidden_size(_global|_per_layer_input)?|d_model|n_embd|emb_dim|embedding_dim", 64),
    (r"adapter_(in|out)(put)?_(dim|size)", 64),
    (r"lru_width|.*embed(ding)?_(proj_)?(dim|size)|embedding_size|mamba_d_ssm|dim_model_base", 64),
    (r".*experts_per_tok(en)?|moe_(topk|top_k|k)|zero_expert_num", 2),
    (r"n_group|num_expert_group|n_groups|mamba_n_?groups", 2),
    (r"topk_group", 1),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts|num_mem_blocks", 1),
    (r"(n|num|moe_num)_(routed_|local_)?experts", 8),
    (r"rel_extent|index_local_blocks", 32),
    (r"max_window_layers|num_sparse_(en|de)coder_layers", 1),
)  # fmt: skip
PATTERNS = tuple((re.compile(name), most) for name, most in SIZES)
NEEDED = {  # of what some configurations leave open
    "head_dim": 16, "num_key_value_heads": HEADS, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}  # fmt: skip
NOISE = 0.1  # std of what is drawn for vectors of zeros
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
INDEXES = re.compile(r".*(_layers|_ids|_idxs|_indices)")  # lists of the numbers of layers
DERIVED = ("model_type", "architectures", "transformers_version", "_name_or_path")
KEPT_PARAMETERS = re.compile(r".*(A_log|time_decay|time_first|time_mix.*|norm.*)")


class Tiny(NamedTuple):
    """A random model, and in words what is special about how it was built."""

    model: Any  # a PreTrainedModel
    note: str


def tiny_model(model_type: str, seed: int = 0, decoder: bool = True, kind: str = CAUSAL) -> Tiny:
    """A small random model of a type; `decoder` sets is_decoder where a causal one has it.

    Raises UsageError for a type that is not known, or that cannot be built.
    """
    if model_type not in known_types(kind):
        names = sorted({*known_types(), *known_types(SEQ2SEQ)})
        near = difflib.get_close_matches(model_type, names, n=1)
        hint = f"Did you mean {near[0]}?" if near else "Give a folder, or a type such as llama."
        if model_type in shipped_models():
            hint = "It comes with kvtool: leave out --impl transformers."
        what = "is neither a folder nor a model type that transformers knows"
        raise UsageError(f"--model {model_type}: {what}", hint)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config, note = tiny_config(model_type, decoder, kind)
            model = _classes(model_type, kind)[1]._from_config(config)
        except (Exception, SystemExit) as error:
            pass_on_shortage(error)
            said = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{model_type}: could not build ({type(error).__name__}: {said})"
            ) from error
        randomize(model)
        loop_over_experts(model)
    return Tiny(model.eval().requires_grad_(False), note)


def tiny_config(model_type: str, decoder: bool = True, kind: str = CAUSAL) -> tuple[Any, str]:
    """The default configuration of a type, shrunk, and what is special about it."""
    made, model_class = _classes(model_type, kind)
    try:
        default = made().to_dict()
    except Exception:  # a default that its own validation refuses: the class says less, but enough
        default = {k: v for k, v in vars(made).items() if isinstance(v, (int, float, dict, list))}
    fields = shrunk(default)
    note = ""
    if decoder and kind == CAUSAL and fields.get("is_decoder") is False:
        fields["is_decoder"], note = True, "built with is_decoder=True"
    config = made(**fields)
    expected = model_class.config_class
    if expected is not None and not isinstance(config, expected):  # the decoder is a part of it
        parts = [part for part in vars(config).values() if isinstance(part, expected)]
        config = parts[0] if parts else config
    return config, note


def _classes(model_type: str, kind: str = CAUSAL) -> tuple[Any, Any]:
    """The classes of a type's configuration and of its model."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    made: Any = CONFIG_MAPPING[model_type]
    mappings = {
        CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING,
        SEQ2SEQ: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    return made, mappings[kind][made]


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, smaller; those of configurations in it too."""
    found = {k: v for k, v in fields.items() if k not in DERIVED}
    n_layers = next((found[k] for k in LAYERS if isinstance(found.get(k), int)), 0)
    heads = next((found[k] for k in ("num_attention_heads", "n_heads") if found.get(k)), 0)
    picked = chosen_layers(found, n_layers)
    for name, value in found.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = shrunk(value)
        elif isinstance(value, bool):
            continue
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[name] = (
                value if value < 4 else ORDINARY + (hash_of(name) % (VOCABULARY - ORDINARY))
            )
        elif is_kv_heads(name) and isinstance(value, int):
            found[name] = kv_heads(value, heads)
        elif isinstance(value, int):
            found[name] = smaller(name, value)
        elif isinstance(value, (list, tuple)) and picked:
            found[name] = kept_items(name, list(value), picked, n_layers)
        elif name == "per_layer_config" and isinstance(value, dict):
            kept = {str(picked.index(int(i))): v for i, v in value.items() if int(i) in picked}
            found[name] = {i: shrunk(v) for i, v in kept.items()}
        elif isinstance(value, dict):
            found[name] = {k: rope_value(k, v) for k, v in value.items()}
        elif value is None:
            found[name] = NEEDED.get(name)
    if fields.get("head_dim") and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        found["head_dim"] = found["qk_rope_head_dim"]
    if picked:
        for name in LAYERS:
            if found.get(name) and fields[name] == n_layers:
                found[name] = len(picked)
        if found.get("num_kv_shared_layers"):
            found["num_kv_shared_layers"] = len(picked) // 2
    merge(found, SPECIAL.get(fields.get("model_type", ""), {}))
    if isinstance(found.get("moe_layer_end_index"), int):
        found["moe_layer_end_index"] = max(len(picked), 2) - 1
    return found


def smaller(name: str, value: int) -> int:
    """A size, at most what its name allows."""
    most = next((most for pattern, most in PATTERNS if pattern.fullmatch(name)), value)
    return min(value, most)


def is_kv_heads(name: str) -> bool:
    return re.fullmatch(r"(swa_)?(num_)?(key_value|kv)_(n_)?heads|num_kv_heads", name) is not None


def kv_heads(value: int, heads: int) -> int:
    """As many as heads, one, or some between, as it was."""
    if value == 1:
        return 1
    return HEADS if value >= heads else HEADS // 2


def chosen_layers(fields: dict[str, Any], n_layers: int) -> list[int]:
    """The first layer of each kind, two or more: its kind is what all lists say of it."""
    lists = [(k, v) for k, v in fields.items() if per_layer(k, v, n_layers)]
    if not lists or n_layers < 2:
        return []
    kinds: dict[str, int] = {}
    for i in range(n_layers):
        said = [i in v if is_index(k, v) else v[i] for k, v in lists]
        kinds.setdefault(repr(said), i)
    picked = list(kinds.values())[:MOST_LAYERS]
    if shared := fields.get("num_kv_shared_layers"):  # each sharing layer has one of its kind
        own, types = n_layers - shared, fields["layer_types"]
        picked = [i for i in picked if i < own]
        picked += [next(j for j in range(own, n_layers) if types[j] == types[i]) for i in picked]
    return picked if len(picked) > 1 else [0, 1]


def per_layer(name: str, value: Any, n_layers: int) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return len(value) == n_layers or is_index(name, value)


def is_index(name: str, value: Any) -> bool:
    """Whether a list has the numbers of layers, and not something for each."""
    return (
        INDEXES.fullmatch(name) is not None
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        and all(a < b for a, b in itertools.pairwise(value))
    )


def kept_items(name: str, value: list[Any], picked: list[int], n_layers: int) -> list[Any]:
    if is_index(name, value):
        return [picked.index(i) for i in value if i in picked]
    if len(value) != n_layers:
        return value
    if "heads" in name:
        return [HEADS for _ in picked]
    return [value[i] for i in picked]


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


def hash_of(name: str) -> int:
    return sum(map(ord, name))


# What the rules cannot know.
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


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw all weights anew at std 1/sqrt(fan in): at the usual 0.02 a bug moves no logit.

    Vectors stay as they are (norms, decays) but for a little noise in those that are 0 (biases,
    gates): a choice of the largest has no answer where all are alike.
    """
    drawn: set[int] = set()
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in drawn or not weight.is_floating_point() or not weight.numel():
                continue
            drawn.add(id(weight))
            if weight.numel() == max(weight.shape, default=1):
                if not weight.any():
                    weight.normal_(0.0, NOISE)
                continue
            if KEPT_PARAMETERS.fullmatch(name):
                continue
            weight.normal_(0.0, 1.0 / math.sqrt(fan_in(module, weight)))


def fan_in(module: nn.Module, weight: torch.Tensor) -> int:
    """How many numbers a weight sums over; 1 for the rows of a table."""
    if isinstance(module, nn.Embedding):
        return 1
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return math.prod(weight.shape[1:])
    transposed = type(module).__name__ == "Conv1D"  # of transformers: (in, out)
    return weight.shape[0] if transposed else weight.shape[-1]
