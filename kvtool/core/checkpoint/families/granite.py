"""Granite 3 (IBM 2024): Llama with four multipliers."""

from __future__ import annotations

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.llama import read_decoder
from kvtool.core.models.general import GeneralConfig


def read(f: Fields) -> ModelConfig:
    """The configuration of a granite. Raises UsageError, naming the field."""
    bias = f.flag("attention_bias", False)
    return read_decoder(
        f,
        GeneralConfig,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
        embed_scale=f.number("embedding_multiplier", 1.0),
        attention_scale=f.number("attention_multiplier", 1.0),
        residual_scale=f.number("residual_multiplier", 1.0),
        logits_scale=f.number("logits_scaling", 1.0),
    )
