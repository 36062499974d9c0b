"""The ways in which an nn.Module's forward may take and give a cache, as its signature suggests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

CACHES = (
    "past_key_values", "kv_cache", "kv_caches", "cache", "caches", "past_kv", "past_kvs", "past",
    "layer_past", "past_key_value", "cache_params", "state", "states", "mems", "hidden",
)  # fmt: skip
FLAGS = ("use_cache", "return_cache", "use_kv_cache", "return_kv", "return_state")
POSITIONS = (
    "position_ids", "positions", "input_pos", "cache_position", "start_pos", "pos", "position",
    "offset", "pos_offset", "past_length", "past_len", "cur_pos",
)  # fmt: skip
FORMS = {
    "rows": "arange(past, past + n) for each row",
    "line": "arange(past, past + n)",
    "int": "past",
}
FACTORIES = (
    "make_cache", "new_cache", "init_cache", "create_cache", "empty_cache", "make_kv_cache",
    "init_kv_cache", "new_kv_cache", "allocate_cache", "init_state", "initial_state", "new_state",
)  # fmt: skip
SETUPS = ("setup_caches", "set_kv_cache", "setup_cache", "setup_kv_cache")  # caches in the module


@dataclass(frozen=True)
class Plan:
    """One way to call a module's forward."""

    cache: str = ""  # the parameter; none: they are in the module
    initial: str = "None"  # what the first step is given: None, [], {}, [None] * n, or a method
    n_layers: int = 0  # of [None] * n
    flag: str = ""
    position: str = ""
    form: str = ""
    filler: tuple[str, ...] = ()  # required parameters that are given None
    needs_cache: bool = False  # the uncached pass is one step on a new cache
    read: str = ""  # how the answer is read

    @property
    def in_module(self) -> bool:
        """Whether the module keeps its caches itself."""
        return not self.cache

    def __str__(self) -> str:
        parts = ["ids"]
        if self.cache:
            parts.append(f"{self.cache}={self.initial} at first")
        if self.flag:
            parts.append(f"{self.flag}=True")
        if self.position:
            parts.append(f"{self.position}={FORMS[self.form]}")
        parts.extend(f"{name}=None" for name in self.filler)
        before = f"{self.initial}, then " if self.in_module else ""
        after = f" -> {self.read}" if self.read else ""
        if self.needs_cache:
            after += "; it cannot go without a cache: the uncached pass is one step on a new one"
        return f"{before}forward({', '.join(parts)}){after}"


def plans(module: nn.Module) -> Iterator[Plan]:
    """Every way to call a module, the likeliest first; at the end those that need a cache."""
    suggested = list(_suggested(module))
    yield from suggested
    yield from (replace(plan, needs_cache=True) for plan in suggested)


def _suggested(module: nn.Module) -> Iterator[Plan]:
    names = parameters(module)
    flag = next((n for n in FLAGS if n in names), "")
    known = {*FLAGS, *CACHES, *POSITIONS}
    filler = tuple(n for n in list(names)[1:] if n not in known and required(module, n))
    n_layers = _n_layers(module)
    for cache, initial in _caches(module, n_layers):
        for position, form in _positions(module):
            yield Plan(cache, initial, n_layers, flag, position, form, filler)


def _caches(module: nn.Module, n_layers: int) -> Iterator[tuple[str, str]]:
    """The parameters that may take a cache, each with what it may be given at first; then, without
    a parameter, the methods that may set up caches in the module."""
    factories = [n for n in FACTORIES if callable(getattr(module, n, None))]
    of_layers = [f"[None] * {n_layers}"] if n_layers else []
    for cache in (n for n in CACHES if n in parameters(module)):
        for initial in (*factories, "None", "[]", "{}", *of_layers):
            yield cache, initial
    for setup in (n for n in SETUPS if callable(getattr(module, n, None))):
        yield "", setup


def _positions(module: nn.Module) -> list[tuple[str, str]]:
    """The parameters that may take positions, each with a form of them; ("", "") for none of them,
    if the module can be called so."""
    names = parameters(module)
    found = [(n, form) for n in POSITIONS if n in names for form in _forms(names[n])]
    if any(required(module, n) for n, _ in found):
        return found
    return [*found, ("", "")]


def parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a module's forward that have names, in order."""
    found = inspect.signature(module.forward).parameters
    return {n: p for n, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def required(module: nn.Module, name: str) -> bool:
    """Whether a parameter of forward has no default."""
    return parameters(module)[name].default is inspect.Parameter.empty


def _forms(parameter: inspect.Parameter) -> tuple[str, ...]:
    """What a parameter for positions may be, the likeliest first."""
    hint = str(parameter.annotation)
    if isinstance(parameter.default, int) or hint == "int" or parameter.annotation is int:
        return ("int",)
    tensor = ("line",) if parameter.name in ("input_pos", "cache_position") else ("rows", "line")
    if "Tensor" in hint:
        return tensor
    return (*tensor, "int")


def _n_layers(module: nn.Module) -> int:
    """The number of layers: the longest list of modules."""
    return max((len(m) for m in module.modules() if isinstance(m, nn.ModuleList)), default=0)
