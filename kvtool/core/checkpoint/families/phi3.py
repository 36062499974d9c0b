"""Phi-3 and Phi-4-mini (Microsoft 2024): fused matrices, heads that turn in part, LongRoPE."""

from __future__ import annotations

import math
from typing import Any

from kvtool.config import ModelConfig, RopeScaling, check_float
from kvtool.core.checkpoint.families import llama
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.rope import THETA, rope_spec, rope_type
from kvtool.core.checkpoint.families.weights import NameMap
from kvtool.core.models.general import GeneralConfig
from kvtool.errors import UsageError
from kvtool.reading import quoted

LONG = ("longrope", "su", "yarn")  # names of one thing: transformers reads all as the first


def read(f: Fields) -> ModelConfig:
    """The configuration of a phi3. Raises UsageError, naming the field."""
    f.take("auto_map")  # names code for versions of transformers that had no Phi-3
    f.require(
        attention_bias=False, mlp_bias=False, lm_head_bias=False, interpolate_factor=1,
        full_attn_mod=1,
    )  # fmt: skip
    window = f.size("sliding_window") if f.take("sliding_window") is not None else 0
    return llama.read_decoder(f, GeneralConfig, window=window, turn=_turn, eps=1e-5)


def _turn(f: Fields, context: int) -> dict[str, Any]:
    """The rotary fields, and the context that they hold for.

    LongRoPE rotates every position of a text by other factors once the text is longer than the
    original context, and cached keys would be wrong then. So the context is the original one, with
    the short factors.
    """
    spec = rope_spec(f)
    part = f.number("partial_rotary_factor", spec.data.get("partial_rotary_factor", 1.0))
    if spec.number("partial_rotary_factor", part) != part or part > 1:
        raise UsageError(f"partial_rotary_factor: {part:g} (expected one, of 1 or less)")
    d_model, n_heads = f.size("hidden_size"), f.size("num_attention_heads")
    width = int(f.size("head_dim", d_model // n_heads) * part)
    if width < 2 or width % 2:
        raise UsageError(f"partial_rotary_factor: turns {width} channels (expected an even number)")
    theta = f.number("rope_theta", spec.data.get("rope_theta", THETA))
    if spec.number("rope_theta", theta) != theta:
        raise UsageError(f"rope_theta: {theta:g} contradicts {spec.data['rope_theta']}")
    first = f.size("original_max_position_embeddings", min(context, 4096))
    if spec.data.get("original_max_position_embeddings", first) != first:
        other = quoted(spec.data["original_max_position_embeddings"])
        raise UsageError(f"original_max_position_embeddings: {first} contradicts {other}")
    kind = rope_type(spec)
    found: dict[str, Any] = {"rope_theta": theta, "rotary_dim": 0 if part == 1.0 else width}
    if kind != "default" and kind not in LONG:
        raise UsageError(f"rope_type: {quoted(kind)} is not supported (expected default, longrope)")
    if kind in LONG:
        first = spec.size("original_max_position_embeddings", first)
        factor = spec.number("factor", context / first)
        spread = math.sqrt(1 + math.log(factor) / math.log(max(first, 2))) if factor > 1 else 1.0
        scaling = RopeScaling(
            "longrope",
            factor,
            first,
            attention_factor=spec.number("attention_factor", spread),
            factors=_factors(spec, "short_factor", width // 2),
        )
        _factors(spec, "long_factor", width // 2)
        found |= {"rope_scaling": scaling, "context": min(first, context)}
    else:
        spec.take("original_max_position_embeddings")
    spec.finish()
    return found


def _factors(spec: Fields, name: str, n: int) -> tuple[float, ...]:
    found = spec.take(name)
    if not isinstance(found, list) or len(found) != n:
        raise UsageError(f"{name}: expected a list of {n} numbers")
    for factor in found:
        check_float(name, factor, 0.0, 1e30, open_low=True)
    return tuple(found)


def names(config: ModelConfig) -> NameMap:
    """Maps each tensor of kvtool to those of the folder."""
    return llama.names(config, fused=True)
