"""Fields with an entry for each layer: which layers have a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtool.core.checkpoint.families.fields import Fields
from kvtool.errors import UsageError

FULL, SLIDING = KINDS = ("full_attention", "sliding_attention")


def layer_kinds(f: Fields, n_layers: int, default: Sequence[str]) -> list[str]:
    """The entry of layer_types for each layer, FULL or SLIDING; `default` if it is absent. Raises
    UsageError."""
    found: Any = f.take("layer_types", list(default))
    known = isinstance(found, list) and all(kind in KINDS for kind in found)
    if not known or len(found) != n_layers:
        raise UsageError(f"layer_types: expected {n_layers} of {' and '.join(KINDS)}")
    return list(found)


def full_layers(kinds: Sequence[str]) -> tuple[int, ...]:
    """The layers without a window."""
    return tuple(i for i, kind in enumerate(kinds) if kind == FULL)
