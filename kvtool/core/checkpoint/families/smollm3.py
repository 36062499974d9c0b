"""SmolLM3 (Hugging Face 2025): Llama with some layers without rotary positions (NoPE, Yang
2025)."""

from __future__ import annotations

from typing import Any

from kvtool.config import ModelConfig
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.layers import FULL, SLIDING, full_layers, layer_kinds
from kvtool.core.checkpoint.families.llama import read_decoder
from kvtool.core.checkpoint.families.rope import rotation
from kvtool.core.models.general import GeneralConfig
from kvtool.errors import UsageError

THETA = 2_000_000.0


def read(f: Fields) -> ModelConfig:
    """The configuration of a smollm3. Raises UsageError, naming the field."""
    n_layers, used = f.size("num_hidden_layers"), f.flag("use_sliding_window", False)
    f.take("max_window_layers")  # of older files; transformers does not read it
    window = f.size("sliding_window") if f.take("sliding_window") is not None else 0
    turned = _turned(f, n_layers)
    usual = [SLIDING if used and window and not turns else FULL for turns in turned]
    kinds = layer_kinds(f, n_layers, usual)
    if SLIDING in kinds and not (used and window):
        raise UsageError("layer_types: names sliding_attention, but sliding_window is not used")
    bias = f.flag("attention_bias", False)
    return read_decoder(
        f,
        GeneralConfig,
        kv_heads=4,
        turn=_turn,
        tied=True,
        window=window if SLIDING in kinds else 0,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
        unrotated_layers=tuple(i for i, turns in enumerate(turned) if not turns),
        full_layers=full_layers(kinds) if SLIDING in kinds else (),
    )


def _turn(f: Fields, context: int) -> dict[str, Any]:
    theta, scaling = rotation(f, context, THETA)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _turned(f: Fields, n_layers: int) -> list[int]:
    """For each layer 1 if it rotates queries and keys, else 0: no_rope_layers has it this way
    round, in spite of its name."""
    interval = f.size("no_rope_layer_interval", 4)
    usual = [int((i + 1) % interval != 0) for i in range(n_layers)]
    found = f.take("no_rope_layers", usual)
    if not isinstance(found, list) or len(found) < n_layers or not all(x in (0, 1) for x in found):
        raise UsageError(f"no_rope_layers: expected {n_layers} of 0 and 1")
    return found[:n_layers]
