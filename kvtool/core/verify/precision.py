"""Runs in which nothing is computed or stored below float64, whatever the code asks for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

LOWER = (torch.float32, torch.bfloat16, torch.float16)


class Promote(TorchDispatchMode):
    """Replaces every lower floating type that an operation is asked for by float64.

    A model in float64 may still cast: a softmax in float32, keys stored in bfloat16. Under this
    mode such casts do nothing, so a difference that came from them vanishes, and a bug stays.

    >>> with Promote():
    ...     torch.ones(2, dtype=torch.float64).bfloat16().dtype
    torch.float64
    """

    supports_higher_order_operators = True  # flex_attention, in which nothing is promoted
    active = 0  # how many are entered

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether the compiler is loaded, to keep it out of here; nothing is compiled meanwhile."""
        return False

    def __enter__(self) -> Promote:
        # What whole numbers become beside a Python float: 1.0 - mask.
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        Promote.active += 1
        return self

    def __exit__(self, *raised: Any) -> None:
        Promote.active -= 1
        super().__exit__(*raised)
        torch.set_default_dtype(self._default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # No operation takes a type within a list: the schemas of ATen have none.
        args = [_dtype(value) for value in args]
        made = func(*args, **{name: _dtype(value) for name, value in (kwargs or {}).items()})
        if any(isinstance(arg, Tensor) for arg in args):
            return made
        return tree_map(_made, made)  # a factory without a dtype made the default one


def promoting(promote: bool) -> contextlib.AbstractContextManager[object]:
    """`Promote`, or nothing."""
    return Promote() if promote else contextlib.nullcontext()


def _dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in LOWER else value


def _made(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in LOWER else value
