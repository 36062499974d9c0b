"""Saving a cache and loading it into a new one, by the names that are in use.

`state` (a property that can be set, as in mlx, often with `meta_state`), `state_dict` and
`load_state_dict`, `get_state` and `set_state`: of the cache, of each cache of a list, or of the
decoder, which is then given the state. The `state_dict` of an nn.Module is of its weights: that it
holds a cache was never promised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kvtool.core.verify.target.adapter import State

METHODS = (("get_state", "set_state"), ("state_dict", "load_state_dict"))
PROPERTIES = ("state", "meta_state")


def can_save(decoder: Any, state: Any) -> bool:
    """Whether the cache in a state, or the decoder, has a way to save and load."""
    return _of_decoder(decoder) or (all(map(_saves, _parts(_cache(state)))) and bool(_cache(state)))


def reloaded(decoder: Any, state: Any, new: Callable[[], Any]) -> Any:
    """A new state, loaded with what the old one saved. Raises what their code raises."""
    if _of_decoder(decoder):
        saved = copy.deepcopy(decoder.get_state(state))
        fresh = new()
        loaded = decoder.set_state(fresh, saved)
        return fresh if loaded is None else loaded
    fresh = new()
    old_parts, new_parts = _parts(_cache(state)), _parts(_cache(fresh))
    if len(old_parts) != len(new_parts):
        raise NotImplementedError("a new state has no cache to load into")
    for old, part in zip(old_parts, new_parts, strict=True):
        _load(part, old)
    return replace(state, cache=fresh.cache) if isinstance(state, State) else fresh


def _of_decoder(decoder: Any) -> bool:
    return all(callable(getattr(decoder, name, None)) for name in METHODS[0])


def _cache(state: Any) -> Any:
    """The cache of an adapted module's state; for another decoder the state itself."""
    return state.cache if isinstance(state, State) else state


def _parts(cache: Any) -> list[Any]:
    """The caches of a list, or the one that it is."""
    return list(cache) if isinstance(cache, (list, tuple)) else [cache]


def _properties(cache: Any) -> list[str]:
    """The properties that save it and can be set."""
    found = [(name, getattr(type(cache), name, None)) for name in PROPERTIES]
    return [name for name, p in found if isinstance(p, property) and p.fset is not None]


def _pair(cache: Any) -> tuple[str, str] | None:
    """The methods that save and load it."""
    for save, load in METHODS:
        if all(callable(getattr(cache, name, None)) for name in (save, load)):
            of_torch = getattr(type(cache), save, None) is nn.Module.state_dict
            return None if of_torch else (save, load)
    return None


def _saves(cache: Any) -> bool:
    if cache is None or isinstance(cache, (Tensor, dict, list, tuple, int)):
        return False
    return "state" in _properties(cache) or _pair(cache) is not None


def _load(new: Any, old: Any) -> None:
    if "state" in _properties(old):
        for name in _properties(old):
            setattr(new, name, copy.deepcopy(getattr(old, name)))
        return
    pair = _pair(old)
    assert pair is not None  # else `can_save` says no
    getattr(new, pair[1])(copy.deepcopy(getattr(old, pair[0])()))
