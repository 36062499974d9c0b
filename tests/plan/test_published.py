"""plan against the sizes that well-known models were published with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvtool.core.plan.source import Described, describe
from kvtool.core.plan.sums import Cache, Load

LLAMA3 = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN25 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 131072, "max_window_layers": 28, "sliding_window": 131072,
    "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "vocab_size": 256000,
    "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "sliding_window": 4096, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504,
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
        "head_dim": 128, "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16", "vision_config": {"model_type": "siglip_vision_model"},
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
    "vocab_size": 129280, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "moe_layer_freq": 1, "max_position_embeddings": 163840, "torch_dtype": "bfloat16",
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "sliding_window": 4096, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "attention_bias": True,
}  # fmt: skip
PHI3 = {
    "model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "sliding_window": 2047, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "torch_dtype": "float32"}

# Bytes of a token where every layer keeps all, and numbers of weights. Of gemma-3-27b the language
# model alone: the published 27,432,406,640 without its vision tower and projector.
PUBLISHED = {
    "Llama-3-8B": (LLAMA3, 131_072, 8_030_261_248),
    "Qwen2.5-7B": (QWEN25, 57_344, 7_615_616_512),
    "gemma-2-9b": (GEMMA2, 344_064, 9_241_705_984),
    "gemma-3-27b": (GEMMA3, 507_904, 27_432_406_640 - 416_866_032 - 6_194_304),
    "DeepSeek-V3": (DEEPSEEK_V3, 70_272, 671_026_419_200),
    "Mistral-7B": (MISTRAL, 131_072, 7_241_732_096),
    "gpt-oss-20b": (GPT_OSS, 49_152, 20_914_757_184),
    "Phi-3-mini": (PHI3, 393_216, 3_821_079_552),
    "gpt2": (GPT2, 73_728, 124_439_808),
}


def planned(tmp_path: Path, fields: dict[str, Any]) -> Described:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    return describe(str(path), None)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_bytes_that_are_known(tmp_path: Path, name: str) -> None:
    fields, token_nbytes, n_weights = PUBLISHED[name]
    found = planned(tmp_path, fields)
    itemsize = 4 if found.dtype == "float32" else 2
    cache = Cache("kvtool", "dynamic", found.shapes, itemsize)
    assert cache.held(Load(3, 1000)).allocated == 3 * 1000 * token_nbytes
    assert cache.token_nbytes(Load(3, 1000)) == token_nbytes
    assert found.weights is not None and found.weights.nbytes == itemsize * n_weights


def test_layers_with_a_window_keep_no_more_than_it(tmp_path: Path) -> None:
    found = planned(tmp_path, GEMMA2)
    cache = Cache("transformers", "dynamic", found.shapes, 2)
    assert cache.held(Load(1, 8192)).allocated == (21 * 8192 + 21 * 4096) * 344_064 // 42
    assert cache.token_nbytes(Load(1, 8192)) == 344_064 // 2


def test_a_step_reads_the_experts_of_one_token_and_no_table_at_least(tmp_path: Path) -> None:
    weights = planned(tmp_path, GPT_OSS).weights
    assert weights is not None
    experts = 24 * 28 * (3 * 2880 * 2880 + 3 * 2880)  # those that a token leaves out
    assert weights.read == weights.nbytes - 2 * (experts + 201088 * 2880)


def test_null_says_that_there_is_no_window_and_a_missing_field_is_the_default(
    tmp_path: Path,
) -> None:
    windows = planned(tmp_path, {**MISTRAL, "sliding_window": None}).shapes.windows
    without = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert (windows, planned(tmp_path, without).shapes.windows) == (set(), {4096})


def test_weights_that_are_quantised_are_not_counted(tmp_path: Path) -> None:
    found = planned(tmp_path, {**LLAMA3, "quantization_config": {"quant_method": "awq"}})
    assert found.weights is None and "quantised" in found.unknown
