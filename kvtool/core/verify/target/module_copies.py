"""Copies of a module for sessions of their own, and what a session leaves behind in a module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 5  # of objects within objects that are compared
OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}  # what every module has


def shared(module: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy with the weights, which sessions share since none changes them."""
    return {id(parameter): parameter for parameter in module.parameters()}


def session_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with everything of its own but the weights."""
    return copy.deepcopy(module, shared(module))


def left_over(before: nn.Module, after: nn.Module) -> list[str]:
    """The attributes, by dotted names, that running has changed in a module."""
    old = dict(before.named_modules())
    return [name for name, found in _held(after) if not same(*_pair(old, name, found))]


def _held(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for owner, part in module.named_modules():
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if name not in OF_TORCH and name != "_buffers":
                yield f"{owner}.{name}".lstrip("."), value


def _pair(old: dict[str, nn.Module], name: str, found: Any) -> tuple[Any, Any]:
    owner, _, attribute = name.rpartition(".")
    return getattr(old.get(owner), attribute, None), found


def same(a: Any, b: Any, depth: int = DEPTH) -> bool:
    """Whether two values are equal, as far as they can be compared."""
    if a is b or not depth:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, depth - 1) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], depth - 1) for key in a)
    if isinstance(a, (FunctionType, MethodType, BuiltinFunctionType, type, nn.Module)):
        return True
    if hasattr(a, "__dict__"):
        return same(vars(a), vars(b), depth - 1)
    try:
        return bool(a == b)
    except Exception:  # packed weights, say, cannot be compared
        return True
