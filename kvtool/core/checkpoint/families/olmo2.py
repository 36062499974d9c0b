"""OLMo 2 (AI2 2024): norms after attention and feed-forward network, and over whole queries."""

from __future__ import annotations

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.llama import read_decoder
from kvtool.core.models.general import GeneralConfig


def read(f: Fields) -> ModelConfig:
    """The configuration of an olmo2. Raises UsageError, naming the field."""
    bias = f.flag("attention_bias", False)
    return read_decoder(
        f,
        GeneralConfig,
        eps=1e-5,
        qkv_bias=bias,
        out_bias=bias,
        norm_place="after",
        qk_norm=True,
        qk_norm_whole=True,
    )
