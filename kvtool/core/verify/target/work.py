"""How much a call of a decoder computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kvtool.errors import pass_on_shortage


def work(call: Callable[[], object], modules: Iterable[nn.Module]) -> int:
    """How many floating-point operations the matrix products of a call take; where they cannot be
    counted, as within flex_attention, how many numbers the smallest of its modules answer."""
    try:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()
    except Exception as error:  # what watches operations is not taken by what compiles them
        pass_on_shortage(error)
    return _answered(call, modules)


def _answered(call: Callable[[], object], modules: Iterable[nn.Module]) -> int:
    n = 0

    def count(module: nn.Module, given: Any, answer: Any) -> None:
        nonlocal n
        n += sum(leaf.numel() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))

    smallest = {id(m): m for m in modules if not any(True for _ in m.children())}
    handles = [module.register_forward_hook(count) for module in smallest.values()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return n
