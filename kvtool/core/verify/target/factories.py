"""Finds what builds an empty cache: a method of the module, or a class in its file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from kvtool.core.verify.target.attributes import CONFIG_NAMES

FACTORIES = (
    "make_cache", "new_cache", "init_cache", "create_cache", "empty_cache", "make_kv_cache",
    "init_kv_cache", "new_kv_cache", "create_kv_cache", "allocate_cache", "build_cache",
    "get_empty_cache", "init_caches", "make_caches", "allocate_inference_cache",
    "allocate_kv_cache", "init_state", "initial_state", "new_state", "init_states",
    "get_init_state",
)  # fmt: skip
SETUPS = (  # caches in the module
    "setup_caches", "set_kv_cache", "setup_cache", "setup_kv_cache", "setup_kv_caches",
    "init_kv_caches", "enable_kv_cache", "enable_cache", "allocate_kv_caches",
)  # fmt: skip
BATCH = ("batch", "batch_size", "max_batch_size", "max_batch", "bsz", "b", "B", "n_rows", "max_bsz")
ROOM = (
    "capacity", "max_len", "max_length", "max_seq_len", "max_seq_length", "max_seqlen",
    "max_tokens", "length", "seq_len", "context", "max_context", "max_cache_len", "size",
    "decoder_max_seq_len", "n_tokens", "max_context_length", "context_length", "block_size",
    "n_ctx", "max_size", "max_position_embeddings", "T",
)  # fmt: skip
LAYERS = ("n_layers", "num_layers", "n_layer", "num_hidden_layers", "layers", "depth", "L")
MEANT = {  # other names for what a module or its configuration has
    "n_heads": ("num_heads", "n_head", "num_attention_heads", "heads", "nhead"),
    "n_kv_heads": (
        "num_kv_heads", "num_key_value_heads", "n_kv_groups", "num_kv_groups", "kv_heads",
        "n_local_heads", "n_query_groups", "n_heads", "num_heads", "n_head",
        "num_attention_heads", "heads",
    ),
    "head_dim": ("d_head", "dim_head", "head_size", "head_dimension", "d_k"),
    "d_model": ("dim", "n_embd", "hidden_size", "embed_dim", "emb_dim", "width", "d"),
}  # fmt: skip


def factories(module: nn.Module) -> Iterator[str]:
    """Candidates for an empty cache, the likeliest first: the result of a method with such a name,
    None, an instance `Class()`, one for each layer as `[Class()] * n`, and empty containers."""
    yield from (name for name in FACTORIES if callable(getattr(module, name, None)))
    yield from ("None", "[]", "{}")
    if layers(module):
        yield f"[None] * {layers(module)}"
    for name in _classes(module):
        yield f"{name}()"
        if layers(module):
            yield f"[{name}()] * {layers(module)}"


def setups(module: nn.Module) -> list[str]:
    """The methods that set up caches in the module."""
    return [name for name in SETUPS if callable(getattr(module, name, None))]


def build(initial: str, module: nn.Module, batch: int, room: int) -> Any:
    """The empty cache that `initial` names. Raises what building it raises."""
    n = layers(module)
    if initial.endswith("()"):
        return call(_classes(module)[initial[:-2]], module, batch, room)
    if initial.startswith("[") and "()" in initial:
        made = _classes(module)[initial[1 : initial.index("(")]]
        return [call(made, module, batch, room) for _ in range(n)]
    if initial in FACTORIES:
        return call(getattr(module, initial), module, batch, room)
    return {"None": None, "[]": [], "{}": {}}.get(initial, [None] * n)


def call(factory: Any, module: nn.Module, batch: int, room: int) -> Any:
    """Call a factory with arguments by the names of its parameters.

    Raises TypeError for a required one of which nothing is known, and what the factory raises.
    """
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        found = _value(name, module, batch, room)
        if found is not None:
            given[name] = found
        elif parameter.default is parameter.empty:
            raise TypeError(f"{getattr(factory, '__name__', factory)} needs {name}")
    return factory(**given)


def _value(name: str, module: nn.Module, batch: int, room: int) -> Any:
    """The argument for a factory's parameter of that name; None if the name is not known."""
    weight = next(module.parameters(), None)
    if name in BATCH:
        return batch
    if name in ROOM:
        return room
    if name in LAYERS:
        return layers(module)
    if name in ("dtype", "device"):
        return getattr(weight, name, None)
    if name in ("model", "module"):
        return module
    if name in CONFIG_NAMES:
        return next((c for n in CONFIG_NAMES if (c := getattr(module, n, None)) is not None), None)
    found = attribute(module, name)
    others = next((MEANT[key] for key in MEANT if name == key or name in MEANT[key]), ())
    kinds = next((key for key in MEANT if name == key or name in MEANT[key]), name)
    for other in (kinds, *others):
        found = attribute(module, other) if found is None else found
    if found is None and kinds == "head_dim":
        width, heads = (_value(key, module, batch, room) for key in ("d_model", "n_heads"))
        return width // heads if width and heads else None
    return found


def attribute(module: nn.Module, name: str) -> Any:
    """A plain value that a module or its configuration has under a name, or None."""
    for holder in (module, *(getattr(module, n, None) for n in CONFIG_NAMES)):
        found = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if isinstance(found, (int, float, str)):
            return found
    return None


def layers(module: nn.Module) -> int:
    """The number of layers: what it says, or the longest list of modules."""
    lists = (nn.ModuleList, nn.Sequential)
    longest = max((len(m) for m in module.modules() if isinstance(m, nn.ModuleList)), default=0)
    if longest:
        return longest
    said = next((n for name in LAYERS if isinstance(n := attribute(module, name), int)), 0)
    return said or max((len(m) for m in module.modules() if isinstance(m, lists)), default=0)


def _classes(module: nn.Module) -> dict[str, type]:
    """The classes of caches that the files know in which the module's own classes are written."""
    found: dict[str, type] = {}
    for kind in type(module).__mro__:
        place = sys.modules.get(kind.__module__)
        if place is None or kind.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(place).items():
            named = isinstance(value, type) and name == value.__name__
            if named and _is_cache(value) and not _shares_base(value, module):
                found.setdefault(name, value)
    return found


def _shares_base(kind: type, module: nn.Module) -> bool:
    """Whether a class is a decoder like the module's own: named after its cache, perhaps."""
    own = set(type(module).__mro__) - set(nn.Module.__mro__)
    return bool(own & set(kind.__mro__))


def _is_cache(kind: type) -> bool:
    name = kind.__name__.lower()
    abstract = inspect.isabstract(kind) or name.startswith("_")
    return not abstract and ("cache" in name or name.endswith(("state", "memory")))
