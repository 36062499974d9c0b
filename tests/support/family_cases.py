"""Tiny folders of Hugging Face, made by transformers: each family, and each option that counts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kvtool.core.checkpoint import checkpoint
from kvtool.core.checkpoint.checkpoint import Checkpoint
from kvtool.core.verify.precision import Promote
from kvtool.errors import FileError, KvtoolError

VOCAB, CONTEXT, WIDTH = 61, 48, 32
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_positions": CONTEXT,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": 4,
}
SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA, MISTRAL = {"model_type": "llama", **SIZES}, {"model_type": "mistral", **SIZES}
QWEN2 = {"model_type": "qwen2", **SIZES}
QWEN3 = {"model_type": "qwen3", **SIZES, "head_dim": 12}


def turned(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **fields}}


YARN = {"factor": 3.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LATER_LAYERS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
GRANITE = {"model_type": "granite", **SIZES}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
SMOLLM3 = {"model_type": "smollm3", **SIZES, "pad_token_id": 0}
PHI3 = {"model_type": "phi3", **SIZES, "pad_token_id": 0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 9.0],
}
OLMO2 = {"model_type": "olmo2", **SIZES}
GEMMA = {**SIZES, "head_dim": 12, "num_hidden_layers": 4, "sliding_window": 7}
GEMMA2 = {
    "model_type": "gemma2",
    **GEMMA,
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {"model_type": "gemma3_text", **GEMMA, "query_pre_attn_scalar": 9}
TWO_TURNS = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "first_k_dense_replace": 3,
}
DEEPSEEK2, DEEPSEEK3 = ({"model_type": f"deepseek_{version}", **LATENT} for version in ("v2", "v3"))
MSCALE = turned("yarn", **YARN, mscale=0.7, mscale_all_dim=0.3)
BY_DEPTH = {"scale_attn_by_inverse_layer_idx": True}


CASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2, untied head": {**GPT2, "tie_word_embeddings": False},
    "gpt2, n_inner": {**GPT2, "n_inner": 40, "layer_norm_epsilon": 1e-3},
    "gpt2, exact gelu": {**GPT2, "activation_function": "gelu"},
    "gpt2, relu": {**GPT2, "activation_function": "relu"},
    "llama": LLAMA,
    "llama, tied head": {**LLAMA, "tie_word_embeddings": True},
    "llama, one KV head, eps": {**LLAMA, "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama, biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama, bias of the MLP": {**LLAMA, "mlp_bias": True},
    "llama, wide heads": {**LLAMA, "head_dim": 12},
    "llama, theta": {**LLAMA, **turned("default")},
    "llama, linear": {**LLAMA, **turned("linear", factor=4.0)},
    "llama, dynamic": {**LLAMA, **turned("dynamic", factor=4.0)},
    "llama, llama3": {**LLAMA, **turned("llama3", **LLAMA3)},
    "llama, yarn": {**LLAMA, **turned("yarn", **YARN)},
    "llama, yarn of 48": {**LLAMA, **turned("yarn", factor=2.0)},
    "llama, yarn, betas": {**LLAMA, **turned("yarn", **YARN, beta_fast=8.0, beta_slow=0.5)},
    "llama, yarn, no truncation": {
        **LLAMA, **turned("yarn", **YARN, truncate=False, beta_slow=0.1)
    },
    "llama, yarn, attention factor": {**LLAMA, **turned("yarn", **YARN, attention_factor=1.3)},
    "llama, yarn, mscale": {
        **LLAMA, **turned("yarn", **YARN, mscale=0.7, mscale_all_dim=0.3)
    },
    "mistral, window": {**MISTRAL, "sliding_window": 7},
    "mistral, no window": {**MISTRAL, "sliding_window": None},
    "qwen2": QWEN2,
    "qwen2, tied head": {**QWEN2, "tie_word_embeddings": True},
    "qwen2, window in all layers": {**QWEN2, **LATER_LAYERS, "max_window_layers": 0},
    "qwen2, window in later layers": {**QWEN2, **LATER_LAYERS},
    "qwen3": QWEN3,
    "qwen3, biases and window": {**QWEN3, **LATER_LAYERS, "attention_bias": True},
    "gpt2, scores by depth": {**GPT2, **BY_DEPTH},
    "gpt2, raw scores by depth": {**GPT2, **BY_DEPTH, "scale_attn_weights": False},
    "granite": GRANITE,
    "granite, multipliers": {
        **GRANITE, **MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "head_dim": 12,
        "tie_word_embeddings": True,
    },
    "smollm3": {**SMOLLM3, "num_hidden_layers": 5},
    "smollm3, window": {
        **SMOLLM3, "no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 6,
        "tie_word_embeddings": False, **turned("yarn", **YARN),
    },
    "smollm3, named layers": {
        **SMOLLM3, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "attention_bias": True, "mlp_bias": True,
    },
    "phi3": PHI3,
    "phi3, window, part of heads": {
        **PHI3, "sliding_window": 7, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
                            "partial_rotary_factor": 0.5},
    },
    "phi3, longrope": {
        **PHI3, "rope_parameters": LONGROPE, "max_position_embeddings": 4 * CONTEXT,
        "original_max_position_embeddings": CONTEXT,
    },
    "phi3, longrope, factor": {
        **PHI3, "rope_parameters": {**LONGROPE, "attention_factor": 1.3}, "rms_norm_eps": 1e-3,
        "max_position_embeddings": 3 * CONTEXT, "original_max_position_embeddings": CONTEXT,
    },
    "olmo2": OLMO2,
    "olmo2, biases, eps": {
        **OLMO2, "attention_bias": True, "rms_norm_eps": 1e-3, "head_dim": 12,
        "tie_word_embeddings": True, **turned("llama3", **LLAMA3),
    },
    "deepseek_v2": {**DEEPSEEK2, "mlp_bias": True},
    "deepseek_v2, no latent queries, mscale": {
        **DEEPSEEK2, "q_lora_rank": None, "attention_bias": True, **MSCALE,
    },
    "deepseek_v3": DEEPSEEK3,
    "deepseek_v3, biases, mscale, halves": {
        **DEEPSEEK3, **MSCALE, "attention_bias": True, "rope_interleave": False,
        "rms_norm_eps": 1e-3,
    },
    "gemma2": GEMMA2,
    "gemma2, no caps": {
        **GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "tie_word_embeddings": False, "attention_bias": True,
    },
    "gemma2, named layers": {
        **GEMMA2, "layer_types": ["full_attention", *["sliding_attention"] * 3],
    },
    "gemma3": {**GEMMA3, "num_hidden_layers": 7},
    "gemma3, two turns": {
        **GEMMA3, "rope_parameters": TWO_TURNS, "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True,
    },
}  # fmt: skip


def build(fields: dict[str, Any]) -> Any:
    """transformers' model in float64 whose weights have deviation 1/sqrt(d), biases too."""
    fields = copy.deepcopy(fields)  # transformers adds to rope_parameters
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")](
        **fields, bos_token_id=0, eos_token_id=1
    )
    with Promote():  # tables of rotary angles are made now
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(drawn * WIDTH**-0.5 + is_norm)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def expected(model: Any, ids: Tensor) -> Tensor:
    """Logits of one uncached pass in which nothing is computed below float64."""
    with torch.no_grad(), Promote():
        return model(ids, use_cache=False).logits


def tokens(n: int = CONTEXT, batch: int = 2) -> Tensor:
    return torch.randint(VOCAB, (batch, n), generator=torch.Generator().manual_seed(1))


def load(folder: Path) -> Checkpoint:
    return checkpoint.load(str(folder), torch.device("cpu"), torch.float64)


def found(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return load(folder).model(ids)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def edit(
    folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json"
) -> Path:
    """Change a JSON file of a folder in place."""
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    return folder


def refusal(folder: Path, kind: type[KvtoolError] = FileError) -> str:
    """The one line that loading ends with."""
    try:
        load(folder)
    except kind as error:
        text = str(error)
        assert "\n" not in text
        return text
    raise AssertionError(f"{folder} was loaded")


# One of each family, and what a cache could get wrong: windows, lengthened keys, odd head widths.
TELLING = (
    "gpt2", "llama, yarn", "mistral, window", "qwen2, window in later layers",
    "qwen3, biases and window", "smollm3, window", "gemma2", "gemma3, two turns",
    "deepseek_v2", "deepseek_v3, biases, mscale, halves",
)  # fmt: skip
Made = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A case's model of transformers, and the folder that it was saved in."""
    kept: dict[str, tuple[Any, Path]] = {}

    def make(case: str) -> tuple[Any, Path]:
        if case not in kept:
            model = build(CASES[case])
            kept[case] = model, save(model, tmp_path_factory.mktemp("family"))
        return kept[case]

    return make
