"""Measures how much a call of a decoder computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kvtool.errors import pass_on_shortage


def work(call: Callable[[], object], modules: Iterable[nn.Module]) -> int:
    """The floating-point operations of a call's matrix products. If they cannot be counted, as
    within flex_attention, the numbers that its smallest modules answer."""
    try:
        with Products() as products:
            call()
        return products.work
    except Exception as error:  # the compiler refuses dispatch modes
        pass_on_shortage(error)
    return _answered(call, modules)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, as torch's FlopCounterMode does without loading the
    compiler, which takes longer than the counted work."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0  # floating-point operations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether the compiler is loaded, to keep it out of here; nothing is compiled meanwhile."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # an operation that is made of others is counted as those
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        answer = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.work += count(*args, **kwargs, out_val=answer)
        return answer


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
