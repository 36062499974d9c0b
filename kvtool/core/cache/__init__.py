"""Cache kinds: one file each, listed in registry.CACHES."""

from __future__ import annotations

from torch import Tensor

from kvtool import registry
from kvtool.core.cache.base import EMPTY, Bytes, Cache, CacheSpec, Step

__all__ = ["EMPTY", "Bytes", "Cache", "CacheSpec", "Step", "cache_class", "make_cache"]


def cache_class(kind: str) -> type[Cache]:
    """The class of a registered kind. Raises UsageError for an unknown one."""
    registry.choose(kind, tuple(registry.CACHES), "--cache")
    return registry.load(registry.CACHES, kind)


def make_cache(kind: str, spec: CacheSpec, left_padding: Tensor | None = None) -> Cache:
    """An empty cache of a registered kind."""
    return cache_class(kind)(spec, left_padding)
