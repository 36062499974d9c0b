"""The contents of a user's decoder, or of its state, found in attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CONFIG_NAMES = ("config", "cfg", "args", "params", "hparams")


def owned_modules(decoder: Any) -> dict[str, nn.Module]:
    """The modules of a decoder by their dotted names, a module itself under ""."""
    module = getattr(decoder, "module", None) if not isinstance(decoder, nn.Module) else decoder
    if isinstance(module, nn.Module):
        return dict(module.named_modules())
    found: dict[str, nn.Module] = {}
    for name, value in getattr(decoder, "__dict__", {}).items():
        if isinstance(value, nn.Module):
            found.update({f"{name}.{n}".rstrip("."): m for n, m in value.named_modules()})
    return found


def outermost(decoder: Any) -> list[nn.Module]:
    """The modules of a decoder that are in no other of its modules, by their names."""
    modules = owned_modules(decoder)
    inner = {id(m) for module in modules.values() for m in module.modules() if m is not module}
    return [module for module in modules.values() if id(module) not in inner]


def unwrapped(given: Any) -> tuple[Any, str]:
    """The module inside torch.compile's wrapper, and the wrapper in words, "" if there is none. A
    module that was compiled in place runs uncompiled."""
    if isinstance(given, nn.Module) and isinstance(getattr(given, "_orig_mod", None), nn.Module):
        return unwrapped(given._orig_mod)[0], "torch.compile"
    compiled = False
    for module in given.modules() if isinstance(given, nn.Module) else ():
        compiled = compiled or getattr(module, "_compiled_call_impl", None) is not None
        module._compiled_call_impl = None
        for name, child in module.named_children():
            inner, wrapper = unwrapped(child) if hasattr(child, "_orig_mod") else (child, "")
            if wrapper:
                setattr(module, name, inner)
                compiled = True
    return given, "torch.compile" if compiled else ""


def unwrap_attributes(decoder: Any) -> tuple[str, ...]:
    """Take the modules in an object's attributes out of torch.compile -> a note about it."""
    notes = []
    for name, value in list(getattr(decoder, "__dict__", {}).items()):
        if isinstance(value, nn.Module):
            inner, wrapper = unwrapped(value)
            if wrapper:
                setattr(decoder, name, inner)
                notes.append(f"{name} taken out of {wrapper}")
    return tuple(notes)


def running_modules(decoder: Any, state: Any) -> dict[str, nn.Module]:
    """The modules that a step runs: the decoder's, or the copy of them that its state holds."""
    modules = owned_modules(decoder)
    for leaf in contents(state):
        if isinstance(leaf, nn.Module):
            copies = dict(leaf.named_modules())
            if len(copies) > 1 and copies.keys() >= modules.keys():
                return copies
    return modules


def contents(state: Any, depth: int = 6) -> Iterator[Any]:
    """Everything that a state holds: in containers, and in the attributes of its objects."""
    for leaf in tree_leaves(state):
        yield leaf
        if depth and not isinstance(leaf, Tensor):
            yield from contents(list(getattr(leaf, "__dict__", {}).values()), depth - 1)


def device_of(given: Any) -> torch.device:
    """The device of the first tensor that an object holds, the CPU if it holds none."""
    for value in (given, *getattr(given, "__dict__", {}).values()):
        tensors = value.parameters() if isinstance(value, nn.Module) else tree_leaves(value)
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                return tensor.device
    return torch.device("cpu")


def whole_number(given: Any, names: tuple[str, ...]) -> int:
    """The first whole number above 0 that an object, or its configuration, has under one of the
    names; 0 if it has none."""
    for holder in (given, *(getattr(given, name, None) for name in CONFIG_NAMES)):
        for name in names:
            value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 0
