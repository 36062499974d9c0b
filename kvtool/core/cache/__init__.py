"""Cache kinds: one file each, listed in registry.CACHES."""

from __future__ import annotations

import inspect

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
    "settings_of",
]


def cache_class(kind: str) -> type[Cache]:
    """The class of a registered kind; settings after its name are ignored. Raises UsageError for an
    unknown kind."""
    return registry.load(registry.CACHES, registry.split_kind(kind)[0])


def make_cache(kind: str, spec: CacheSpec, left_padding: Tensor | None = None) -> Cache:
    """An empty cache of a registered kind, with the settings after its name ("paged:page=8").

    left_padding (B,): padding tokens at the start of each row. Raises UsageError for an unknown
    kind or a wrong setting.
    """
    name, settings = registry.split_kind(kind)
    return registry.load(registry.CACHES, name)(spec, left_padding, **settings)


def settings_of(kind: str, small: bool = False) -> dict[str, int]:
    """The values of all settings of a registered kind: as given after its name, else the defaults.

    small: take the kind's settings for short checks in place of the defaults.
    """
    name, given = registry.split_kind(kind)
    found = cache_class(kind)
    made = inspect.signature(found).parameters
    names = registry.CACHE_SETTINGS.get(name, ())
    chosen = {
        **{key: made[key].default for key in names},
        **(found.small if small else {}),
        **given,
    }
    return {key: chosen[key] for key in names}


def predicted_nbytes(kind: str, spec: CacheSpec, length: int, prompt: int = 1) -> int:
    """`Cache.predict_nbytes` for a registered kind with its settings: bytes."""
    name, settings = registry.split_kind(kind)
    predict = registry.load(registry.CACHES, name).predict_nbytes
    return predict(spec, length, prompt, **settings)
