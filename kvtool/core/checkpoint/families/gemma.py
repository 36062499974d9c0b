"""Gemma 2 and 3 (Google 2024, 2025): four norms a layer, windows in most of them, capped scores."""

from __future__ import annotations

import math
from typing import Any

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.layers import FULL, SLIDING, full_layers, layer_kinds
from kvtool.core.checkpoint.families.llama import read_decoder, usual_turn
from kvtool.core.checkpoint.families.rope import rope_spec, turn
from kvtool.core.models.general import GeneralConfig
from kvtool.errors import UsageError
from kvtool.reading import quoted

ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PREFIX, BESIDE = "language_model.model.", ("vision_tower.", "multi_modal_projector.")
IMAGES = (
    "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index",
)  # fmt: skip
GLOBAL, LOCAL = 1_000_000.0, 10_000.0  # theta of layers without a window and with one


def read_gemma2(f: Fields) -> ModelConfig:
    """The configuration of a gemma2. Raises UsageError, naming the field."""
    f.assume(
        vocab_size=256_000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, max_position_embeddings=8192, final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )  # fmt: skip
    n_layers = f.size("num_hidden_layers")
    kinds = layer_kinds(f, n_layers, [FULL if i % 2 else SLIDING for i in range(n_layers)])
    return _read(f, kinds, attention_cap=_cap(f, "attn_logit_softcapping"))


def read_gemma3(f: Fields) -> ModelConfig:
    """A model_type of gemma3_text: norms of queries and keys, and two thetas."""
    f.assume(
        vocab_size=262_208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, max_position_embeddings=131_072,
    )  # fmt: skip
    if f.take("attn_logit_softcapping") is not None:
        raise UsageError("attn_logit_softcapping: is not supported (transformers reads none here)")
    n_layers, every = f.size("num_hidden_layers"), f.size("sliding_window_pattern", 6)
    f.require(_sliding_window_pattern=every)
    usual = [SLIDING if (i + 1) % every else FULL for i in range(n_layers)]
    return _read(f, layer_kinds(f, n_layers, usual), qk_norm=True, turn=_two_turns)


def read_gemma3_folder(f: Fields) -> ModelConfig:
    """A model_type of gemma3: the language model of one that also reads images."""
    for name in IMAGES:
        f.take(name)
    found = f.take("text_config", {})
    if not isinstance(found, dict):
        raise UsageError(f"text_config: {quoted(found)} is not an object")
    text = Fields(found)
    text.require(model_type="gemma3_text")
    if text.data.get("final_logit_softcapping") is not None:
        raise UsageError("final_logit_softcapping: is not supported (transformers reads none here)")
    config = read_gemma3(text)
    text.finish()
    f.require(tie_word_embeddings=config.tied)
    return config


def _read(f: Fields, kinds: list[str], turn: Any = usual_turn, **extra: Any) -> ModelConfig:
    f.take("hidden_act")  # transformers reads hidden_activation alone
    f.require(use_bidirectional_attention=False)
    window = 0 if f.is_null("sliding_window") else f.size("sliding_window", 4096)
    if SLIDING not in kinds:
        window = 0
    elif not window:
        raise UsageError("layer_types: names sliding_attention, but sliding_window is null")
    bias = f.flag("attention_bias", False)
    return read_decoder(
        f,
        GeneralConfig,
        kv_heads=4,
        head=256,
        window=window,
        turn=turn,
        activation=("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        tied=True,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=f.number("query_pre_attn_scalar", 256.0) ** -0.5,
        logits_cap=_cap(f, "final_logit_softcapping"),
        embed_scale=math.sqrt(f.size("hidden_size")),
        norm_plus_one=True,
        norm_place="both",
        full_layers=full_layers(kinds) if window else (),
        **extra,
    )


def _cap(f: Fields, name: str) -> float:
    return 0.0 if f.take(name) is None else f.number(name)


def _two_turns(f: Fields, context: int) -> dict[str, Any]:
    """theta and scaling of layers without a window, and of those with one."""
    spec = rope_spec(f)
    new = {FULL, SLIDING} & set(spec.data)
    if not new and isinstance(f.data.get("rope_parameters"), dict) and spec.data:
        raise UsageError(f"rope_parameters: has neither {FULL} nor {SLIDING}")
    full = _within(spec, FULL) if new else spec  # the old spelling scales these alone
    sliding = _within(spec, SLIDING) if new else Fields({})
    if new:
        spec.finish()
    theta, scaling = turn(f, full, context, GLOBAL)
    local, local_scaling = turn(f, sliding, context, LOCAL, "rope_local_base_freq")
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "window_theta": local,
        "window_scaling": local_scaling,
    }


def _within(spec: Fields, name: str) -> Fields:
    found = spec.take(name, {})
    if not isinstance(found, dict):
        raise UsageError(f"rope_parameters: {name}: {quoted(found)} is not an object")
    return Fields(found)
