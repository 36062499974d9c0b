"""Finds the logits and the cache in a module's answer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from kvtool.core.verify.target.signature import ANSWERED, CACHES

AGREES = 1e-3  # the gap in float32 or float64 up to which a way of calling is right


def logits_and_cache(answer: Any, cache: str, part: int = 0) -> tuple[Tensor, Any, str]:
    """The logits and the cache of a module's answer, and how they were found.

    part: which of the parts behind the logits that may be a cache, less than 0 for none of them.
    Raises TypeError if there are no logits in it, or not so many parts.
    """
    logits, found, how = _parts(answer, cache, part)
    if not logits.is_floating_point():
        raise TypeError(f"it answered with {logits.dtype} (expected floating point logits)")
    return logits, found, how


def _parts(answer: Any, cache: str, part: int) -> tuple[Tensor, Any, str]:
    if isinstance(answer, Tensor):
        return answer, None, "logits"
    named = dict(answer) if isinstance(answer, dict) else getattr(answer, "__dict__", {})
    if isinstance(named.get("logits"), Tensor):
        for name in (cache, *CACHES, *ANSWERED):
            if named.get(name) is not None:
                return named["logits"], named[name], f"output.logits, output.{name}"
        return named["logits"], None, "output.logits"
    if isinstance(answer, (tuple, list)) and answer and isinstance(answer[0], Tensor):
        if part < 0:
            return answer[0], None, "(logits, ...)"
        rest = [value for value in answer[1:] if not (_is_number(value) or is_empty(value))]
        if part and part >= len(rest):
            raise TypeError(f"it answered without a part {part + 1} after the logits")
        how = "(logits, cache)" if len(answer) == 2 else "(logits, ..., cache)"
        return answer[0], rest[part] if rest else None, how if rest else "(logits, ...)"
    raise TypeError(f"it answered with a {type(answer).__name__} in which there are no logits")


def _is_number(value: Any) -> bool:
    """Whether a part of an answer is nothing, or a loss."""
    if isinstance(value, Tensor):
        return not value.dim()
    return value is None or isinstance(value, float)


def is_empty(cache: Any) -> bool:
    """Whether a cache is None, or a container that holds nothing else."""
    if isinstance(cache, dict):
        cache = list(cache.values())
    if isinstance(cache, (list, tuple)):
        return all(part is None for part in cache)
    return cache is None


def last_gap(found: Tensor, expected: Tensor) -> float:
    """The gap of the last token's logits from the expected ones, over max |expected|."""
    width = expected.shape[-1]
    found, expected = (
        logits.flatten()[-width:].nan_to_num(nan=math.nan, neginf=0.0)  # ids that are banned
        for logits in (found, expected)
    )
    gap = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    return math.inf if math.isnan(gap) else gap
