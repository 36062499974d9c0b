"""Cache kinds: one file each, listed in registry.CACHES."""

from __future__ import annotations

from torch import Tensor

from kvtool import registry
from kvtool.core.cache.base import EMPTY, Bytes, Cache, CacheSpec, Step

__all__ = [
    "EMPTY",
    "Bytes",
    "Cache",
    "CacheSpec",
    "Step",
    "cache_class",
    "make_cache",
    "predicted_nbytes",
]


def cache_class(kind: str) -> type[Cache]:
    """The class of a registered kind, whatever its settings. Raises UsageError for an unknown
    one."""
    return registry.load(registry.CACHES, registry.split_kind(kind)[0])


def make_cache(kind: str, spec: CacheSpec, left_padding: Tensor | None = None) -> Cache:
    """An empty cache of a registered kind, with settings if they follow it ("paged:page=8").

    Raises UsageError.
    """
    name, settings = registry.split_kind(kind)
    return registry.load(registry.CACHES, name)(spec, left_padding, **settings)


def predicted_nbytes(kind: str, spec: CacheSpec, length: int, prompt: int = 1) -> int:
    """`Cache.predict_nbytes` of a registered kind with its settings."""
    name, settings = registry.split_kind(kind)
    predict = registry.load(registry.CACHES, name).predict_nbytes
    return predict(spec, length, prompt, **settings)
