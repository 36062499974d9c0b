"""The fields of rotary positions, in the old spelling and in the new one."""

from __future__ import annotations

import math
from typing import Any

from kvtool.config import RopeScaling
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.errors import UsageError
from kvtool.reading import quoted

THETA = 10_000.0
KINDS = {"default": "", "linear": "linear", "dynamic": "", "llama3": "llama3", "yarn": "yarn"}


def rotation(f: Fields, context: int, theta: float = THETA) -> tuple[float, RopeScaling | None]:
    """theta and the scaling of the angles, from rope_parameters (transformers 5) or from rope_theta
    and rope_scaling; `theta` is the default. Raises UsageError."""
    return turn(f, rope_spec(f), context, theta)


def turn(
    f: Fields, spec: Fields, context: int, theta: float, field: str = "rope_theta"
) -> tuple[float, RopeScaling | None]:
    """The same from the fields `spec` within rope_parameters or rope_scaling; `field` is where the
    old spelling has theta. Raises UsageError.

    "dynamic" (NTK-aware) changes the angles only of texts longer than max_position_embeddings.
    kvtool refuses such texts, since cached keys would keep the old angles (transformers #25104).
    """
    theta = f.number(field, spec.data.get("rope_theta", theta))
    if spec.number("rope_theta", theta) != theta:
        raise UsageError(f"{field}: {theta:g} contradicts {spec.data['rope_theta']}")
    kind = Fields({"rope_type": rope_type(spec)}).one_of(
        "rope_type", {name: name for name in KINDS}
    )
    scaling = _scaling(spec, KINDS[kind], context)
    if kind == "dynamic":
        spec.number("factor")
    spec.finish()
    return theta, scaling


def rope_type(spec: Fields) -> Any:
    """The value of rope_type, or of type in the old spelling. Raises UsageError if they differ."""
    kind = spec.take("type", "default")
    named = spec.take("rope_type", kind)
    if "type" in spec.data and named != kind:
        raise UsageError(f"rope_type: {quoted(named)} contradicts type {quoted(kind)}")
    return named


def rope_spec(f: Fields) -> Fields:
    """The fields within rope_parameters or rope_scaling."""
    new, old = f.take("rope_parameters"), f.take("rope_scaling")
    if new is not None and old is not None and new != old:
        raise UsageError("rope_scaling: contradicts rope_parameters")
    found: Any = {} if new is None and old is None else new if old is None else old
    if not isinstance(found, dict):
        raise UsageError(f"rope_parameters: {quoted(found)} is not an object")
    return Fields(found)


def _scaling(spec: Fields, kind: str, context: int) -> RopeScaling | None:
    if not kind:
        return None
    if kind == "linear":
        return RopeScaling(kind, spec.number("factor"))
    first = spec.size("original_max_position_embeddings", context)
    if kind == "llama3":
        low, high = spec.number("low_freq_factor"), spec.number("high_freq_factor")
        return RopeScaling(kind, spec.number("factor"), first, low=low, high=high)
    factor = spec.number("factor", context / first)
    return RopeScaling(
        kind,
        factor,
        first,
        beta_slow=spec.number("beta_slow", 1.0),
        beta_fast=spec.number("beta_fast", 32.0),
        truncate=spec.flag("truncate", True),
        attention_factor=_attention_factor(spec, factor),
    )


def _attention_factor(spec: Fields, factor: float) -> float:
    """YaRN's factor of queries and keys (Peng 2023, eq. 22; mscale is from DeepSeek-V2)."""
    top, bottom = spec.take("mscale", 0), spec.take("mscale_all_dim", 0)
    scale = math.log(factor) if factor > 1 else 0.0
    default = 1.0 + 0.1 * scale
    if top and bottom:
        top, bottom = spec.number("mscale"), spec.number("mscale_all_dim")
        default = (1.0 + 0.1 * top * scale) / (1.0 + 0.1 * bottom * scale)
    return spec.number("attention_factor", default)
