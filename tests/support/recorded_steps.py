"""What stands for CUDA graphs where there is no GPU: a recording of PyTorch's operations.

Like a graph it plays them again on the tensors that they had, with every number and branch of
Python as it was, and puts what they compute where it was before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recorder(TorchDispatchMode):
    """A `Capture`. `recorded` and `played` count; `reached` are the addresses of the storages that
    the last recording has not made itself."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.played = 0
        self.reached: set[int] = set()

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()
        self.reached = set()
        with self:
            result = step()
        self.recorded += 1
        calls = self._calls

        def play() -> Tensor:
            self.played += 1
            with torch.inference_mode():  # a GPU asks for no mode before it writes
                for func, args, kwargs, out in calls:
                    found = func(*args, **kwargs)
                    for old, new in zip(tensors(out), tensors(found), strict=True):
                        if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                            old.copy_(new)
            return result

        return play

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not ASKING.isdisjoint(func.tags):
            raise RuntimeError(f"{func} asks the device, which a recording cannot")
        out = func(*args, **kwargs)
        given = {storage(x) for x in tensors((args, kwargs))}
        self.reached |= given - self._made
        self._made |= {storage(x) for x in tensors(out)} - given
        self._calls.append((func, args, kwargs, out))
        return out


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
